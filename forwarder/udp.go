package forwarder

// UDP from the sandbox.
//
// The stack's default handler calls handleUDP on the device reader for every datagram,
// reassembled if it came in fragments. A datagram of a known flow is queued for its
// socket; one of an unknown tuple is judged here: for us (the resolver, or nobody
// at that port), at its last hop, refused by policy, refused by the flow table, or
// the first of a new flow.

import (
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice/nat"
	"sluice/policy"
)

type udpForwarder struct {
	dgramTable
	checksum, length, noPort reason
	ingress                  ingressCounters
	published                map[netip.AddrPort]*hostSocket // by host address; guarded by mu
	quic                     *quicGate
}

func newUDPForwarder(p dgramParts, all *datagrams) *udpForwarder {
	u := &udpForwarder{
		checksum:  p.drops.reason("udp_checksum"),
		length:    p.drops.reason("udp_length"),
		noPort:    p.drops.reason("udp_closed_port"), // nothing of ours listens there
		ingress:   newIngressCounters(p.drops.stats),
		published: make(map[netip.AddrPort]*hostSocket),
		quic:      newQUICGate(p.gate, p.drops.stats, p.timer),
	}
	u.init(p, all, "udp")
	return u
}

// handleUDP is the stack's handler for datagrams. It keeps what it needs of pkt by a
// reference of its own, and never blocks.
func (d *datagrams) handleUDP(_ stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	d.udp.arrive(pkt)
	return true // whatever it was, the stack has nothing to add
}

func (u *udpForwarder) arrive(pkt *stack.PacketBuffer) {
	a, ok := arrivalOf(pkt)
	h := header.UDP(pkt.TransportHeader().Slice())
	if !ok || len(h) < header.UDPMinimumSize || int(h.Length()) != header.UDPMinimumSize+pkt.Data().Size() {
		u.length.drop(pkt)
		return
	}
	if !pkt.RXChecksumValidated && !u.checksumValid(a, h, pkt) {
		u.checksum.drop(pkt)
		return
	}
	guest, peer := netip.AddrPortFrom(a.src, h.SourcePort()), netip.AddrPortFrom(a.dst, h.DestinationPort())
	tuple := nat.NewTuple(protoUDP, guest, peer)
	fl := u.lookup(tuple)
	if fl == nil && u.answered(guest, peer, a, pkt) {
		return
	}
	if fl == nil || a.meta.ttl <= 1 {
		if u.lastHop(a, pkt) {
			return
		}
	}
	if fl == nil {
		if fl = u.begin(tuple, guest, peer, a, pkt); fl == nil {
			return
		}
	}
	if fl.revoked.Load() {
		u.n.refused.drop(pkt)
		return
	}
	if fl.socket() == nil {
		u.ask(fl, a, pkt)
		return
	}
	if fl.quic != nil && !u.mayPass(fl, pkt, a) {
		return
	}
	if fl.unasked.Load() {
		u.asked(fl)
	}
	u.enqueue(fl, pkt, a)
}

// checksumValid sums the datagram. No checksum at all is valid in IPv4 only.
func (u *udpForwarder) checksumValid(a arrival, h header.UDP, pkt *stack.PacketBuffer) bool {
	if h.Checksum() == 0 {
		return a.dst.Is4()
	}
	return h.IsChecksumValid(tcpipAddr(a.src), tcpipAddr(a.dst), pkt.Data().Checksum())
}

// begin sets up the flow of a first datagram, or deals with the datagram and returns nil.
func (u *udpForwarder) begin(tuple nat.Tuple, guest, peer netip.AddrPort, a arrival, pkt *stack.PacketBuffer) *dgramFlow {
	fl := &dgramFlow{d: &u.dgramTable, tuple: tuple, guest: guest, peer: peer, target: peer}
	u.openMu.Lock()
	defer u.openMu.Unlock()
	if known := u.lookup(tuple); known != nil {
		return known // another reader was faster
	}
	j := u.gate.decide(policy.Query{Proto: protoUDP, Src: guest, Dst: peer})
	if j.local {
		fl.short.Store(true)
		if !u.enterLocal(fl, j) {
			u.n.flow.drop(pkt)
			return nil
		}
		return fl
	}
	var before []heldPacket
	if j.waits() {
		j, before, fl.quic = u.verify(tuple, j, a, pkt)
		defer func() { dropHeld(before) }()
		if j.waits() || j.local { // local: names are gated since its first packet came
			return nil
		}
	}
	if !j.mayBegin() {
		if u.onlink.isOwn(peer.Addr()) {
			u.noPort.drop(pkt)
			u.errs.tell(icmpPortUnreachable, 0, pkt)
			return nil
		}
		u.refuse(j, icmpPortUnreachable, pkt)
		return nil
	}
	fl.target = j.verdict.Target()
	fl.short.Store(peer.Port() == dnsPort && asks(pkt))
	if fl.quic != nil {
		fl.quic.attach(fl)
	}
	if err := u.gate.enter(&fl.pass, fl, j, entry{orig: tuple, short: fl.short.Load()}); err != nil {
		fl.rest()
		u.n.flow.drop(pkt)
		u.gate.noteLimit(nil, j, err)
		return nil
	}
	err := u.install(fl, func() (*hostSocket, error) {
		fd, err := u.dialer.podPacketSocket(j.verdict, guest.Addr())
		if err != nil {
			return nil, err
		}
		return u.startSocket(fd, protoUDP)
	})
	if err != nil {
		fl.end(noSocketReason(err))
		fl.rest() // the table may have ended it before
		u.noSocket(err, pkt)
		return nil
	}
	for _, p := range before {
		u.enqueue(fl, p.pkt, p.a)
	}
	return fl
}

// otherPort begins a flow for a datagram that came to s from an address that the
// sandbox has sent to, but from another port: address-dependent filtering (RFC 4787
// REQ-8) lets it in if the sandbox may answer it. Such a flow does not make the address
// known for longer, or it could go from port to port for ever.
func (u *udpForwarder) otherPort(s *hostSocket, from netip.AddrPort) *dgramFlow {
	s.mu.Lock()
	k, ok := s.known[from.Addr()]
	guest := s.guest
	s.mu.Unlock()
	if !ok || !guest.IsValid() {
		return nil
	}
	peer := netip.AddrPortFrom(k.peer, from.Port())
	j := u.gate.decide(policy.Query{Proto: protoUDP, Src: guest, Dst: peer})
	if !j.verdict.Allowed() || j.verdict.Target() != from {
		return nil
	}
	fl := &dgramFlow{d: &u.dgramTable, tuple: nat.NewTuple(protoUDP, guest, peer), guest: guest, peer: peer, target: from}
	fl.unasked.Store(true)
	u.openMu.Lock()
	defer u.openMu.Unlock()
	if known := u.lookup(fl.tuple); known != nil {
		return known // the sandbox was faster
	}
	if u.gate.enter(&fl.pass, fl, j, entry{orig: fl.tuple}) != nil {
		return nil
	}
	if err := u.install(fl, func() (*hostSocket, error) { return nil, errFlowEnded }); err != nil {
		fl.end(nat.ReasonNoSocket)
		return nil
	}
	return fl
}

// enterLocal makes fl a flow that ends here.
func (d *dgramTable) enterLocal(fl *dgramFlow, j judged) bool {
	if err := d.gate.enter(&fl.pass, fl, j, entry{orig: fl.tuple, short: fl.short.Load()}); err != nil {
		d.gate.noteLimit(nil, j, err)
		return false
	}
	d.mu.Lock()
	ok := !fl.ended && !d.closed
	if ok {
		d.flows[fl.tuple] = fl
	}
	d.mu.Unlock()
	if !ok {
		fl.release(nat.ReasonStopped)
	}
	return ok
}

// answered reports whether the datagram is a query that the resolver answered from memory.
// Nothing is on its way then, so that there is no flow to keep.
func (u *udpForwarder) answered(guest, peer netip.AddrPort, a arrival, pkt *stack.PacketBuffer) bool {
	if peer.Port() != dnsPort || a.meta.ttl <= 1 || !u.onlink.forResolver(u.gate.rules.Load(), peer) {
		return false
	}
	v := pkt.Data().AsRange().ToView()
	if v == nil {
		return false
	}
	defer v.Release()
	answer := u.resolver.AnswerPacket(v.AsSlice(), guest)
	if answer == nil {
		return false
	}
	u.emit.udp(peer, guest, ipMeta{ttl: defaultTTL}, answer, false)
	return true
}

// ask gives a query to the resolver.
func (u *udpForwarder) ask(fl *dgramFlow, a arrival, pkt *stack.PacketBuffer) {
	fl.noteSent(a)
	fl.queries.Add(1)
	fl.lease.Account(nat.Original, 1, int64(a.size))
	v := pkt.Data().AsRange().ToView()
	var query []byte
	if v != nil {
		query = v.ToSlice()
		v.Release()
	}
	var answered atomic.Bool
	u.resolver.ServePacket(u.ctx, query, fl.guest, func(answer []byte, became policy.Outcome) {
		if answered.Swap(true) || fl.revoked.Load() {
			return
		}
		fl.answered(became)
		if answer == nil {
			return
		}
		size := ipHeaderLen(fl.guest.Addr()) + udpHeaderLen + len(answer)
		fl.lease.Account(nat.Reply, 1, int64(size))
		u.emit.udp(fl.peer, fl.guest, ipMeta{ttl: defaultTTL}, answer, false)
		if fl.queries.Add(-1) <= 0 {
			fl.end(nat.ReasonAnswered)
		}
	})
}
