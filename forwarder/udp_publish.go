package forwarder

// Published UDP ports.
//
// The listener is a host socket like the others, except that it outlives its flows and
// that strangers may write to it: their first datagram is judged by the ingress
// rules and begins a flow. The sandbox sees the client's own address. A client on
// the host's loopback, or on a link, cannot appear as itself and is seen as the
// gateway. What the sandbox answers finds the flow by its tuple like any datagram, and
// leaves by the listener from the address that the client wrote to, which IP_PKTINFO
// told. So a client that writes to two ports or two addresses of the host which lead to
// one port inside has two flows, of which the second has another source port there.

import (
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sluice/nat"
	"sluice/policy"
)

type ingressCounters struct {
	refused, limited, noSource *atomic.Uint64
}

func newIngressCounters(s *stats) ingressCounters {
	return ingressCounters{
		refused:  s.counter("udp_ingress_refused_by_policy"),
		limited:  s.counter("udp_ingress_refused_by_limit"),
		noSource: s.counter("udp_ingress_no_source"), // no address to show the client under
	}
}

// publishedUDP is one listener.
type publishedUDP struct {
	u     *udpForwarder
	host  netip.AddrPort
	guest netip.AddrPort
	sock  *hostSocket
}

// publish takes over the descriptor of l if it returns nil.
func (d *datagrams) publish(l Listener) error {
	u := d.udp
	v6 := l.Host.Addr().Is6()
	if err := tunePacket(l.FD, v6); err != nil {
		return err
	}
	if v6 {
		// A dual-stack listener reports what IPv4 clients sent at IPv4's level.
		_ = tunePacket(l.FD, false)
	}
	// As in the dialer: without it, datagrams come one by one.
	_ = unix.SetsockoptInt(l.FD, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	p := &publishedUDP{u: u, host: l.Host, guest: l.Guest}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return errStopped
	}
	p.sock = u.newHostSocket(l.FD, protoUDP, func(fd int) { unix.Close(fd) })
	p.sock.shared = true
	p.sock.client = p.client
	if err := p.sock.start(); err != nil {
		return err
	}
	u.published[l.Host] = p.sock
	return nil
}

// unpublish closes the listener. Its flows end: nothing else can carry their answers.
func (d *datagrams) unpublish(l Listener) {
	u := d.udp
	u.mu.Lock()
	s := u.published[l.Host]
	delete(u.published, l.Host)
	u.mu.Unlock()
	if s == nil {
		return
	}
	s.mu.Lock()
	var flows []*dgramFlow
	for _, fl := range s.peers {
		flows = append(flows, fl)
	}
	s.mu.Unlock()
	for _, fl := range flows {
		fl.end(nat.ReasonUnpublished)
	}
	s.close()
}

// client begins a flow for a datagram to local from an address that has none.
func (p *publishedUDP) client(from netip.AddrPort, local netip.Addr) *dgramFlow {
	u := p.u
	j := u.gate.decide(policy.Query{Ingress: true, Proto: protoUDP, Src: from, Dst: p.guest})
	if !j.mayBegin() {
		u.ingress.refused.Add(1)
		u.gate.refuse(j, false)
		return nil
	}
	u.openMu.Lock()
	defer u.openMu.Unlock()
	source, ok := p.source(from)
	if !ok {
		u.gate.noteLimit(u.ingress.noSource, j, nat.ErrNoPort)
		return nil
	}
	fl := &dgramFlow{
		d: &u.dgramTable, tuple: nat.NewTuple(protoUDP, p.guest, source),
		guest: p.guest, peer: source, target: from, local: local, ingress: true,
	}
	host := p.host
	if local.IsValid() {
		host = netip.AddrPortFrom(local, p.host.Port())
	}
	if err := u.gate.enter(&fl.pass, fl, j, entry{orig: nat.NewTuple(protoUDP, from, host)}); err != nil {
		u.gate.noteLimit(u.ingress.limited, j, err)
		return nil
	}
	fl.lease.SetReply(fl.tuple)
	u.mu.Lock()
	ok = !fl.ended && !u.closed && u.published[p.host] == p.sock
	if ok {
		u.attachLocked(fl, p.sock)
	}
	u.mu.Unlock()
	if !ok {
		fl.end(nat.ReasonUnpublished)
		return nil
	}
	return fl
}

// source is the address that the sandbox sees a client under. openMu is held.
func (p *publishedUDP) source(from netip.AddrPort) (netip.AddrPort, bool) {
	a := p.u.onlink.clientInside(from.Addr(), p.guest.Addr())
	if !a.IsValid() {
		return from, false
	}
	for port := range sourcePorts(from.Port()) {
		s := netip.AddrPortFrom(a, port)
		old := p.u.lookup(nat.NewTuple(protoUDP, p.guest, s))
		if s == from && old != nil && !old.ingress {
			// The sandbox had addressed this client from the published port. From now on
			// its datagrams must leave by the listener, or the client would not know them.
			old.end(nat.ReasonReplaced)
			old = nil
		}
		if old == nil {
			return s, true
		}
	}
	return from, false
}
