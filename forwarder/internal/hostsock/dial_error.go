package hostsock

// How a failed dial is reported to the sandbox, and in the log.

import (
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// DialError reads the ICMP error that ended a connection attempt from the socket's error queue. ok
// is false if there is none, as for errors that the host found by itself.
func DialError(fd int) (e packet.ExtendedErr, ok bool) {
	var data [packet.QuoteMax]byte
	var oob [256]byte
	n, oobn, _, _, err := unix.Recvmsg(fd, data[:], oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if err != nil || n < 0 {
		return packet.ExtendedErr{}, false
	}
	c := ParseControl(oob[:oobn])
	fromNetwork := c.Err.Origin == unix.SO_EE_ORIGIN_ICMP || c.Err.Origin == unix.SO_EE_ORIGIN_ICMP6
	return c.Err, c.HasErr && fromNetwork
}

// Shortage returns the resource that the host lacks if it fails to give a socket, or a port, with
// this error. It is empty for other errors.
func Shortage(errno unix.Errno) nat.Reason {
	switch errno {
	case unix.EMFILE, unix.ENFILE:
		return nat.ReasonOutOfDescriptors
	case unix.EADDRNOTAVAIL, unix.EAGAIN: // connect(2): no port of ip_local_port_range is left
		return nat.ReasonOutOfPorts
	case unix.ENOBUFS, unix.ENOMEM:
		return nat.ReasonOutOfMemory
	}
	return ""
}
