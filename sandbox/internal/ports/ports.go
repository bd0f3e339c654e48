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

// listener is one open host socket of a published port.
type listener struct {
	ID    uint64 // names it on the channel
	FD    int    // the table's, closed when the port is removed
	Proto string
	Host  netip.AddrPort
	Guest uint16
}

// PortTable holds the published ports and their sockets, for longer than any
// worker. Opening is all or nothing: a range of which one port is taken leaves
// none open.
type PortTable struct {
	// Open is ListenOn, or a test's.
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

// Add opens the sockets of spec; without an address, those of the families that
// the guest has.
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

// openTries is how many ports of the kernel's choice are tried on both families.
const openTries = 64

// openOne opens the sockets of one port. For host port 0 the kernel chooses in one family,
// where the other may have the port taken: the families choose in turn, so that the one
// with fewer free ports is asked soon. What was chosen in vain stays open until one is found,
// because the kernel prefers some ports and would choose them again.
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

// openAt opens the sockets of one port at each of the addresses, the first of which chooses
// it if need be. With an error it returns those that are open.
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
		out.Port.HostPort = bound.Port() // the kernel's choice where 0 was asked for
		out.Listeners = append(out.Listeners, listener{ID: t.nextID, FD: fd, Proto: p.Proto, Host: bound, Guest: p.GuestPort})
	}
	return out, nil
}

// Remove takes the ports of spec out of the table; the caller closes them. All
// of the range must be there. A spec that does not say which guest port (0)
// matches any.
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

// Drop takes ports out of the table that the caller goes on to close.
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

// Find says whether a port is published.
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

// CloseAll gives every port up.
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
