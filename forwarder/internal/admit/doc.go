// Package admit is the only way to a flow: it asks the rules, the budgets and the flow table, asks
// again when rules change, and gives each flow the pass without which nothing moves.
package admit
