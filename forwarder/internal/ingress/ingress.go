package ingress

// Published TCP ports: from the accepted connection to one in the sandbox.
//
// The host's kernel accepts before it is known whether the sandbox listens. A port published on
// both families must not look open on one of them because of that: a client that asks for localhost
// tries the second only if the first refuses. So if the sandbox refuses a connection at one of its
// addresses, the next is tried: its loopback in the client's family and in the other (relay.go),
// then its link in the client's family and in the other (fromhost.go). If all refuse, the
// connection is reset at once.

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// Config holds what published TCP ports share with the rest of the forwarder.
type Config struct {
	Gate   *admit.Gate
	Engine *engine.Engine
	Dialer *hostsock.Dialer
	Drops  *packet.Drops
	Timer  *engine.Need
	TCP    *tcpflow.Forwarder
	Guests guestSockets // nil: loopback clients appear as the gateway
}

// guestSockets makes sockets inside the sandbox's network namespace.
type guestSockets interface {
	Stream(v6 bool) (fd int, ok bool)
}

// Ports holds the published TCP ports of one sandbox.
type Ports struct {
	Config
	pipes pipeStock // for the relays

	mu     sync.Mutex
	relays map[*relay]struct{}
	closed bool

	refused, limited, failed *atomic.Uint64
	relayed                  *atomic.Uint64 // flows that took the loopback shortcut
}

func New(parts Config) *Ports {
	c := parts.Drops.Stats.Counter
	return &Ports{
		Config:  parts,
		relays:  make(map[*relay]struct{}),
		refused: c("ingress_refused_by_policy"),
		limited: c("ingress_refused_by_limit"),
		failed:  c("ingress_accept_failed"),
		relayed: c("tcp_relayed_loopback"),
	}
}

// Close ends every relay. None can begin afterwards.
func (in *Ports) Close() {
	in.mu.Lock()
	in.closed = true
	relays := slices.Collect(maps.Keys(in.relays))
	in.mu.Unlock()
	for _, r := range relays {
		r.Abort(nat.ReasonStopped)
	}
	in.pipes.close()
}

// client is a client whose connection was accepted.
type client struct {
	tcpflow.Caller
	ways []way // not tried yet
}

// way is one way for a client to reach a server inside.
type way struct {
	guest    netip.AddrPort
	loopback bool // from the sandbox's loopback, of guest's family
}

// waysTo returns the ways to l in the order in which a client tries them.
func waysTo(l *hostsock.Listener, client netip.Addr) []way {
	ways := make([]way, 0, 4)
	for _, loopback := range []bool{true, false} {
		if loopback && !client.IsLoopback() {
			continue
		}
		for _, guest := range []netip.AddrPort{l.Guest, l.Other} {
			if guest.IsValid() {
				ways = append(ways, way{guest, loopback})
			}
		}
	}
	return ways
}

// localAddr is the host's end of an accepted connection, or listener if the kernel does not tell.
func localAddr(fd int, listener netip.AddrPort) netip.AddrPort {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return listener
	}
	return hostsock.AddrPort(sa)
}

// take carries an accepted connection into the sandbox. It owns fd.
func (in *Ports) take(fd int, c client) {
	if err := in.Dialer.TuneStream(fd); err != nil {
		in.Dialer.Reset(fd)
		return
	}
	in.tryNext(fd, c)
}

// tryNext tries the next of c's ways. It owns fd.
func (in *Ports) tryNext(fd int, c client) {
	for len(c.ways) > 0 {
		w := c.ways[0]
		c.ways = c.ways[1:]
		c.Next = nil
		if rest := c; len(rest.ways) > 0 {
			c.Next = func(fd int) { in.tryNext(fd, rest) }
		}
		j := in.Gate.Decide(policy.Query{Ingress: true, Proto: unix.IPPROTO_TCP, Src: c.From, Dst: w.guest})
		if !j.MayBegin() {
			in.refused.Add(1)
			in.Gate.Refuse(j, true) // by the reset below
			break
		}
		if !w.loopback {
			in.TCP.FromHost(fd, c.Caller, j)
			return
		}
		if in.relay(fd, c.Caller, j) {
			return
		}
	}
	in.Dialer.Reset(fd)
}
