// Package dns is the resolver at the sandbox's DNS address: it answers what the
// sandbox's own configuration knows (--add-host names, localhost) and forwards
// every other question, as a whole message, to the host's upstream servers.
//
//	sandbox ─ UDP ─ ServePacket ─┐                 ┌─ local names (hosts.go)
//	                             ├─ judge ─ answer ┤
//	sandbox ─ TCP ─ ServeStream ─┘    (judge.go)   └─ upstream, UDP then TCP
//	                                                  (exchange.go, via Dialer)
//
// judge.go is the one place where a question is judged.
//
// While the policy gates names (Config.Rules), what it refuses is answered at once
// and never asked upstream; what it allows is asked in words of our own, and the
// answer is read, sifted, granted, kept and written anew (gate.go, sift.go, cache.go).
// Questions that go upstream are bounded against tunnels (tunnel.go). The caller sends us the
// questions to every resolver then, and is told of each (record.go). A pod has a
// resolver of its own, in whose place we answer only then (Config.OnlyGated).
//
// Otherwise messages stay in wire form from end to end. No compression pointer is
// ever followed and no record is ever re-encoded, so unknown types, DNSSEC bits and
// EDNS options pass untouched and a crafted message has nothing to loop on. Only the
// ID (drawn afresh for each upstream try), the counts and the TC bit are ever
// rewritten (wire.go).
//
// Everything is bounded by Limits and the policy's own: queries in flight and a
// second, large answers held, streams, queries pipelined per stream, idle time and
// time per query. Close returns after the last goroutine.
//
// The package opens no socket itself: Config.Dialer does, and only for the
// servers that the host's configuration named. Watcher follows resolv.conf; it
// needs a file system, so it runs in the monitor, which pushes Upstreams to the
// worker's Resolver.
package dns
