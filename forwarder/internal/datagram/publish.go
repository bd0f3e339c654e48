package datagram

// Published UDP ports.
//
// The listener is a host socket like the others, except that it outlives its flows and that
// strangers may write to it: their first datagram is judged by the ingress rules and begins a flow.
// The sandbox sees the client's own address. A client on the host's loopback, or with a link-local
// address, cannot appear as itself and is seen as the gateway. An answer from the sandbox finds the
// flow by its tuple like any datagram, and leaves through the listener from the address that the
// client wrote to, which IP_PKTINFO gave. So a client that writes to two ports or two addresses of
// the host that lead to one port inside has two flows, and the second has another source port
// there.

import (
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

type ingressCounters struct {
	refused, limited, noSource *atomic.Uint64
}

func newIngressCounters(s *count.Set) ingressCounters {
	return ingressCounters{
		refused:  s.Counter("udp_ingress_refused_by_policy"),
		limited:  s.Counter("udp_ingress_refused_by_limit"),
		noSource: s.Counter("udp_ingress_no_source"), // no address under which to show the client
	}
}

// publishedUDP is one listener.
type publishedUDP struct {
	u      *udpForwarder
	host   netip.AddrPort
	guests [2]netip.AddrPort // where it leads; the second, of the other family, may be invalid
	first  atomic.Uint32     // which of guests a new flow goes to
	sock   *hostSocket
}

// Publish takes over the descriptor of l if it returns nil.
func (d *Forwarder) Publish(l hostsock.Listener) error {
	u := d.UDP
	v6 := l.Host.Addr().Is6()
	if err := hostsock.TunePacket(l.FD, v6); err != nil {
		return err
	}
	if v6 {
		// A dual-stack listener reports control data of IPv4 datagrams at IPv4's level.
		_ = hostsock.TunePacket(l.FD, false)
	}
	// As in the dialer: without it, datagrams come one by one.
	_ = unix.SetsockoptInt(l.FD, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	p := &publishedUDP{u: u, host: l.Host, guests: [2]netip.AddrPort{l.Guest, l.Other}}
	u.Mu.Lock()
	defer u.Mu.Unlock()
	if u.closed {
		return admit.ErrStopped
	}
	p.sock = u.newHostSocket(l.FD, packet.ProtoUDP, func(fd int) { unix.Close(fd) })
	p.sock.shared = true
	p.sock.port = p
	if err := p.sock.start(); err != nil {
		return err
	}
	u.published[l.Host] = p.sock
	return nil
}

// Unpublish closes the listener. Its flows end: nothing else can carry their answers.
func (d *Forwarder) Unpublish(l hostsock.Listener) {
	u := d.UDP
	u.Mu.Lock()
	s := u.published[l.Host]
	delete(u.published, l.Host)
	u.Mu.Unlock()
	if s == nil {
		return
	}
	s.mu.Lock()
	var flows []*Flow
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
func (p *publishedUDP) client(from netip.AddrPort, local netip.Addr) *Flow {
	p.u.openMu.Lock()
	defer p.u.openMu.Unlock()
	if known := p.sock.Peer(from, local); known != nil {
		return known // it has just moved to the other family
	}
	return p.begin(from, local, p.guests[p.first.Load()], false)
}

// begin begins a flow to guest. openMu is held.
func (p *publishedUDP) begin(from netip.AddrPort, local netip.Addr, guest netip.AddrPort, moved bool) *Flow {
	u := p.u
	j := u.Gate.Decide(policy.Query{Ingress: true, Proto: packet.ProtoUDP, Src: from, Dst: guest})
	if !j.MayBegin() {
		u.ingress.refused.Add(1)
		u.Gate.Refuse(j, false)
		return nil
	}
	source, ok := p.source(from, guest)
	if !ok {
		u.Gate.NoteLimit(u.ingress.noSource, j, nat.ErrNoPort)
		return nil
	}
	fl := &Flow{
		d: &u.dgramTable, Tuple: nat.NewTuple(packet.ProtoUDP, guest, source),
		Guest: guest, Peer: source, Target: from, local: local, ingress: true, moved: moved,
	}
	host := p.host
	if local.IsValid() {
		host = netip.AddrPortFrom(local, p.host.Port())
	}
	if err := u.Gate.Enter(&fl.Pass, fl, j, admit.Entry{Orig: nat.NewTuple(packet.ProtoUDP, from, host)}); err != nil {
		u.Gate.NoteLimit(u.ingress.limited, j, err)
		return nil
	}
	fl.Lease.SetReply(fl.Tuple)
	u.Mu.Lock()
	ok = !fl.ended && !u.closed && u.published[p.host] == p.sock
	if ok {
		u.attachLocked(fl, p.sock)
	}
	u.Mu.Unlock()
	if !ok {
		fl.end(nat.ReasonUnpublished)
		return nil
	}
	return fl
}

// source is the address under which the sandbox sees a client of guest. openMu is held.
func (p *publishedUDP) source(from, guest netip.AddrPort) (netip.AddrPort, bool) {
	a := p.u.Onlink.ClientInside(from.Addr(), guest.Addr())
	if !a.IsValid() {
		return from, false
	}
	for port := range onlink.SourcePorts(from.Port()) {
		s := netip.AddrPortFrom(a, port)
		old := p.u.Lookup(nat.NewTuple(packet.ProtoUDP, guest, s))
		if s == from && old != nil && !old.ingress {
			// The sandbox had sent to this client from the published port. From now on its
			// datagrams must leave through the listener, or the client would not recognise them.
			old.end(nat.ReasonReplaced)
			old = nil
		}
		if old == nil {
			return s, true
		}
	}
	return from, false
}
