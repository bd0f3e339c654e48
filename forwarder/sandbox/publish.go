package sandbox

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"sluice/forwarder/sandbox/api"
	"sluice/forwarder/sandbox/guest"
)

// publishing is the monitor as far as it publishes ports.
type publishing struct{ *monitor }

// openPort opens a port for the guest's families. Called with change held, or
// before anything runs.
func (m publishing) openPort(p api.Port) ([]published, error) {
	has4, has6, err := m.kind.families()
	switch {
	case err != nil:
		return nil, err
	case p.HostIP.Is4() && !has4:
		return nil, &api.Error{Code: api.CodeInvalid, Message: fmt.Sprintf("publish %s: the sandbox has no IPv4 address", FormatPort(p))}
	case p.HostIP.Is6() && !has6:
		return nil, &api.Error{Code: api.CodeInvalid, Message: fmt.Sprintf("publish %s: the sandbox has no IPv6 address", FormatPort(p))}
	}
	return m.ports.add(p, has4, has6)
}

// addPort publishes a port at run time.
func (m publishing) addPort(params api.PortsParams) (any, error) {
	p, err := ParsePort(params.Spec)
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
	return api.PortsResult{Ports: apiPorts(made)}, nil
}

// publish opens a port and has the worker serve it, or leaves nothing open.
func (m publishing) publish(p api.Port) ([]published, error) {
	m.change.Lock()
	defer m.change.Unlock()
	made, err := m.openPort(p)
	if err != nil {
		return nil, err
	}
	if l := m.worker(); l != nil {
		for _, one := range made {
			if err = l.survived(m.offer(l, one)); err != nil {
				m.ports.drop(made)
				m.withdraw(made)
				return nil, err
			}
		}
	}
	for _, one := range made {
		m.log.infof("monitor", "published %s", FormatPort(one.port))
	}
	return made, nil
}

// withdraw closes ports that have left the table, here and in the worker. Called
// with change held.
func (m publishing) withdraw(gone []published) {
	for _, p := range gone {
		for _, s := range p.listeners {
			if err := m.tell(msgUnpublish, publishMessage{ID: s.id, Proto: s.proto, Host: s.host, Guest: s.guest}); err != nil {
				m.log.warnf("monitor", "withdraw %s: %v", FormatPort(p.port), err)
			}
		}
	}
	closePublished(gone)
}

// removePort withdraws a published port at run time.
func (m publishing) removePort(params api.PortsParams) (any, error) {
	p, err := ParsePort(params.Spec)
	if err != nil {
		return nil, &api.Error{Code: api.CodeInvalid, Message: err.Error()}
	}
	gone, err := m.unpublish(p)
	if err != nil {
		return nil, err
	}
	return api.PortsResult{Ports: apiPorts(gone)}, nil
}

func (m publishing) unpublish(p api.Port) ([]published, error) {
	m.change.Lock()
	defer m.change.Unlock()
	gone, err := m.ports.remove(p)
	if err != nil {
		return nil, err
	}
	m.withdraw(gone)
	m.log.infof("monitor", "withdrew %s", FormatPort(p))
	return gone, nil
}

// autoPublisher keeps what --publish-auto made in step with what the sandbox
// listens on.
type autoPublisher struct {
	made    map[autoPort]api.Port
	refused map[autoPort]bool // said once, tried again when the set changes
	publish func(api.Port) ([]published, error)
	remove  func(api.Port) ([]published, error)
	taken   func(api.Port) bool // published by hand already
	held    func() map[heldPort]bool
	log     *logRing
	warned  int
}

// maxAutoWarnings bounds what a sandbox that listens on ports which cannot be had, again and
// again, makes its monitor say.
const maxAutoWarnings = 32

// refuse says why a port is not published, once while it is listened on.
func (a *autoPublisher) refuse(key autoPort, err error) {
	if a.refused[key] {
		return
	}
	a.refused[key] = true
	if a.warned++; a.warned > maxAutoWarnings {
		return
	}
	a.log.warnf("monitor", "--publish-auto: %v", err)
	if a.warned == maxAutoWarnings {
		a.log.warnf("monitor", "--publish-auto: no more is said of ports that cannot be published")
	}
}

// update takes the whole set of ports that are listened on now.
func (a *autoPublisher) update(now map[autoPort]bool) {
	for key, p := range a.made {
		if now[key] {
			continue
		}
		delete(a.made, key)
		if _, err := a.remove(p); err != nil {
			// By hand, with `port rm`: nothing is left to do.
			a.log.infof("monitor", "--publish-auto: %v", err)
		}
	}
	for key := range a.refused {
		if !now[key] {
			delete(a.refused, key)
		}
	}
	var held map[heldPort]bool // looked up once, for ports that are new
	for key := range now {
		p := api.Port{Proto: key.proto, HostIP: key.host.Addr(), HostPort: key.host.Port(), GuestPort: key.host.Port(), Auto: true}
		if _, ok := a.made[key]; ok || a.taken(p) {
			continue
		}
		if err := reservedPort(key); err != nil {
			a.refuse(key, err)
			continue
		}
		if held == nil {
			held = a.held()
		}
		if held[heldPort{proto: key.proto, port: key.host.Port()}] {
			a.refuse(key, fmt.Errorf("%s/%s: another program of the host has the port, in this family or the other", key.host, key.proto))
			continue
		}
		if _, err := a.publish(p); err != nil {
			a.refuse(key, err)
			continue
		}
		a.made[key] = p
	}
}

// autoHosts says where on the host something inside is published: at an
// address of a family that it takes. at is --publish-auto's address; loopback
// and the unspecified address stand for that of either family.
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
func (m publishing) offer(l *workerLink, p published) error {
	for _, s := range p.listeners {
		msg := publishMessage{ID: s.id, Proto: s.proto, Host: s.host, Guest: s.guest}
		if err := l.request(msgPublish, msg, s.fd); err != nil {
			return fmt.Errorf("publish %s: %w", FormatPort(p.port), err)
		}
	}
	return nil
}
