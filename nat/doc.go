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
// The package knows neither packets nor sockets nor policy. The forwarder tells it what happened to
// a flow and asks whether a new one may begin. Time is a parameter: given a Config.Now and the same
// calls of Expire, a Table does exactly the same each time.
//
// # Locks
//
// Lease.mu is taken before Table.mu, and no lock is taken after Table.mu. Lease.mu guards a flow's
// transitions, and so orders its events. Table.mu guards the index, the timer wheel, the eviction
// lists and the budgets. Table.subs.mu is a leaf as well. No callback runs under Table.mu;
// Config.OnEvent runs under the Lease.mu of its flow.
package nat
