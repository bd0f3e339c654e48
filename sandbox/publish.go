package sandbox

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/ports"
	"sluice.dev/sluice/sandbox/internal/process"
)

// publishing is the part of the monitor that publishes ports.
type publishing struct{ *monitor }

// openPort opens a port for the guest's families. Called with change held, or
// before anything runs.
func (m publishing) openPort(p api.Port) ([]ports.Published, error) {
	has4, has6, err := m.kind.families()
	switch {
	case err != nil:
		return nil, err
	case p.HostIP.Is4() && !has4:
		return nil, &api.Error{Code: api.CodeInvalid, Message: fmt.Sprintf("publish %s: the sandbox has no IPv4 address", ports.FormatPort(p))}
	case p.HostIP.Is6() && !has6:
		return nil, &api.Error{Code: api.CodeInvalid, Message: fmt.Sprintf("publish %s: the sandbox has no IPv6 address", ports.FormatPort(p))}
	}
	return m.ports.Add(p, has4, has6)
}

// addPort publishes a port at run time.
func (m publishing) addPort(params api.PortsParams) (any, error) {
	p, err := ports.ParsePort(params.Spec)
	if err != nil {
		return nil, &api.Error{Code: api.CodeInvalid, Message: err.Error()}
	}
	made, err := m.publish(p)
	if err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			err = &api.Error{Code: api.CodeExists, Message: err.Error()}
		}
		return nil, err
	}
	return api.PortsResult{Ports: ports.ApiPorts(made)}, nil
}

// publish opens a port and has the worker serve it, or leaves nothing open.
func (m publishing) publish(p api.Port) ([]ports.Published, error) {
	m.change.Lock()
	defer m.change.Unlock()
	made, err := m.openPort(p)
	if err != nil {
		return nil, err
	}
	if l := m.worker(); l != nil {
		for _, one := range made {
			if err = l.Survived(m.offer(l, one)); err != nil {
				m.ports.Drop(made)
				m.withdraw(made)
				return nil, err
			}
		}
	}
	for _, one := range made {
		m.log.Infof("monitor", "published %s", ports.FormatPort(one.Port))
	}
	return made, nil
}

// withdraw closes ports that are no longer in the table, here and in the worker. Called with change
// held.
func (m publishing) withdraw(gone []ports.Published) {
	for _, p := range gone {
		for _, s := range p.Listeners {
			if err := m.tell(channel.MsgUnpublish, channel.PublishMessage{ID: s.ID, Proto: s.Proto, Host: s.Host, Guest: s.Guest}); err != nil {
				m.log.Warnf("monitor", "withdraw %s: %v", ports.FormatPort(p.Port), err)
			}
		}
	}
	ports.ClosePublished(gone)
}

// removePort withdraws a published port at run time.
func (m publishing) removePort(params api.PortsParams) (any, error) {
	p, err := ports.ParsePort(params.Spec)
	if err != nil {
		return nil, &api.Error{Code: api.CodeInvalid, Message: err.Error()}
	}
	gone, err := m.unpublish(p)
	if err != nil {
		return nil, err
	}
	return api.PortsResult{Ports: ports.ApiPorts(gone)}, nil
}

func (m publishing) unpublish(p api.Port) ([]ports.Published, error) {
	m.change.Lock()
	defer m.change.Unlock()
	gone, err := m.ports.Remove(p)
	if err != nil {
		return nil, err
	}
	m.withdraw(gone)
	m.log.Infof("monitor", "withdrew %s", ports.FormatPort(p))
	return gone, nil
}

// autoPublisher keeps the ports of --publish-auto in step with the sandbox's listening sockets.
type autoPublisher struct {
	made    map[ports.AutoPort]api.Port
	refused map[ports.AutoPort]bool // reported once, retried when the set changes
	publish func(api.Port) ([]ports.Published, error)
	remove  func(api.Port) ([]ports.Published, error)
	taken   func(api.Port) bool // published manually
	held    func() map[ports.HeldPort]bool
	log     *logring.LogRing
	warned  int
}

// maxAutoWarnings bounds the warnings caused by a sandbox that keeps listening on ports that cannot
// be published.
const maxAutoWarnings = 32

// refuse reports why a port is not published, once for as long as it is listened on.
func (a *autoPublisher) refuse(key ports.AutoPort, err error) {
	if a.refused[key] {
		return
	}
	a.refused[key] = true
	if a.warned++; a.warned > maxAutoWarnings {
		return
	}
	a.log.Warnf("monitor", "--publish-auto: %v", err)
	if a.warned == maxAutoWarnings {
		a.log.Warnf("monitor", "--publish-auto: no more is said of ports that cannot be published")
	}
}

// update receives the whole set of ports that are listened on now.
func (a *autoPublisher) update(now map[ports.AutoPort]bool) {
	for key, p := range a.made {
		if now[key] {
			continue
		}
		delete(a.made, key)
		if _, err := a.remove(p); err != nil {
			// Removed by hand, with `port rm`: nothing is left to do.
			a.log.Infof("monitor", "--publish-auto: %v", err)
		}
	}
	for key := range a.refused {
		if !now[key] {
			delete(a.refused, key)
		}
	}
	var held map[ports.HeldPort]bool // looked up once, for ports that are new
	for key := range now {
		p := api.Port{Proto: key.Proto, HostIP: key.Host.Addr(), HostPort: key.Host.Port(), GuestPort: key.Host.Port(), Auto: true}
		if _, ok := a.made[key]; ok || a.taken(p) {
			continue
		}
		if err := ports.ReservedPort(key); err != nil {
			a.refuse(key, err)
			continue
		}
		if held == nil {
			held = a.held()
		}
		if held[ports.HeldPort{Proto: key.Proto, Port: key.Host.Port()}] {
			a.refuse(key, fmt.Errorf("%s/%s: another program of the host has the port, in this family or the other", key.Host, key.Proto))
			continue
		}
		if _, err := a.publish(p); err != nil {
			a.refuse(key, err)
			continue
		}
		a.made[key] = p
	}
}

// autoHosts returns where on the host a listening socket of the sandbox is published: at an address
// of a family that the socket accepts. at is --publish-auto's address; loopback and the unspecified
// address stand for those of either family.
func autoHosts(p guest.Port, at netip.Addr) []netip.AddrPort {
	inside := []netip.Addr{p.Addr.Unmap()}
	if p.DualStack {
		inside = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	}
	var out []netip.AddrPort
	for _, in := range inside {
		host := at
		if host.Is4() != in.Is4() {
			switch {
			case host.IsLoopback() && in.Is6():
				host = netip.IPv6Loopback()
			case host.IsLoopback():
				host = netip.AddrFrom4([4]byte{127, 0, 0, 1})
			case host.IsUnspecified() && in.Is6():
				host = netip.IPv6Unspecified()
			case host.IsUnspecified():
				host = netip.IPv4Unspecified()
			default:
				continue
			}
		}
		out = append(out, netip.AddrPortFrom(host, p.Port))
	}
	return out
}

// offer passes one published port to a worker. Called with change held.
func (m publishing) offer(l *process.WorkerLink, p ports.Published) error {
	for _, s := range p.Listeners {
		msg := channel.PublishMessage{ID: s.ID, Proto: s.Proto, Host: s.Host, Guest: s.Guest}
		if err := l.Request(channel.MsgPublish, msg, s.FD); err != nil {
			return fmt.Errorf("publish %s: %w", ports.FormatPort(p.Port), err)
		}
	}
	return nil
}
