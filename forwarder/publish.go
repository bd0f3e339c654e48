package forwarder

// Published ports: connections and datagrams from the host to the sandbox. Listening sockets are
// made elsewhere, by a process that may bind their ports, and outlive this process, which only
// accepts from them.

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/datagram"
	"sluice.dev/sluice/forwarder/internal/ingress"
)

// publisher is the published ports of one forwarder.
type publisher struct {
	onTCP  *ingress.Ports
	onUDP  *datagram.Forwarder
	mu     sync.Mutex
	tcp    []*ingress.Port
	udp    []Listener
	closed bool
}

// Publish starts serving l.
func (f *Forwarder) Publish(l Listener) error {
	p := &f.publish
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return errors.New("publishing a port: the forwarder has stopped")
	case p.find(l.Proto, l.Host) != nil:
		return fmt.Errorf("publishing %s: %w", l.Host, ErrPublished)
	case l.Proto == unix.IPPROTO_UDP:
		if err := p.onUDP.Publish(l); err != nil {
			return fmt.Errorf("publishing %s/udp: %w", l.Host, err)
		}
		p.udp = append(p.udp, l)
		return nil
	case l.Proto != unix.IPPROTO_TCP:
		return fmt.Errorf("publishing %s: protocol %d has no ports", l.Host, l.Proto)
	}
	t, err := p.onTCP.Listen(l)
	if err != nil {
		return err
	}
	p.tcp = append(p.tcp, t)
	return nil
}

// Unpublish stops serving the listener bound to host and closes it. Flows that came through it
// continue. It reports whether there was one.
func (f *Forwarder) Unpublish(proto uint8, host netip.AddrPort) bool {
	p := &f.publish
	p.mu.Lock()
	defer p.mu.Unlock()
	if proto == unix.IPPROTO_UDP {
		i := slices.IndexFunc(p.udp, func(l Listener) bool { return l.Host == host })
		if i < 0 {
			return false
		}
		p.onUDP.Unpublish(p.udp[i])
		p.udp = slices.Delete(p.udp, i, i+1)
		return true
	}
	i := slices.IndexFunc(p.tcp, func(t *ingress.Port) bool { return t.Host == host })
	if i < 0 {
		return false
	}
	p.tcp[i].Close()
	p.tcp = slices.Delete(p.tcp, i, i+1)
	return true
}

// Published returns the listeners being served.
func (f *Forwarder) Published() []Listener {
	p := &f.publish
	p.mu.Lock()
	defer p.mu.Unlock()
	all := slices.Clone(p.udp)
	for _, t := range p.tcp {
		all = append(all, t.Listener)
	}
	return all
}

// find is called with mu held.
func (p *publisher) find(proto uint8, host netip.AddrPort) *Listener {
	for i := range p.tcp {
		if l := &p.tcp[i].Listener; l.Proto == proto && l.Host == host {
			return l
		}
	}
	for i := range p.udp {
		if l := &p.udp[i]; l.Proto == proto && l.Host == host {
			return l
		}
	}
	return nil
}

// retry lets listeners that ran out of descriptors try again, and reports whether there were any.
// The forwarder's timer calls it.
func (p *publisher) retry() (starved bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.tcp {
		starved = t.Retry() || starved
	}
	return starved
}

func (p *publisher) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, t := range p.tcp {
		t.Close()
	}
	for _, l := range p.udp {
		p.onUDP.Unpublish(l)
	}
	p.tcp, p.udp = nil, nil
}
