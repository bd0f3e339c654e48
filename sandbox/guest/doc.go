// Package guest makes and keeps the inside of a sandbox: the namespaces, the
// TAP or TUN device in them, its addresses and routes, the private
// /etc/resolv.conf, /etc/hosts and /etc/nsswitch.conf, and the command that runs there.
//
// It is the only code that enters a sandbox. It knows nothing of packets, policy or flows: it hands
// out the device's descriptors and does not use them.
//
//	 monitor (caller's namespaces)            guest stage (new namespaces)
//	┌───────────────────────────┐            ┌──────────────────────────────┐
//	│ Start: clone ─────────────┼── exec ───►│ outer: waits for its id maps │
//	│ writes uid_map, gid_map   │            │                              │
//	│ ── mapped ────────────────┼──channel──►│ covers sockets, starts inner │
//	│                           │            │ inner: lo, device, addresses,│
//	│                           │            │ routes, sysctls, mounts      │
//	│ Device() ◄── ready + fds ─┼────────────┼─                             │
//	│ Release ── exec ──────────┼───────────►│ fork ──► CMD (a tty and      │
//	│                           │◄─ started ─┼─          group of its own)  │
//	│ Socket, Signal ───────────┼──requests─►│ holds the namespaces         │
//	│ Wait ◄── exited ──────────┼────────────┼─ reaps                       │
//	└───────────────────────────┘            └──────────────────────────────┘
//
// The channel is a SOCK_SEQPACKET pair. Until CMD starts, the stage is ours and the monitor trusts
// it. Afterwards a CMD that is root inside can take it over, so the monitor bounds and checks
// everything it reads: a status, and sockets, which must be of the kind asked for and of the
// sandbox's namespace. The ports that the sandbox listens on never come from the stage: the monitor
// asks the kernel itself, over a sock_diag socket that was opened inside.
//
// From before CMD starts, a filter of system calls (confine.FilterCommand) applies to the stage and
// all that it starts: some sockets bypass every network namespace, and a process can type into its
// terminal. None of them has the caller's terminal: Console copies between it and one of the
// sandbox's own.
//
// Nothing outlives the monitor. CMD dies with the stage (PR_SET_PDEATHSIG). The stage sees the
// channel's end and kills every other process in the sandbox's user namespace. With a PID namespace
// the stage is its init, and the kernel does all that. If the stage is killed, the monitor sweeps
// instead.
//
// Attach does the same with existing namespaces: the stage is forked straight into them, makes the
// device, and stays to hold it.
package guest
