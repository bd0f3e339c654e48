package forwarder

// How a failed dial is told to the sandbox.

import (
	"net/netip"

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

// tellDialError answers the SYN, as far as it was kept, with the error that the
// network sent if there was one, from where it came, and otherwise with what
// the host's errno means coming from a gateway.
func (i *icmpErrors) tellDialError(syn []byte, e extendedErr, fromNetwork bool, errno unix.Errno) {
	if len(syn) == 0 {
		return
	}
	if fromNetwork {
		if info, ok := errorInfo(&e); ok {
			i.sendForm(icmpForm{e.typ, e.cod}, info, syn, e.offender)
			return
		}
	}
	kind := icmpHostUnreachable
	switch errno {
	case unix.ENETUNREACH, unix.ENETDOWN, unix.EAFNOSUPPORT, unix.EINVAL:
		kind = icmpNetUnreachable
	case unix.EACCES, unix.EPERM:
		kind = icmpAdminProhibited
	}
	i.send(kind, 0, syn, netip.Addr{})
}
