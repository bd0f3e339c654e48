package forwarder

// Verification of QUIC.
//
// The datagrams of a tuple whose verdict asks for the first bytes are held here, before
// there is a flow, a lease or a socket, until the ClientHello in them is whole; then
// the flow begins with them, in the order in which they came. What is no QUIC says no
// name, and is judged as that at once.

import (
	"slices"
	"sync"
	"sync/atomic"

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

// heldTuples are the tuples whose first bytes are not whole.
type heldTuples struct {
	f         *Forwarder
	list      *checkList
	malformed *atomic.Uint64

	mu     sync.Mutex
	tuples map[nat.Tuple]*heldTuple
	closed bool
}

func newHeldTuples(f *Forwarder) *heldTuples {
	return &heldTuples{
		f: f, list: newCheckList(f, "udp"), tuples: make(map[nat.Tuple]*heldTuple),
		malformed: f.stats.counter("udp_first_bytes_malformed"),
	}
}

// heldTuple is one of them.
type heldTuple struct {
	held  *heldTuples
	tuple nat.Tuple
	query policy.Query
	entry checkEntry

	// Guarded by udpForwarder.openMu.
	initial sniff.Initial
	// Guarded by held.mu.
	packets []heldPacket
	bytes   int
}

type heldPacket struct {
	pkt *stack.PacketBuffer // a reference of its own
	a   arrival
}

// checkExpired drops what is held: nobody says the rest.
func (h *heldTuple) checkExpired(bool) {
	packets := h.held.take(h.tuple, h)
	for i := range packets {
		packets[i].pkt.DecRef()
	}
	if len(packets) == 0 {
		return // it was decided meanwhile
	}
	f := h.held.f
	q := h.query
	q.Seen = policy.Seen{Kind: policy.SeenOpaque}
	if v := f.judge(f.rules.Load(), q); !v.Allowed() {
		f.noteRefused(Refusal{Proto: protoUDP, Src: q.Src, Dst: q.Dst, Verdict: v, Seen: q.Seen})
	}
}

// take ends the holding of a tuple, by h if that is not nil, and returns what was held.
func (ht *heldTuples) take(tuple nat.Tuple, h *heldTuple) []heldPacket {
	ht.mu.Lock()
	defer ht.mu.Unlock()
	now := ht.tuples[tuple]
	if now == nil || h != nil && now != h {
		return nil
	}
	delete(ht.tuples, tuple)
	packets := now.packets
	now.packets = nil
	return packets
}

// keep holds a packet of h, which is not in the table yet if it is the first. It fails
// if there are too many, or h was given up meanwhile.
func (ht *heldTuples) keep(h *heldTuple, first bool, pkt *stack.PacketBuffer, a arrival) bool {
	ht.mu.Lock()
	defer ht.mu.Unlock()
	h.bytes += pkt.Data().Size()
	if ht.closed || !first && ht.tuples[h.tuple] != h || h.bytes > maxHeldBytes || len(h.packets) == maxHeldPackets {
		return false
	}
	h.packets = append(h.packets, heldPacket{pkt.IncRef(), a})
	ht.tuples[h.tuple] = h
	return true
}

// close drops everything that is held.
func (ht *heldTuples) close() {
	ht.mu.Lock()
	ht.closed = true
	var all []*heldTuple
	for _, h := range ht.tuples {
		all = append(all, h)
	}
	ht.mu.Unlock()
	for _, h := range all {
		ht.list.leave(&h.entry)
		for _, p := range ht.take(h.tuple, h) {
			p.pkt.DecRef()
		}
	}
}

// verify reads a datagram of a tuple that has no flow yet, and has what it says judged.
// The answer that it returns is final, with the packets that came before, whose
// references are the caller's; or pkt is held, and the answer is j, which waits. openMu is held.
func (u *udpForwarder) verify(tuple nat.Tuple, j judged, a arrival, pkt *stack.PacketBuffer) (judged, []heldPacket, *quicFlow) {
	q := j.query
	ht := u.held
	ht.mu.Lock()
	h := ht.tuples[tuple]
	ht.mu.Unlock()
	first := h == nil
	if first {
		h = &heldTuple{held: ht, tuple: tuple, query: q}
	}
	said, err := readInitials(&h.initial, pkt)
	if err == nil && said.Kind == sniff.None {
		if ht.keep(h, first, pkt, a) {
			if first {
				ht.list.enter(&h.entry, h, checkTimeout)
			}
			return j, nil, nil
		}
		err = sniff.ErrTooLong
	}
	q.Seen = seenOf(said)
	if err != nil {
		ht.malformed.Add(1)
		q.Seen = policy.Seen{Kind: policy.SeenQUIC}
	}
	ht.list.leave(&h.entry)
	packets := ht.take(tuple, h)
	var conns *quicFlow
	if q.Seen.Kind == policy.SeenQUIC {
		conns = &quicFlow{known: []*sniff.Initial{&h.initial}}
	}
	return u.f.decide(q), packets, conns
}

// quicFlow is the connections of a verified flow. One tuple may carry several, one after
// the other or at once, and each says a name of its own.
type quicFlow struct {
	mu    sync.Mutex
	known []*sniff.Initial // verified
	fresh []*sniff.Initial // their ClientHello is not whole yet
}

// maxConnections bounds the connections of one tuple; the oldest are forgotten.
const maxConnections = 8

// mayPass tells whether a packet of a verified flow may pass: it begins no connection to a
// name that is not allowed. What comes before a ClientHello is whole passes, as no server can
// do anything with it.
func (u *udpForwarder) mayPass(fl *dgramFlow, pkt *stack.PacketBuffer) bool {
	ok := true
	eachDatagram(pkt, func(p []byte) bool {
		ok = !sniff.MayBegin(p) || u.connection(fl, p)
		return ok
	})
	return ok
}

// connection judges the connection that a datagram begins, or goes on with.
func (u *udpForwarder) connection(fl *dgramFlow, p []byte) bool {
	c := fl.quic
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, q := range c.known {
		if q.Continues(p) {
			return true
		}
	}
	at := slices.IndexFunc(c.fresh, func(q *sniff.Initial) bool { return q.SameID(p) })
	q := new(sniff.Initial)
	if at >= 0 {
		q = c.fresh[at]
		c.fresh = slices.Delete(c.fresh, at, at+1)
	}
	said, err := q.Add(p)
	switch {
	case err != nil || said.Kind == sniff.Opaque:
		u.held.malformed.Add(1)
		return false
	case said.Kind == sniff.None:
		c.fresh = bounded(append(c.fresh, q))
		return true
	}
	query := fl.question()
	query.Seen = seenOf(said)
	v := u.f.judge(u.f.rules.Load(), query)
	if !v.Allowed() || v.Target() != fl.target {
		u.n.refused.Add(1)
		u.f.noteRefused(Refusal{Proto: protoUDP, Src: query.Src, Dst: query.Dst, Verdict: v, Seen: query.Seen})
		return false
	}
	c.known = bounded(append(c.known, q))
	return true
}

func bounded(list []*sniff.Initial) []*sniff.Initial {
	if len(list) > maxConnections {
		list = slices.Delete(list, 0, 1)
	}
	return list
}

// readInitials gives the datagrams of a packet, which may be a train, to initial.
func readInitials(initial *sniff.Initial, pkt *stack.PacketBuffer) (said sniff.Seen, err error) {
	said.Kind = sniff.Opaque // an empty datagram
	eachDatagram(pkt, func(p []byte) bool {
		said, err = initial.Add(p)
		return err == nil && said.Kind == sniff.None
	})
	return said, err
}

// eachDatagram yields the datagrams of a packet, until one is enough.
func eachDatagram(pkt *stack.PacketBuffer, yield func([]byte) bool) {
	v := pkt.Data().AsRange().ToView()
	if v == nil {
		return
	}
	defer v.Release()
	data := v.AsSlice()
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
