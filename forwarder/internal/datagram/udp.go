package datagram

// UDP from the sandbox.
//
// The stack's default handler calls HandleUDP on the device reader for every datagram, reassembled
// if it came in fragments. A datagram of a known flow is queued for its socket. One of an unknown
// tuple is judged here: it is for us (the resolver, or a closed port), at its last hop, refused by
// policy, refused by the flow table, or the first of a new flow.

import (
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

type udpForwarder struct {
	dgramTable
	checksum, length, noPort packet.Reason
	ingress                  ingressCounters
	published                map[netip.AddrPort]*hostSocket // by host address; guarded by mu
	QUIC                     *QUICGate
}

func newUDPForwarder(p Config, all *Forwarder) *udpForwarder {
	u := &udpForwarder{
		checksum:  p.Drops.Reason("udp_checksum"),
		length:    p.Drops.Reason("udp_length"),
		noPort:    p.Drops.Reason("udp_closed_port"), // nothing of ours listens there
		ingress:   newIngressCounters(p.Drops.Stats),
		published: make(map[netip.AddrPort]*hostSocket),
		QUIC:      NewQUICGate(p.Gate, p.Drops.Stats, p.Timer),
	}
	u.init(p, all, "udp")
	return u
}

// HandleUDP is the stack's handler for datagrams. It takes a reference of its own to keep pkt, and
// never blocks.
func (d *Forwarder) HandleUDP(_ stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	d.UDP.arrive(pkt)
	return true // in any case the stack has nothing to add
}

func (u *udpForwarder) arrive(pkt *stack.PacketBuffer) {
	a, ok := packet.ArrivalOf(pkt)
	h := header.UDP(pkt.TransportHeader().Slice())
	if !ok || len(h) < header.UDPMinimumSize || int(h.Length()) != header.UDPMinimumSize+pkt.Data().Size() {
		u.length.Drop(pkt)
		return
	}
	if !pkt.RXChecksumValidated && !u.checksumValid(a, h, pkt) {
		u.checksum.Drop(pkt)
		return
	}
	guest, peer := netip.AddrPortFrom(a.Src, h.SourcePort()), netip.AddrPortFrom(a.Dst, h.DestinationPort())
	tuple := nat.NewTuple(packet.ProtoUDP, guest, peer)
	fl := u.Lookup(tuple)
	if fl == nil && u.answered(guest, peer, a, pkt) {
		return
	}
	if fl == nil || a.Meta.TTL <= 1 {
		if u.lastHop(a, pkt) {
			return
		}
	}
	if fl == nil {
		if fl = u.begin(tuple, guest, peer, a, pkt); fl == nil {
			return
		}
	}
	if fl.Revoked.Load() {
		u.n.refused.Drop(pkt)
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

// checksumValid verifies the datagram's checksum. No checksum at all is valid in IPv4 only.
func (u *udpForwarder) checksumValid(a packet.Arrival, h header.UDP, pkt *stack.PacketBuffer) bool {
	if h.Checksum() == 0 {
		return a.Dst.Is4()
	}
	return h.IsChecksumValid(packet.StackAddr(a.Src), packet.StackAddr(a.Dst), pkt.Data().Checksum())
}

// begin sets up the flow of a first datagram, or handles the datagram and returns nil.
func (u *udpForwarder) begin(tuple nat.Tuple, guest, peer netip.AddrPort, a packet.Arrival, pkt *stack.PacketBuffer) *Flow {
	fl := &Flow{d: &u.dgramTable, Tuple: tuple, Guest: guest, Peer: peer, Target: peer}
	u.openMu.Lock()
	defer u.openMu.Unlock()
	if known := u.Lookup(tuple); known != nil {
		return known // another reader was faster
	}
	j := u.Gate.Decide(policy.Query{Proto: packet.ProtoUDP, Src: guest, Dst: peer})
	if j.Local {
		fl.short.Store(true)
		if !u.enterLocal(fl, j) {
			u.n.flow.Drop(pkt)
			return nil
		}
		return fl
	}
	var before []heldPacket
	if j.Waits() {
		j, before, fl.quic = u.verify(tuple, j, a, pkt)
		defer func() { DropHeld(before) }()
		if j.Waits() || j.Local { // local: names are gated since its first packet came
			return nil
		}
	}
	if !j.MayBegin() {
		if u.Onlink.IsOwn(peer.Addr()) {
			u.noPort.Drop(pkt)
			u.Errs.Tell(packet.ICMPPortUnreachable, 0, pkt)
			return nil
		}
		u.refuse(j, packet.ICMPPortUnreachable, pkt)
		return nil
	}
	fl.Target = j.Verdict.Target()
	fl.short.Store(peer.Port() == onlink.DNSPort && packet.Asks(pkt))
	if fl.quic != nil {
		fl.quic.attach(fl)
	}
	if err := u.Gate.Enter(&fl.Pass, fl, j, admit.Entry{Orig: tuple, Short: fl.short.Load()}); err != nil {
		fl.rest()
		u.n.flow.Drop(pkt)
		u.Gate.NoteLimit(nil, j, err)
		return nil
	}
	err := u.install(fl, func() (*hostSocket, error) {
		fd, err := u.Dialer.PodPacketSocket(j.Verdict, guest.Addr())
		if err != nil {
			return nil, err
		}
		return u.startSocket(fd, packet.ProtoUDP)
	})
	if err != nil {
		fl.end(noSocketReason(err))
		fl.rest() // the table may have ended it before
		u.noSocket(err, pkt)
		return nil
	}
	for _, p := range before {
		u.enqueue(fl, p.Pkt, p.a)
	}
	return fl
}

// otherPort begins a flow for a datagram that came to s from an address that the sandbox has sent
// to, but from another port. Address-dependent filtering (RFC 4787 REQ-8) lets it in if the sandbox
// may answer it. Such a flow does not keep the address known for longer; otherwise it could go from
// port to port for ever.
func (u *udpForwarder) otherPort(s *hostSocket, from netip.AddrPort) *Flow {
	s.mu.Lock()
	k, ok := s.known[from.Addr()]
	guest := s.guest
	s.mu.Unlock()
	if !ok || !guest.IsValid() {
		return nil
	}
	peer := netip.AddrPortFrom(k.peer, from.Port())
	j := u.Gate.Decide(policy.Query{Proto: packet.ProtoUDP, Src: guest, Dst: peer})
	if !j.Verdict.Allowed() || j.Verdict.Target() != from {
		return nil
	}
	fl := &Flow{d: &u.dgramTable, Tuple: nat.NewTuple(packet.ProtoUDP, guest, peer), Guest: guest, Peer: peer, Target: from}
	fl.unasked.Store(true)
	u.openMu.Lock()
	defer u.openMu.Unlock()
	if known := u.Lookup(fl.Tuple); known != nil {
		return known // the sandbox was faster
	}
	if u.Gate.Enter(&fl.Pass, fl, j, admit.Entry{Orig: fl.Tuple}) != nil {
		return nil
	}
	if err := u.install(fl, func() (*hostSocket, error) { return nil, admit.ErrFlowEnded }); err != nil {
		fl.end(nat.ReasonNoSocket)
		return nil
	}
	return fl
}

// enterLocal makes fl a flow that ends here.
func (d *dgramTable) enterLocal(fl *Flow, j admit.Judged) bool {
	if err := d.Gate.Enter(&fl.Pass, fl, j, admit.Entry{Orig: fl.Tuple, Short: fl.short.Load()}); err != nil {
		d.Gate.NoteLimit(nil, j, err)
		return false
	}
	d.Mu.Lock()
	ok := !fl.ended && !d.closed
	if ok {
		d.flows[fl.Tuple] = fl
	}
	d.Mu.Unlock()
	if !ok {
		fl.Release(nat.ReasonStopped)
	}
	return ok
}

// answered reports whether the datagram is a query that the resolver answered from memory. Nothing
// is then in flight, so there is no flow to keep.
func (u *udpForwarder) answered(guest, peer netip.AddrPort, a packet.Arrival, pkt *stack.PacketBuffer) bool {
	if peer.Port() != onlink.DNSPort || a.Meta.TTL <= 1 || !u.Onlink.ForResolver(u.Gate.Rules.Load(), peer) {
		return false
	}
	v := pkt.Data().AsRange().ToView()
	if v == nil {
		return false
	}
	defer v.Release()
	answer := u.Resolver.AnswerPacket(v.AsSlice(), guest)
	if answer == nil {
		return false
	}
	u.Emit.UDP(peer, guest, packet.Meta{TTL: packet.DefaultTTL}, answer, false)
	return true
}

// ask passes a query to the resolver.
func (u *udpForwarder) ask(fl *Flow, a packet.Arrival, pkt *stack.PacketBuffer) {
	fl.noteSent(a)
	fl.queries.Add(1)
	fl.Lease.Account(nat.Original, 1, int64(a.Size))
	v := pkt.Data().AsRange().ToView()
	var query []byte
	if v != nil {
		query = v.ToSlice()
		v.Release()
	}
	var answered atomic.Bool
	u.Resolver.ServePacket(u.Ctx, query, fl.Guest, func(answer []byte, became policy.Outcome) {
		if answered.Swap(true) || fl.Revoked.Load() {
			return
		}
		fl.Answered(became)
		if answer == nil {
			return
		}
		size := packet.IPHeaderLen(fl.Guest.Addr()) + packet.UDPHeaderLen + len(answer)
		fl.Lease.Account(nat.Reply, 1, int64(size))
		u.Emit.UDP(fl.Peer, fl.Guest, packet.Meta{TTL: packet.DefaultTTL}, answer, false)
		if fl.queries.Add(-1) <= 0 {
			fl.end(nat.ReasonAnswered)
		}
	})
}
