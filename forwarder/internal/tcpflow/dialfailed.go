package tcpflow

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/nat"
)

// tellFailed logs dials that keep failing, with the result of the last one. It is not a warning:
// the sandbox is told of each failure, and can cause them at will.
func (t *Forwarder) tellFailed(to netip.AddrPort, err error) {
	if n, tell := t.failures.Note(repeatedly, t.Gate.Now()); tell {
		t.Log.Info(fmt.Sprintf("connections fail, %d within a minute, the last one to %v: %v (`sluice flows --ended` lists them)", n, to, err))
	}
}

// dialReason counts a failed dial and returns why the flow ends.
func (fl *Flow) dialReason(err error) nat.Reason {
	t := fl.T
	switch ErrnoOf(err) {
	case unix.ECONNREFUSED, unix.ECONNRESET:
		t.dialRefused.Add(1)
		return nat.ReasonRefused
	case unix.ETIMEDOUT:
		t.dialTimeout.Add(1)
		return nat.ReasonTimeout
	}
	if reason := hostsock.Shortage(ErrnoOf(err)); reason != "" {
		// It may be temporary: the sandbox's next SYN tries again.
		t.dialDescriptors.Add(1)
		return reason
	}
	t.dialUnreachable.Add(1)
	return nat.ReasonUnreachable
}
