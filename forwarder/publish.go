package forwarder

// Published ports: connections and datagrams that come from the host to the
// sandbox. Listening sockets are made elsewhere, by whoever may bind their ports,
// and outlive this process; here they are accepted from.
//
// The sandbox sees the client's own address, because the stack may use any
// source. Only a client on the host's loopback cannot appear as itself on a
// link: it is connected inside the sandbox, loopback to loopback (relay.go), or
// where no socket inside can be had, appears as the gateway.

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// acceptBudget is how many connections one listener may take before the others
// get a turn.
const acceptBudget = 64

// Listener is a published port: a bound host socket, listening if it is TCP.
type Listener struct {
	Proto uint8          // unix.IPPROTO_TCP or IPPROTO_UDP
	FD    int            // non-blocking; owned by the forwarder once Publish succeeded
	Host  netip.AddrPort // where it is bound
	Guest netip.AddrPort // where it leads
	// Other is the same port of the guest's other family, where a TCP client is taken that
	// finds nobody at Guest; the zero value if there is none.
	Other netip.AddrPort
}

// ErrPublished says that a listener for the same host port is there already.
var ErrPublished = errors.New("already published")

type publisher struct {
	f       *Forwarder
	mu      sync.Mutex
	tcp     []*tcpListener
	udp     []Listener
	closed  bool
	refused *atomic.Uint64
	limited *atomic.Uint64
	failed  *atomic.Uint64
}

func newPublisher(f *Forwarder) *publisher {
	return &publisher{
		f:       f,
		refused: f.stats.counter("ingress_refused_by_policy"),
		limited: f.stats.counter("ingress_refused_by_limit"),
		failed:  f.stats.counter("ingress_accept_failed"),
	}
}

// Publish starts to serve l.
func (f *Forwarder) Publish(l Listener) error {
	p := f.publish
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return errors.New("publishing a port: the forwarder has stopped")
	case p.find(l.Proto, l.Host) != nil:
		return fmt.Errorf("publishing %s: %w", l.Host, ErrPublished)
	case l.Proto == unix.IPPROTO_UDP:
		if err := f.dgram.publish(l); err != nil {
			return fmt.Errorf("publishing %s/udp: %w", l.Host, err)
		}
		p.udp = append(p.udp, l)
		return nil
	case l.Proto != unix.IPPROTO_TCP:
		return fmt.Errorf("publishing %s: protocol %d has no ports", l.Host, l.Proto)
	}
	t := &tcpListener{p: p, l: l}
	t.accepting.run = t.accept
	tok, err := t.p.f.engine.poll.add(l.FD, unix.EPOLLIN, t)
	if err != nil {
		return fmt.Errorf("publishing %s: %w", l.Host, err)
	}
	t.tok = tok
	p.tcp = append(p.tcp, t)
	return nil
}

// Unpublish stops serving the listener bound to host and closes it. Flows that
// came through it go on. It tells whether there was one.
func (f *Forwarder) Unpublish(proto uint8, host netip.AddrPort) bool {
	p := f.publish
	p.mu.Lock()
	defer p.mu.Unlock()
	if proto == unix.IPPROTO_UDP {
		i := slices.IndexFunc(p.udp, func(l Listener) bool { return l.Host == host })
		if i < 0 {
			return false
		}
		f.dgram.unpublish(p.udp[i])
		p.udp = slices.Delete(p.udp, i, i+1)
		return true
	}
	i := slices.IndexFunc(p.tcp, func(t *tcpListener) bool { return t.l.Host == host })
	if i < 0 {
		return false
	}
	p.tcp[i].close()
	p.tcp = slices.Delete(p.tcp, i, i+1)
	return true
}

// Published lists what is served.
func (f *Forwarder) Published() []Listener {
	p := f.publish
	p.mu.Lock()
	defer p.mu.Unlock()
	all := slices.Clone(p.udp)
	for _, t := range p.tcp {
		all = append(all, t.l)
	}
	return all
}

// find is called with mu held.
func (p *publisher) find(proto uint8, host netip.AddrPort) *Listener {
	for i := range p.tcp {
		if l := &p.tcp[i].l; l.Proto == proto && l.Host == host {
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

// retry lets listeners that ran into a lack of descriptors try again, and tells
// whether there were any. Called by the forwarder's timer.
func (p *publisher) retry() (starved bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.tcp {
		if t.starved.Swap(false) {
			t.p.f.engine.put(&t.accepting)
			starved = true
		}
	}
	return starved
}

func (p *publisher) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, t := range p.tcp {
		t.close()
	}
	for _, l := range p.udp {
		p.f.dgram.unpublish(l)
	}
	p.tcp, p.udp = nil, nil
}

// tcpListener accepts from one listening socket, on the run queue.
type tcpListener struct {
	p         *publisher
	l         Listener
	tok       pollToken
	accepting task
	starved   atomic.Bool // accept(2) failed for want of descriptors

	mu     sync.Mutex // held over accept(2), so that close cannot pull the descriptor away
	closed bool
}

func (t *tcpListener) pollReady(uint32) { t.p.f.engine.put(&t.accepting) }

func (t *tcpListener) close() {
	t.p.f.engine.poll.remove(t.tok, t.l.FD)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	unix.Close(t.l.FD)
}

func (t *tcpListener) accept() {
	for range acceptBudget {
		t.mu.Lock()
		if t.closed {
			t.mu.Unlock()
			return
		}
		fd, sa, err := unix.Accept4(t.l.FD, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		t.mu.Unlock()
		switch err {
		case nil:
			t.p.f.dialer.sockets.Add(1)
			t.p.f.tcp.ingress(fd, caller{from: addrPort(sa), host: localAddr(fd, t.l.Host), ways: t.l.ways(addrPort(sa))})
		case unix.EAGAIN:
			return
		case unix.EINTR, unix.ECONNABORTED, unix.EPROTO, unix.EPERM:
			// accept(2): errors of the one connection, gone before it was taken.
		default:
			t.p.failed.Add(1)
			t.starved.Store(true)
			t.p.f.needTimer.raise()
			return
		}
	}
	t.p.f.engine.put(&t.accepting)
}

// addrPort converts the kernel's address, unmapped.
func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
