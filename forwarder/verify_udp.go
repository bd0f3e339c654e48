package forwarder

// Verification of QUIC: the way of a packet.
//
// The datagrams of a tuple whose verdict asks for the first bytes are held here, before
// there is a flow, a lease or a socket, until the ClientHello in them is whole; then
// the flow begins with them, in the order in which they came. The gate stays: in the flow,
// what carries a long header is read likewise, and held if need be (verify_quic.go). What is
// no QUIC says no name, and is judged as that at once.

import (
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice/forwarder/sniff"
	"sluice/nat"
	"sluice/policy"
)

// maxHeldBytes bounds the datagrams held for one tuple, and maxHeldPackets their number.
const (
	maxHeldBytes   = 2 * sniff.MaxFirst
	maxHeldPackets = 16
)

// heldPacket is a packet that waits for hellos to be whole.
type heldPacket struct {
	pkt   *stack.PacketBuffer // a reference of its own
	a     arrival
	needs []awaited
}

func dropHeld(packets []heldPacket) {
	for i := range packets {
		packets[i].pkt.DecRef()
	}
}

// quicRead is what becomes of a packet.
type quicRead struct {
	passes, held bool
	// said is by what it passes, or why it does not.
	said judged
	// before are packets that were held and pass now, before it. Their references are the
	// caller's.
	before []heldPacket
}

// read judges a packet of qt's. mu is held.
func (qt *quicTuple) read(pkt *stack.PacketBuffer, a arrival) (r quicRead) {
	refused, ok := qt.recheck()
	if !ok {
		return quicRead{said: refused}
	}
	needs, silent, ok := qt.dissect(pkt)
	if !ok {
		return qt.refuse(qt.unread())
	}
	for _, n := range needs {
		allowed, waits, why := qt.settle(n)
		if !allowed && !waits {
			return qt.refuse(why)
		}
		r.held = r.held || waits
	}
	switch {
	case silent && len(qt.said) == 0:
		return qt.refuse(qt.ask(policy.Seen{Kind: policy.SeenOpaque}))
	case !r.held:
		return quicRead{passes: true, said: qt.said[len(qt.said)-1], before: qt.release()}
	case !qt.hold(heldPacket{pkt, a, needs}):
		return qt.refuse(qt.unread())
	}
	return r
}

// refuse drops a packet, for the reason given, and those that wait for the same. Rules that
// let it pass all the same, as in audit mode, need no more of it. mu is held.
func (qt *quicTuple) refuse(why judged) quicRead {
	r := quicRead{said: why, passes: why.verdict.Allowed() && qt.note(why)}
	qt.held, qt.size = slices.DeleteFunc(qt.held, func(p heldPacket) bool {
		pass, _ := qt.awaits(p)
		if !pass {
			p.pkt.DecRef()
		}
		return !pass
	}), 0
	for _, p := range qt.held {
		qt.size += p.pkt.Data().Size()
	}
	return r
}

// awaits reports whether a packet that was held may pass at all, and whether not yet. mu is held.
func (qt *quicTuple) awaits(p heldPacket) (pass, wait bool) {
	pass = true
	for _, n := range p.needs {
		allowed, waits, _ := qt.settle(n)
		pass, wait = pass && (allowed || waits), wait || waits
	}
	return pass, wait
}

// dissect reads the datagrams of a packet: what it waits for, and whether some of them say
// nothing. It fails if one cannot be read. mu is held.
func (qt *quicTuple) dissect(pkt *stack.PacketBuffer) (needs []awaited, silent, ok bool) {
	now := qt.gate.admission.now()
	ok, silent = true, pkt.Data().Size() == 0
	eachDatagram(pkt, func(p []byte) bool {
		if !sniff.LongHeader(p) {
			silent = true
			return true
		}
		var n awaited
		if n, ok = qt.needs(p, now); ok {
			needs = append(needs, n)
		}
		return ok
	})
	return needs, silent, ok
}

// hold keeps a packet. It fails if there are too many. mu is held.
func (qt *quicTuple) hold(p heldPacket) bool {
	size := p.pkt.Data().Size()
	if qt.gate.closed || qt.size+size > maxHeldBytes || len(qt.held) == maxHeldPackets {
		qt.gate.full.Add(1)
		return false
	}
	p.pkt.IncRef()
	qt.held, qt.size = append(qt.held, p), qt.size+size
	return true
}

// release takes the packets that pass now, and drops those that never will. mu is held.
func (qt *quicTuple) release() (out []heldPacket) {
	kept := qt.held[:0]
	qt.size = 0
	for _, p := range qt.held {
		switch pass, wait := qt.awaits(p); {
		case !pass:
			p.pkt.DecRef()
		case wait:
			kept, qt.size = append(kept, p), qt.size+p.pkt.Data().Size()
		default:
			out = append(out, p)
		}
	}
	clear(qt.held[len(kept):])
	qt.held = kept
	return out
}

// takeHeld ends the holding of packets. mu is held.
func (qt *quicTuple) takeHeld() []heldPacket {
	packets := qt.held
	qt.held, qt.size = nil, 0
	return packets
}

// checkExpired drops what is held: nobody says the rest.
func (qt *quicTuple) checkExpired(bool) {
	g := qt.gate
	g.mu.Lock()
	packets, begun := qt.takeHeld(), qt.flow != nil
	g.mu.Unlock()
	dropHeld(packets)
	if len(packets) == 0 || begun {
		return // it was decided meanwhile
	}
	g.refused(qt.ask(policy.Seen{Kind: policy.SeenOpaque, Flaw: policy.ReasonIncomplete}))
}

// refused logs a refusal, if policy is its reason.
func (g *quicGate) refused(j judged) {
	if !j.local && !j.verdict.Allowed() {
		g.admission.refuse(j, false)
	}
}

// close drops everything that is held.
func (g *quicGate) close() {
	g.mu.Lock()
	g.closed = true
	var packets []heldPacket
	var entries []*checkEntry
	for _, qt := range g.tuples {
		packets, entries = append(packets, qt.takeHeld()...), append(entries, &qt.entry)
	}
	g.mu.Unlock()
	for _, e := range entries {
		g.list.leave(e)
	}
	dropHeld(packets)
}

// wait has a tuple told when what it holds is late, unless it holds nothing any more.
func (g *quicGate) wait(qt *quicTuple, r quicRead) {
	g.mu.Lock()
	holds := len(qt.held)
	g.mu.Unlock()
	switch {
	case holds == 0:
		g.list.leave(&qt.entry)
	case holds == 1 && r.held:
		g.list.enter(&qt.entry, qt, checkTimeout)
	}
}

// verify reads a packet of a tuple that has no flow yet, and has what it says judged.
// The answer that it returns is final, with the packets that came before, whose
// references are the caller's; or pkt is held or dropped, and the answer is j, which waits.
// openMu is held.
func (u *udpForwarder) verify(tuple nat.Tuple, j judged, a arrival, pkt *stack.PacketBuffer) (judged, []heldPacket, *quicTuple) {
	g := u.quic
	g.mu.Lock()
	qt := g.tupleOf(tuple, j.query)
	r := qt.read(pkt, a)
	if r.passes {
		g.rest(qt)
	} else {
		g.drop(qt)
	}
	g.mu.Unlock()
	g.wait(qt, r)
	if !r.passes && (r.held || r.said.verdict.Allowed()) {
		return j, nil, nil
	}
	return r.said, r.before, qt
}

// mayPass reports whether a packet of a verified flow may pass now: all that it belongs to
// was judged, and is allowed. One that has to wait is held. Packets that waited for it are
// sent before it.
func (u *udpForwarder) mayPass(fl *dgramFlow, pkt *stack.PacketBuffer, a arrival) bool {
	long := false
	eachDatagram(pkt, func(p []byte) bool { long = sniff.LongHeader(p); return !long })
	if !long {
		return true
	}
	qt, g := fl.quic, u.quic
	g.mu.Lock()
	known := len(qt.said)
	r := qt.read(pkt, a)
	more := len(qt.said) > known
	g.mu.Unlock()
	g.wait(qt, r)
	if more && !fl.also(r.said) {
		dropHeld(r.before)
		return false
	}
	for _, p := range r.before {
		u.enqueue(fl, p.pkt, p.a)
	}
	dropHeld(r.before)
	if !r.passes && !r.held {
		u.n.refused.Add(1)
		g.refused(r.said)
	}
	return r.passes
}

// eachDatagram yields the datagrams of a packet, until one is enough.
func eachDatagram(pkt *stack.PacketBuffer, yield func([]byte) bool) {
	data, _ := pkt.Data().PullUp(pkt.Data().Size())
	size := len(data)
	if mss := int(pkt.GSOOptions.MSS); mss > 0 {
		size = mss
	}
	for len(data) > 0 {
		n := min(size, len(data))
		if !yield(data[:n]) {
			return
		}
		data = data[n:]
	}
}
