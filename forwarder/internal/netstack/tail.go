package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// EndpointState returns ep's state.
func EndpointState(ep tcpip.Endpoint) tcp.EndpointState {
	return tcp.EndpointState(ep.State())
}
