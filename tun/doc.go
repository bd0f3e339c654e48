// Package tun puts a virtual network device between a container and a userspace TCP/IP stack. It
// owns three things: opening a kernel TAP or TUN device with its offloads (Device), moving frames
// between it and netstack (Endpoint), and capturing those frames (Capture).
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
// Every frame carries a virtio-net header, which says what work the sender left to the receiver:
// filling in a checksum, or cutting a segment. On one machine neither need ever be done. That makes
// the device fast at any MTU: a 64 KiB segment crosses in one system call.
//
// The container is hostile. Its frames, and its kernel's headers for them, are checked before the
// stack sees them (inspect.go). A frame that fails is counted under one reason and dropped; nothing
// else happens. In the other direction nothing is dropped while the container reads: the writer
// waits for a full queue, but not for one that stays full (write.go).
//
// The package knows nothing of flows, policy or addresses above the link.
package tun
