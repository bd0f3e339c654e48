// Package nat holds the flow table: which flows a sandbox has, in what state each
// is, what it has used of the sandbox's budgets, and when it ends.
//
//	              Acquire(Spec)                    Account, SetState
//	forwarder ───────────────────► Table ─► Lease ◄────────────────── forwarder
//	                │                │        │
//	   refused: ErrTableFull …       │        └─ Release(reason): budgets repaid, once
//	                                 │
//	            Run / Expire: timeouts ─► Spec.Expire(reason): forwarder closes its sockets
//	            Subscribe, OnEvent:       NEW, UPDATE, DESTROY
//	            List, WriteConntrack:     what conntrack -L prints
//
// The words are the kernel's: the states of nf_conntrack_proto_tcp.c, ASSURED and
// [UNREPLIED], the nf_conntrack_* names for every setting that the kernel has too,
// and conntrack(8)'s line format.
//
// The package knows neither packets nor sockets nor policy. It is told what
// happened to a flow and it answers whether a new one may be. Time is a parameter:
// a Table with a Config.Now and calls of Expire does exactly the same thing each time.
//
// # Locks
//
// Lease.mu comes before Table.mu comes before nothing. Lease.mu guards a flow's
// transitions (and so orders its events), Table.mu the index, the timer wheel, the
// eviction lists and the budgets. Table.subs.mu is a leaf as well. No callback runs
// under Table.mu; Config.OnEvent runs under the Lease.mu of its flow.
package nat
