// Package policy decides whether a flow may pass.
//
// It owns the policy model and its YAML form, the compiled rules, the one decision function, and
// the audited table of special addresses. It knows nothing of sockets, packets, flow tables or name
// resolution: everything it needs to know about the machine comes in through Environment.
//
//	file ──Parse──► *Policy ──Compile(Environment)──► *Rules ──Decide(Query)──► Verdict
//	        strict,           special addresses,       immutable,               the only thing
//	        file:line:col     tries, port spans        0 allocs, < 1 µs         that can dial
//
// Rules are ordered and the first match wins; the examples of Parse, Rules.Decide and Explain show
// each step. An allow rule reaches a special address (special.go) only if it names it: by entity,
// or by a CIDR that lies wholly inside the special range. A reject or drop rule needs no such
// precision.
//
// Everything fails closed: a nil or zero Rules, a zero Verdict and a zero
// Action all deny.
package policy
