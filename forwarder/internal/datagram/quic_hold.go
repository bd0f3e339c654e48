package datagram

// Verification of QUIC: the path of a packet.
//
// The datagrams of a tuple whose verdict asks for the first bytes are held here, before there is a
// flow, a lease or a socket, until the ClientHello in them is whole; then the flow begins with
// them, in the order in which they came. The gate stays: in the flow, datagrams with a long header
// are read likewise, and held if need be (quic.go). A datagram that is not QUIC carries no name,
// and is judged as such at once.

import (
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// maxHeldBytes bounds the datagrams held for one tuple, and MaxHeldPackets their number.
const (
	maxHeldBytes   = 2 * sniff.MaxFirst
	MaxHeldPackets = 16
)

// heldPacket is a packet that waits for hellos to become whole.
type heldPacket struct {
	Pkt   *stack.PacketBuffer // a reference of its own
	a     packet.Arrival
	needs []awaited
}

func DropHeld(packets []heldPacket) {
	for i := range packets {
		packets[i].Pkt.DecRef()
	}
}

// quicRead is the verdict on a packet.
type quicRead struct {
	Passes, Held bool
	// Said is the judgement by which it passes or does not.
	Said admit.Judged
	// Before are packets that were held and pass now, ahead of it. The caller owns their
	// references.
	Before []heldPacket
}

// Read judges a packet of qt's. mu is held.
func (qt *QUICTuple) Read(pkt *stack.PacketBuffer, a packet.Arrival) (r quicRead) {
	refused, ok := qt.recheck()
	if !ok {
		return quicRead{Said: refused}
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
		r.Held = r.Held || waits
	}
	switch {
	case silent && len(qt.said) == 0:
		return qt.refuse(qt.ask(policy.Seen{Kind: policy.SeenOpaque}))
	case !r.Held:
		return quicRead{Passes: true, Said: qt.said[len(qt.said)-1], Before: qt.release()}
	case !qt.hold(heldPacket{pkt, a, needs}):
		return qt.refuse(qt.unread())
	}
	return r
}

// refuse drops a packet, for the given reason, and those that wait for the same. If the rules let
// it pass regardless, as in audit mode, its connection needs no further bytes. mu is held.
func (qt *QUICTuple) refuse(why admit.Judged) quicRead {
	r := quicRead{Said: why, Passes: why.Verdict.Allowed() && qt.note(why)}
	qt.Held, qt.size = slices.DeleteFunc(qt.Held, func(p heldPacket) bool {
		pass, _ := qt.awaits(p)
		if !pass {
			p.Pkt.DecRef()
		}
		return !pass
	}), 0
	for _, p := range qt.Held {
		qt.size += p.Pkt.Data().Size()
	}
	return r
}

// awaits reports whether a held packet may pass at all, and whether it must still wait. mu is held.
func (qt *QUICTuple) awaits(p heldPacket) (pass, wait bool) {
	pass = true
	for _, n := range p.needs {
		allowed, waits, _ := qt.settle(n)
		pass, wait = pass && (allowed || waits), wait || waits
	}
	return pass, wait
}

// dissect reads the datagrams of a packet. It returns what the packet waits for, and whether some
// of them say nothing. It fails if one cannot be read. mu is held.
func (qt *QUICTuple) dissect(pkt *stack.PacketBuffer) (needs []awaited, silent, ok bool) {
	now := qt.gate.admission.Now()
	ok, silent = true, pkt.Data().Size() == 0
	packet.EachDatagram(pkt, func(p []byte) bool {
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
func (qt *QUICTuple) hold(p heldPacket) bool {
	size := p.Pkt.Data().Size()
	if qt.gate.closed || qt.size+size > maxHeldBytes || len(qt.Held) == MaxHeldPackets {
		qt.gate.full.Add(1)
		return false
	}
	p.Pkt.IncRef()
	qt.Held, qt.size = append(qt.Held, p), qt.size+size
	return true
}

// release returns the packets that pass now, and drops those that never will. mu is held.
func (qt *QUICTuple) release() (out []heldPacket) {
	kept := qt.Held[:0]
	qt.size = 0
	for _, p := range qt.Held {
		switch pass, wait := qt.awaits(p); {
		case !pass:
			p.Pkt.DecRef()
		case wait:
			kept, qt.size = append(kept, p), qt.size+p.Pkt.Data().Size()
		default:
			out = append(out, p)
		}
	}
	clear(qt.Held[len(kept):])
	qt.Held = kept
	return out
}

// takeHeld empties the queue of held packets and returns them. mu is held.
func (qt *QUICTuple) takeHeld() []heldPacket {
	packets := qt.Held
	qt.Held, qt.size = nil, 0
	return packets
}

// CheckExpired drops the held packets: the rest of the hello has not come.
func (qt *QUICTuple) CheckExpired(bool) {
	g := qt.gate
	g.Mu.Lock()
	packets, begun := qt.takeHeld(), qt.Flow != nil
	g.Mu.Unlock()
	DropHeld(packets)
	if len(packets) == 0 || begun {
		return // it has been decided meanwhile
	}
	g.refused(qt.ask(policy.Seen{Kind: policy.SeenOpaque, Flaw: policy.ReasonIncomplete}))
}

// refused logs a refusal, if policy is the reason.
func (g *QUICGate) refused(j admit.Judged) {
	if !j.Local && !j.Verdict.Allowed() {
		g.admission.Refuse(j, false)
	}
}

// Close drops every held packet.
func (g *QUICGate) Close() {
	g.Mu.Lock()
	g.closed = true
	var packets []heldPacket
	var entries []*firstbytes.Entry
	for _, qt := range g.Tuples {
		packets, entries = append(packets, qt.takeHeld()...), append(entries, &qt.entry)
	}
	g.Mu.Unlock()
	for _, e := range entries {
		g.List.Leave(e)
	}
	DropHeld(packets)
}

// wait has a tuple notified when its held packets are late, unless it holds none any more.
func (g *QUICGate) wait(qt *QUICTuple, r quicRead) {
	g.Mu.Lock()
	holds := len(qt.Held)
	g.Mu.Unlock()
	switch {
	case holds == 0:
		g.List.Leave(&qt.entry)
	case holds == 1 && r.Held:
		g.List.Enter(&qt.entry, qt, firstbytes.CheckTimeout)
	}
}

// verify reads a packet of a tuple that has no flow yet, and has its first bytes judged. Either the
// returned answer is final, and comes with the packets held before, whose references the caller
// owns; or pkt was held or dropped, and the answer is j, which waits. openMu is held.
func (u *udpForwarder) verify(tuple nat.Tuple, j admit.Judged, a packet.Arrival, pkt *stack.PacketBuffer) (admit.Judged, []heldPacket, *QUICTuple) {
	g := u.QUIC
	g.Mu.Lock()
	qt := g.TupleOf(tuple, j.Query)
	r := qt.Read(pkt, a)
	if r.Passes {
		g.Rest(qt)
	} else {
		g.drop(qt)
	}
	g.Mu.Unlock()
	g.wait(qt, r)
	if !r.Passes && (r.Held || r.Said.Verdict.Allowed()) {
		return j, nil, nil
	}
	return r.Said, r.Before, qt
}

// mayPass reports whether a packet of a verified flow may pass now: every connection in it was
// judged and is allowed. A packet that must wait is held. Packets that waited for it are sent
// before it.
func (u *udpForwarder) mayPass(fl *Flow, pkt *stack.PacketBuffer, a packet.Arrival) bool {
	long := false
	packet.EachDatagram(pkt, func(p []byte) bool { long = sniff.LongHeader(p); return !long })
	if !long {
		return true
	}
	qt, g := fl.quic, u.QUIC
	g.Mu.Lock()
	known := len(qt.said)
	r := qt.Read(pkt, a)
	more := len(qt.said) > known
	g.Mu.Unlock()
	g.wait(qt, r)
	if more && !fl.Also(r.Said) {
		DropHeld(r.Before)
		return false
	}
	for _, p := range r.Before {
		u.enqueue(fl, p.Pkt, p.a)
	}
	DropHeld(r.Before)
	if !r.Passes && !r.Held {
		u.n.refused.Add(1)
		g.refused(r.Said)
	}
	return r.Passes
}
