package forwarder

// How a failed dial is told to the sandbox.

import (
	"golang.org/x/sys/unix"
)

// dialError reads the ICMP error that ended a connection attempt off the
// socket's error queue; ok is false when there is none, as for errors that the
// host found by itself.
func dialError(fd int) (e extendedErr, ok bool) {
	var data [quoteMax]byte
	var oob [256]byte
	n, oobn, _, _, err := unix.Recvmsg(fd, data[:], oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if err != nil || n < 0 {
		return extendedErr{}, false
	}
	c := parseControl(oob[:oobn])
	fromNetwork := c.err.origin == unix.SO_EE_ORIGIN_ICMP || c.err.origin == unix.SO_EE_ORIGIN_ICMP6
	return c.err, c.hasErr && fromNetwork
}
