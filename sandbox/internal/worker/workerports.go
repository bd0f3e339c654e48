package worker

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/sandbox/internal/channel"
)

// publish serves a published port.
func (w *Worker) publish(p channel.PublishMessage, fd int) error {
	l := forwarder.Listener{Proto: protoNumber(p.Proto), FD: fd, Host: p.Host}
	for _, a := range w.cfg.Guest {
		if to := netip.AddrPortFrom(a, p.Guest); a.Is4() == p.Host.Addr().Is4() {
			l.Guest = to
		} else {
			l.Other = to
		}
	}
	if !l.Guest.IsValid() {
		_ = unix.Close(fd)
		return fmt.Errorf("the sandbox has no address of the family of %s", p.Host)
	}
	err := w.fwd.Publish(l)
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	if w.takesLoopback(p) {
		w.stock.Open(w.cfg.Guest)
	}
	return nil
}

// takesLoopback reports whether clients on the host's loopback can reach a port that serves them
// with a socket inside.
func (w *Worker) takesLoopback(p channel.PublishMessage) bool {
	a := p.Host.Addr()
	return w.stock != nil && p.Proto == "tcp" && (a.IsLoopback() || a.IsUnspecified())
}

func protoNumber(name string) uint8 {
	if name == "udp" {
		return unix.IPPROTO_UDP
	}
	return unix.IPPROTO_TCP
}
