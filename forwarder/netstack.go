package forwarder

// What netstack's API does not offer.

import (
	_ "unsafe" // for go:linkname

	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// handleConnected processes the segments that are queued at a connected endpoint,
// and does nothing if somebody holds its lock. In the stack only a goroutine of its
// own calls it, and waking that costs more than the segment does; see inline.go.
//
//go:linkname handleConnected gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleConnected
func handleConnected(ep *tcp.Endpoint)

// handleConnecting is the same for an endpoint in a handshake.
//
//go:linkname handleConnecting gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleConnecting
func handleConnecting(ep *tcp.Endpoint)

// handleListen is the same for a listening endpoint.
//
//go:linkname handleListen gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleListen
func handleListen(ep *tcp.Endpoint)

// segmentQueue is the part of the stack's TCP that queues a segment at an endpoint.
type segmentQueue interface {
	QueuePacket(stack.TransportEndpoint, stack.TransportEndpointID, *stack.PacketBuffer)
}
