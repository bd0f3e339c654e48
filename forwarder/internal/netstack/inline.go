package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Connected reports whether segments in this state are for HandleConnected.
func Connected(state tcp.EndpointState) bool {
	switch state {
	case tcp.StateEstablished, tcp.StateFinWait1, tcp.StateFinWait2, tcp.StateCloseWait, tcp.StateLastAck, tcp.StateClosing:
		return true
	}
	return false
}
