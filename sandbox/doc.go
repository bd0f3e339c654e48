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
// The monitor never parses a packet. The worker owns nothing that cannot be
// given to its successor: when it dies the monitor starts another with the
// same descriptors, and until that one is ready nothing moves. When the
// monitor dies, the worker and the guest stage die with it: by the end of
// their channel and by the parent-death signal.
//
// An attachment is a pod that a CNI plugin has put behind sluice: namespaces, devices
// and rules are the plugin's, and are handed over open (attachment.go). Its monitor
// outlives whoever launched it (launch.go), keeps for its workers what they must not
// forget of the flows from outside, and gives its own process to a new binary when
// told (upgrade.go):
//
//	plugin ─► sluice-cni attachment = monitor ── control.sock ◄── sluice ps, upgrade …
//	                                    └─ worker, in the pod's uplink netns
//
// The package must not know how packets are judged or forwarded: that is
// package forwarder's, which the worker wires to a tun.Endpoint, a nat.Table,
// policy.Rules and a dns.Resolver.
package sandbox
