// Package guest makes and keeps the inside of a sandbox: the namespaces, the
// TAP or TUN device in them, its addresses and routes, the private
// /etc/resolv.conf, /etc/hosts and /etc/nsswitch.conf, and the command that runs there.
//
// It is the only code that enters a sandbox. It knows nothing of packets,
// policy or flows: it hands the device's descriptors out and is done with them.
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
// The channel is a SOCK_SEQPACKET pair. Until CMD starts the stage is ours and
// is believed; afterwards, with root inside, CMD can take it over, so all that
// the monitor reads from then on is bounded and checked: a status, and sockets
// proven to be of the kind asked for and of the sandbox's namespace. The ports
// that the sandbox listens on never come from the stage at all: the monitor
// asks the kernel itself, over a sock_diag socket that was opened inside.
//
// From before CMD starts, the stage and all that it starts are under a filter of system
// calls (confine.FilterCommand): some sockets lead past every network namespace, and a
// terminal may be typed into. The caller's terminal is none of theirs: Console copies
// between it and one of the sandbox's own.
//
// Nothing outlives the monitor. CMD dies with the stage (PR_SET_PDEATHSIG), the
// stage sees the channel's end and kills whatever else lives in the sandbox's
// user namespace; with a PID namespace the stage is its init and the kernel
// does all that. Should the stage be killed, the monitor does the sweep.
//
// Attach is the same with namespaces that exist already: the stage is forked
// straight into them, makes the device, and stays to hold it.
package guest
