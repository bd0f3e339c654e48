package forwarder

// How a failed dial is told to the sandbox, and to the log.

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"sluice/nat"
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

// tellFailed tells the log of dials that keep failing, and of what came of the last one. It is
// no warning: the sandbox is told of each, and can have them fail at will.
func (t *tcpForwarder) tellFailed(to netip.AddrPort, err error) {
	if n, tell := t.failures.Note(repeatedly, t.gate.now()); tell {
		t.log.Info(fmt.Sprintf("connections fail, %d within a minute, the last one to %v: %v (`sluice flows --ended` lists them)", n, to, err))
	}
}

// dialReason counts a failed dial, and is why the flow ends.
func (fl *tcpFlow) dialReason(err error) nat.Reason {
	t := fl.t
	switch errnoOf(err) {
	case unix.ECONNREFUSED, unix.ECONNRESET:
		t.dialRefused.Add(1)
		return nat.ReasonRefused
	case unix.ETIMEDOUT:
		t.dialTimeout.Add(1)
		return nat.ReasonTimeout
	}
	if reason := shortage(errnoOf(err)); reason != "" {
		// It may pass: the sandbox's next SYN tries again.
		t.dialDescriptors.Add(1)
		return reason
	}
	t.dialUnreachable.Add(1)
	return nat.ReasonUnreachable
}

// shortage is what the host has too little of if it gives no socket, or no port, with this
// error; empty for another error.
func shortage(errno unix.Errno) nat.Reason {
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
