// Package dns is the resolver at the sandbox's DNS address: it answers names that the sandbox's own
// configuration knows (--add-host names, localhost) and forwards every other question, as a whole
// message, to the host's upstream servers.
//
//	sandbox ─ UDP ─ ServePacket ─┐                 ┌─ local names (hosts.go)
//	                             ├─ judge ─ answer ┤
//	sandbox ─ TCP ─ ServeStream ─┘    (judge.go)   └─ upstream, UDP then TCP
//	                                                  (exchange.go, via Dialer)
//
// judge.go is the one place where a question is judged.
//
// While the policy gates names (Config.Rules), a question that it refuses is answered at once and
// never goes upstream. A question that it allows is asked in a message of our own; the answer is
// read, sifted, granted, cached and rewritten (gate.go, sift.go, cache.go). Questions that go
// upstream are bounded against tunnels (tunnel.go). The caller then sends us the questions to every
// resolver, and an Event reports each (record.go). A pod has a resolver of its own; we answer in
// its place only while names are gated (Config.OnlyGated).
//
// While the policy gates no names, messages stay in wire form from end to end. No compression
// pointer is ever followed and no record is ever re-encoded, so unknown types, DNSSEC bits and EDNS
// options pass untouched and a crafted message has nothing to loop on. Only the ID (drawn afresh
// for each upstream try), the counts and the TC bit are ever rewritten (wire.go).
//
// Limits and the policy bound everything: queries in flight and per second, large answers held,
// streams, queries pipelined per stream, idle time and time per query. Close returns after the last
// goroutine.
//
// The package opens no socket itself: Config.Dialer does, and only to the servers that the host's
// configuration names. Watcher follows resolv.conf; it needs a file system, so it runs in the
// monitor, which pushes Upstreams to the worker's Resolver.
package dns
