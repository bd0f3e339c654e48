package sandbox

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"sluice/forwarder/sandbox/api"
)

// listener is one open host socket of a published port.
type listener struct {
	id    uint64 // names it on the channel
	fd    int    // the table's, closed when the port is removed
	proto string
	host  netip.AddrPort
	guest uint16
}

// portTable holds the published ports and their sockets, for longer than any
// worker. Opening is all or nothing: a range of which one port is taken leaves
// none open.
type portTable struct {
	// open is listenOn, or a test's.
	open func(proto string, at netip.AddrPort) (int, netip.AddrPort, error)

	mu     sync.Mutex
	nextID uint64
	ports  []published
}

// published is one port with its one or two (v4 and v6) sockets.
type published struct {
	port      api.Port
	listeners []listener
}

// add opens the sockets of spec; without an address, those of the families that
// the guest has.
func (t *portTable) add(spec api.Port, v4, v6 bool) ([]published, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	singles := expand(spec)
	if len(t.ports)+len(singles) > maxPublished {
		return nil, fmt.Errorf("publish %s: the limit of %d published ports is reached", FormatPort(spec), maxPublished)
	}
	var made []published
	for _, p := range singles {
		got, err := t.openOne(p, v4, v6)
		if err != nil {
			closePublished(made)
			return nil, err
		}
		made = append(made, got)
	}
	t.ports = append(t.ports, made...)
	return made, nil
}

// openTries is how many ports of the kernel's choice are tried on both families.
const openTries = 64

// openOne opens the sockets of one port. For host port 0 the kernel chooses in one family,
// where the other may have the port taken: the families choose in turn, so that the one
// with fewer free ports is asked soon.
func (t *portTable) openOne(p api.Port, v4, v6 bool) (out published, err error) {
	var at []netip.Addr
	if p.HostIP.IsValid() {
		at = append(at, p.HostIP)
	} else {
		if v4 {
			at = append(at, netip.IPv4Unspecified())
		}
		if v6 {
			at = append(at, netip.IPv6Unspecified())
		}
	}
	for range openTries {
		out, err = t.openAt(p, at)
		if p.HostPort != 0 || len(at) < 2 || !errors.Is(err, unix.EADDRINUSE) {
			break
		}
		slices.Reverse(at)
	}
	return out, explain(err)
}

// openAt opens the sockets of one port at each of the addresses, the first of which chooses
// it if need be.
func (t *portTable) openAt(p api.Port, at []netip.Addr) (published, error) {
	out := published{port: p}
	for _, a := range at {
		fd, bound, err := t.open(p.Proto, netip.AddrPortFrom(a, out.port.HostPort))
		if err != nil {
			// A host without IPv6 publishes on IPv4 alone.
			if a.Is6() && len(at) > 1 && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
				continue
			}
			closePublished([]published{out})
			return published{}, err
		}
		t.nextID++
		out.port.HostPort = bound.Port() // the kernel's choice where 0 was asked for
		out.listeners = append(out.listeners, listener{id: t.nextID, fd: fd, proto: p.Proto, host: bound, guest: p.GuestPort})
	}
	return out, nil
}

// remove takes the ports of spec out of the table; the caller closes them. All
// of the range must be there. A spec that does not say which guest port (0)
// matches any.
func (t *portTable) remove(spec api.Port) ([]published, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	wanted := expand(spec)
	var gone []published
	keep := slices.Clone(t.ports)
	for _, w := range wanted {
		i := slices.IndexFunc(keep, func(p published) bool { return matches(p.port, w) })
		if i < 0 {
			return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("port %s is not published", FormatPort(w))}
		}
		gone = append(gone, keep[i])
		keep = slices.Delete(keep, i, i+1)
	}
	t.ports = keep
	return gone, nil
}

// drop takes ports out of the table that the caller goes on to close.
func (t *portTable) drop(gone []published) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ports = slices.DeleteFunc(t.ports, func(p published) bool {
		return slices.ContainsFunc(gone, func(g published) bool { return g.listeners[0].id == p.listeners[0].id })
	})
}

func matches(have, want api.Port) bool {
	return have.Proto == want.Proto && have.HostIP == want.HostIP && have.HostPort == want.HostPort &&
		(want.GuestPort == 0 || have.GuestPort == want.GuestPort)
}

// find says whether a port is published.
func (t *portTable) find(want api.Port) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.ContainsFunc(t.ports, func(p published) bool { return matches(p.port, want) })
}

func (t *portTable) list() []published {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.ports)
}

// closeAll gives every port up.
func (t *portTable) closeAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	closePublished(t.ports)
	t.ports = nil
}

func closePublished(ports []published) {
	for _, p := range ports {
		for _, l := range p.listeners {
			_ = unix.Close(l.fd)
		}
	}
}

func apiPorts(ports []published) []api.Port {
	out := make([]api.Port, len(ports))
	for i, p := range ports {
		out[i] = p.port
	}
	return out
}
