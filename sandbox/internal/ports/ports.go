package ports

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/api"
)

// listener is one open socket on the host for a published port.
type listener struct {
	ID    uint64 // names it on the channel
	FD    int    // owned by the table; closed when the port is removed
	Proto string
	Host  netip.AddrPort
	Guest uint16
}

// PortTable holds the published ports and their sockets, and outlives every worker. Opening is all
// or nothing: if one port of a range is taken, none stays open.
type PortTable struct {
	// Open is ListenOn, or a test's replacement.
	Open func(proto string, at netip.AddrPort) (int, netip.AddrPort, error)

	mu     sync.Mutex
	nextID uint64
	Ports  []Published
}

// Published is one port with its one or two (v4 and v6) sockets.
type Published struct {
	Port      api.Port
	Listeners []listener
}

// Add opens the sockets of spec. If spec has no address, it opens those of the families that the
// guest has.
func (t *PortTable) Add(spec api.Port, v4, v6 bool) ([]Published, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	singles := Expand(spec)
	if len(t.Ports)+len(singles) > MaxPublished {
		return nil, fmt.Errorf("publish %s: the limit of %d published ports is reached", FormatPort(spec), MaxPublished)
	}
	var made []Published
	for _, p := range singles {
		got, err := t.openOne(p, v4, v6)
		if err != nil {
			ClosePublished(made)
			return nil, err
		}
		made = append(made, got)
	}
	t.Ports = append(t.Ports, made...)
	return made, nil
}

// openTries is how many of the kernel's choices are tried in both families.
const openTries = 64

// openOne opens the sockets of one port. For host port 0 the kernel chooses in one family, and the
// port may be taken in the other. So the families take turns to choose, and the one with fewer free
// ports is asked soon. Ports chosen in vain stay open until one is found, because the kernel
// prefers some ports and would choose them again.
func (t *PortTable) openOne(p api.Port, v4, v6 bool) (out Published, err error) {
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
	var inVain []Published
	defer func() { ClosePublished(inVain) }()
	for range openTries {
		if out, err = t.openAt(p, at); err == nil {
			return out, nil
		}
		inVain = append(inVain, out)
		if p.HostPort != 0 || len(at) < 2 || !errors.Is(err, unix.EADDRINUSE) {
			break
		}
		slices.Reverse(at)
	}
	return Published{}, Explain(err)
}

// openAt opens the sockets of one port at each of the addresses. The first one chooses the port if
// need be. On error it returns the sockets that are open.
func (t *PortTable) openAt(p api.Port, at []netip.Addr) (Published, error) {
	out := Published{Port: p}
	for _, a := range at {
		fd, bound, err := t.Open(p.Proto, netip.AddrPortFrom(a, out.Port.HostPort))
		if err != nil {
			// A host without IPv6 publishes on IPv4 alone.
			if a.Is6() && len(at) > 1 && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
				continue
			}
			return out, err
		}
		t.nextID++
		out.Port.HostPort = bound.Port() // the kernel's choice if 0 was asked for
		out.Listeners = append(out.Listeners, listener{ID: t.nextID, FD: fd, Proto: p.Proto, Host: bound, Guest: p.GuestPort})
	}
	return out, nil
}

// Remove takes the ports of spec out of the table; the caller must close them. The whole range must
// be there. A spec with guest port 0 matches any guest port.
func (t *PortTable) Remove(spec api.Port) ([]Published, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	wanted := Expand(spec)
	var gone []Published
	keep := slices.Clone(t.Ports)
	for _, w := range wanted {
		i := slices.IndexFunc(keep, func(p Published) bool { return matches(p.Port, w) })
		if i < 0 {
			return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("port %s is not published", FormatPort(w))}
		}
		gone = append(gone, keep[i])
		keep = slices.Delete(keep, i, i+1)
	}
	t.Ports = keep
	return gone, nil
}

// Drop takes out of the table the ports that the caller is about to close.
func (t *PortTable) Drop(gone []Published) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Ports = slices.DeleteFunc(t.Ports, func(p Published) bool {
		return slices.ContainsFunc(gone, func(g Published) bool { return g.Listeners[0].ID == p.Listeners[0].ID })
	})
}

func matches(have, want api.Port) bool {
	return have.Proto == want.Proto && have.HostIP == want.HostIP && have.HostPort == want.HostPort &&
		(want.GuestPort == 0 || have.GuestPort == want.GuestPort)
}

// Find reports whether a port is published.
func (t *PortTable) Find(want api.Port) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.ContainsFunc(t.Ports, func(p Published) bool { return matches(p.Port, want) })
}

func (t *PortTable) List() []Published {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.Ports)
}

// CloseAll closes every port.
func (t *PortTable) CloseAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	ClosePublished(t.Ports)
	t.Ports = nil
}

func ClosePublished(ports []Published) {
	for _, p := range ports {
		for _, l := range p.Listeners {
			_ = unix.Close(l.FD)
		}
	}
}

func ApiPorts(ports []Published) []api.Port {
	out := make([]api.Port, len(ports))
	for i, p := range ports {
		out[i] = p.Port
	}
	return out
}
