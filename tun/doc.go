// Package tun puts a virtual network device between a container and a
// userspace TCP/IP stack. It owns three things: opening a kernel TAP or TUN
// device with its offloads (Device), moving frames between it and netstack
// (Endpoint), and showing those frames to people (Capture).
//
//	container netns               │ worker process
//	                              │
//	kernel TCP/IP ── tap0 ── queue ═══ readv ─► inspect ─► netstack
//	                         (fd) │      │         │
//	                              │      │         └─ refused: counted by reason
//	                              │      ├─► Capture (pcapng, never waits)
//	                              │      │
//	                tap0 ◄─ queue ═══ writev ◄── WritePackets ◄─ netstack
//
// Every frame carries a virtio-net header, which says what the sender left to
// the receiver: a checksum that is still to be filled in, or a segment that is
// still to be cut. On one machine neither need ever be done, which is what makes
// the device fast at any MTU: a 64 KiB segment crosses in one system call.
//
// The container is hostile. What it sends, and what its kernel's header says
// about it, is checked before the stack sees it (inspect.go); a frame that fails
// is counted under one reason and dropped, nothing else happens. In the other
// direction nothing is dropped while the container reads: a full queue makes the
// writer wait, but not for one that stays full (write.go).
//
// The package knows nothing of flows, policy or addresses above the link.
package tun
