// Package admit is the only way to a flow. It asks the rules, the budgets and the flow table, asks
// again when rules change, and gives each flow the pass without which it cannot move data.
package admit
