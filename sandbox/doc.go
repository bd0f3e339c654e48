// Package sandbox is one sandbox: its configuration, the monitor and the
// worker process, the channel between them, its state directory and its
// control server.
//
//	caller ─► sluice run  = monitor ── control.sock ◄── sluice ps, flows, port …
//	             │   │  holds: device, listeners, raw ICMP sockets, flow log,
//	             │   │  policy source, upstreams, tunables
//	             │   │
//	             │   └─ SOCK_SEQPACKET: JSON messages + SCM_RIGHTS ─► sluice worker
//	             │        config, rules, upstreams, ports, control        │ confined
//	             │        connections; back: ready, acks                  │ parses packets
//	             └─ sluice guest: makes the device, runs the command ◄═══════┘ device
//
// The monitor never parses a packet. The worker owns nothing that its successor cannot have: when
// it dies, the monitor starts another with the same descriptors, and no traffic moves until that
// one is ready. When the monitor dies, the worker and the guest stage die with it, through the end
// of their channel and the parent-death signal.
//
// An attachment is a pod that a CNI plugin has put behind Sluice. The plugin owns the namespaces,
// devices and rules, and hands over open descriptors (attachment.go). The attachment's monitor
// outlives its launcher (launch.go), remembers the flows from outside for its workers, and gives
// its process to a new binary on request (upgrade.go):
//
//	plugin ─► sluice-cni attachment = monitor ── control.sock ◄── sluice ps, upgrade …
//	                                    └─ worker, in the pod's uplink netns
//
// Other Go programs call Init first in main, and then Run for a sandbox with a command. The package
// does not know how packets are judged or forwarded: that is the job of package forwarder, which
// the worker wires to a tun.Endpoint, a nat.Table, policy.Rules and a dns.Resolver.
package sandbox
