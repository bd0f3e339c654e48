// Package forwarder terminates a sandbox's traffic in a userspace TCP/IP stack
// and carries every flow that policy lets through to an ordinary host socket.
//
//	link (a tun.Endpoint, or an in-memory pipe in tests)
//	  │ frames
//	  ▼
//	guard.go        source, version and destination are checked before the stack sees a packet
//	  │            (inline.go, shortcut.go: segments of established flows, and plain UDP,
//	  ▼             go straight to their endpoints)
//	gVisor netstack    reassembly, ARP, NDP, TCP
//	  │ first segment or datagram of an unknown tuple
//	  ▼
//	handshake.go udp.go echo.go ──► admit.go: Decide, Acquire ────────────────► Dialer
//	                            │  ▲ what was said                            │
//	                            ▼  │                                          │
//	                          verify*.go: the first bytes, HTTP requests      │
//	splice.go  ◄── stack readiness by waiter callbacks (runq.go)              ▼
//	           ◄── host readiness by epoll (poller.go) ─────────────── host sockets
//
// engine.go runs all of it: one goroutine sleeps in epoll for the device and the host
// sockets alike and runs what it finds to completion; others help when there is much.
//
// A pod is also reached from outside by its own address. That traffic comes on a
// second link and passes as packets, judged and tracked but not terminated:
//
//	second link ◄══► inbound.go ◄══► link
//	                    │ new flow
//	                    └──► admit.go
//
// The package knows nothing of devices, processes or configuration files. It is given a link, a
// flow table and a snapshot of rules, and is the only package that opens outbound host sockets
// (dialer.go).
//
// Goroutines: every one is started by Forwarder.Run or by a function that says
// so, and ends before Run returns. There is none per flow, nor per
// handshake; a connection to the DNS handler has one while it lasts.
package forwarder
