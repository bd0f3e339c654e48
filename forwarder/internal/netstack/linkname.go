package netstack

// Functions that netstack's API does not offer.

import (
	_ "unsafe"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// HandleConnected processes the segments queued at a connected endpoint, and does nothing if its
// lock is held. In the stack only a goroutine of its own calls it, and waking that costs more than
// processing the segment; see tcpflow/inline.go.
//
//go:linkname HandleConnected gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleConnected
func HandleConnected(ep *tcp.Endpoint)

// HandleConnecting is the same for an endpoint in a handshake.
//
//go:linkname HandleConnecting gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleConnecting
func HandleConnecting(ep *tcp.Endpoint)

// HandleListen is the same for a listening endpoint.
//
//go:linkname HandleListen gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleListen
func HandleListen(ep *tcp.Endpoint)

// SegmentQueue is the part of the stack's TCP that queues a segment at an endpoint.
type SegmentQueue interface {
	QueuePacket(stack.TransportEndpoint, stack.TransportEndpointID, *stack.PacketBuffer)
}
