package hostsock

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Listener is a published port: a bound host socket, listening if it is TCP.
type Listener struct {
	Proto uint8          // unix.IPPROTO_TCP or IPPROTO_UDP
	FD    int            // non-blocking; owned by the forwarder once Publish has succeeded
	Host  netip.AddrPort // where it is bound
	Guest netip.AddrPort // where it leads
	// Other is the same port of the guest's other family, for a client that the sandbox refuses at
	// Guest. It is the zero value if there is none.
	Other netip.AddrPort
}

// ErrPublished says that there is already a listener for the same host port.
var ErrPublished = errors.New("already published")

// AddrPort converts the kernel's address, unmapped.
func AddrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
