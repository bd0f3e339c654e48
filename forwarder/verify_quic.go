package forwarder

// QUIC connections whose names are judged.
//
// A tuple may carry many connections, one after the other or at once, each of which says a
// name of its own; and a server knows a connection by its ID, whatever tuple it comes by. So
// the gate remembers, for the whole sandbox, which tuple an ID belongs to: those that clients
// began with, and those that servers chose. The gate holds that
//
//   - a datagram's Initial packets are one connection's, and opened by its keys and no other's;
//   - an ID of one tuple's is no other tuple's;
//   - every byte of a connection's hellos that was said stays, also of one that was refused,
//     and is the same whenever it is said again;
//   - a datagram passes once the hellos are whole as far as its bytes go, and allowed;
//   - what does not fit is refused. Nothing is forgotten to make room for it that a server may
//     have kept.
//
// A connection is remembered as long as its tuple has a flow, and quicLinger longer. Datagrams
// with short headers say nothing of whose they are; they pass as long as all that their
// tuple's connections said is allowed.

import (
	"container/list"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sluice/forwarder/sniff"
	"sluice/nat"
	"sluice/policy"
)

const (
	// maxQUICConns bounds the connections that are remembered, and maxTupleConns those of
	// one tuple.
	maxQUICConns  = 4096
	maxTupleConns = 256
	// maxQUICBytes bounds what is remembered of their hellos.
	maxQUICBytes = 8 << 20
	// maxTupleNames bounds what the connections of one tuple may say: each is asked again
	// when rules change.
	maxTupleNames = 64
	// maxTupleIDs bounds the IDs of one tuple, of which most connections have two.
	maxTupleIDs = 4 * maxTupleConns
	// quicLinger is how long the connections of a tuple without a flow are remembered: a
	// server has given up those of which it has heard nothing for so long.
	quicLinger = 2 * time.Minute
	// quicQuiet is how long a connection in a flow has sent no Initial packet when it makes
	// room for another one. No server waits that long for the rest of a hello.
	quicQuiet = 10 * time.Minute
	// minSharedID is how long an ID is that no two tuples have by chance.
	minSharedID = 4
)

// quicGate is the QUIC of one sandbox.
type quicGate struct {
	admission                *admission
	list                     *checkList // of tuples that hold packets
	malformed, full, foreign *atomic.Uint64

	mu     sync.Mutex
	tuples map[nat.Tuple]*quicTuple
	owners map[string]*quicTuple // by connection ID
	idle   list.List             // of *quicTuple without a flow, by until
	conns  int
	bytes  int // of hellos
	closed bool
}

func newQUICGate(gate *admission, s *stats, timer *need) *quicGate {
	return &quicGate{
		admission: gate, list: newCheckList(s, timer, gate.now, "udp"), tuples: make(map[nat.Tuple]*quicTuple), owners: make(map[string]*quicTuple),
		malformed: s.counter("udp_first_bytes_malformed"), // includes what is no connection's
		full:      s.counter("udp_quic_full"),             // no room for another connection, name, ID or packet
		foreign:   s.counter("udp_quic_foreign"),          // an ID, or keys, of another connection
	}
}

// quicTuple is one tuple's connections.
type quicTuple struct {
	gate  *quicGate
	tuple nat.Tuple
	query policy.Query // of the tuple, with nothing seen
	entry checkEntry   // while packets are held

	// Guarded by gate.mu.
	flow  *dgramFlow // nil: none, and the tuple is in gate.idle
	conns []*quicConn
	ids   map[string]*quicConn // nil: the server chose it, for which connection is not known
	said  []judged             // what the connections said that were allowed
	rules *policy.Rules        // by which all of it was judged last
	held  []heldPacket
	size  int // of held
	until time.Time
	place *list.Element // in gate.idle
}

// quicConn is one connection.
type quicConn struct {
	*sniff.Initial
	id      string // the client's first
	allowed bool
	last    time.Time // an Initial packet came
}

// awaited is a connection that a packet waits for, and how much of its hellos must be whole.
type awaited struct {
	conn *quicConn
	end  int
}

// tupleOf finds or makes a tuple's entry. mu is held.
func (g *quicGate) tupleOf(tuple nat.Tuple, q policy.Query) *quicTuple {
	if qt := g.tuples[tuple]; qt != nil {
		return qt
	}
	qt := &quicTuple{gate: g, tuple: tuple, query: q, ids: make(map[string]*quicConn)}
	g.tuples[tuple] = qt
	g.rest(qt)
	return qt
}

// rest has a tuple without a flow forgotten later. mu is held.
func (g *quicGate) rest(qt *quicTuple) {
	if qt.place != nil {
		g.idle.Remove(qt.place)
	}
	qt.until = g.admission.now().Add(quicLinger)
	qt.place = g.idle.PushBack(qt)
}

// sweep forgets the tuples whose time is over. mu is held.
func (g *quicGate) sweep(now time.Time) {
	for at := g.idle.Front(); at != nil; at = g.idle.Front() {
		qt := at.Value.(*quicTuple)
		if !now.After(qt.until) {
			return
		}
		g.forget(qt)
	}
}

// drop forgets a tuple of which there is nothing to remember. mu is held.
func (g *quicGate) drop(qt *quicTuple) {
	if qt.flow == nil && len(qt.conns) == 0 && len(qt.held) == 0 {
		g.forget(qt)
	}
}

// forget forgets a tuple without a flow. mu is held.
func (g *quicGate) forget(qt *quicTuple) {
	if qt.place != nil {
		g.idle.Remove(qt.place)
		qt.place = nil
	}
	if g.tuples[qt.tuple] == qt {
		delete(g.tuples, qt.tuple)
	}
	dropHeld(qt.takeHeld())
	for id := range qt.ids {
		g.disown(id, qt)
	}
	for _, c := range qt.conns {
		g.conns, g.bytes = g.conns-1, g.bytes-c.Size()
	}
	qt.conns, qt.said = nil, nil
}

func (g *quicGate) disown(id string, qt *quicTuple) {
	delete(qt.ids, id)
	if g.owners[id] == qt {
		delete(g.owners, id)
	}
}

// own notes an ID of qt's. It fails if it is another tuple's, or there are too many. mu is held.
func (g *quicGate) own(id string, qt *quicTuple, c *quicConn) bool {
	if _, known := qt.ids[id]; known && c == nil {
		return true
	}
	if len(qt.ids) >= maxTupleIDs {
		g.full.Add(1)
		return false
	}
	if len(id) >= minSharedID {
		if other := g.owners[id]; other != nil && other != qt {
			g.foreign.Add(1)
			return false
		}
		g.owners[id] = qt
	}
	qt.ids[id] = c
	return true
}

// attach says that qt has a flow, detach that it has none any more.
func (qt *quicTuple) attach(fl *dgramFlow) {
	g := qt.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	qt.flow = fl
	if qt.place != nil {
		g.idle.Remove(qt.place)
		qt.place = nil
	}
}

func (qt *quicTuple) detach(fl *dgramFlow) {
	g := qt.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.tuples[qt.tuple] == qt && (qt.flow == fl || qt.flow == nil) {
		qt.flow = nil
		g.rest(qt)
		g.drop(qt)
	}
}

// answered reads a packet of the server's, for the IDs that it chose. It reports whether the
// packet may reach the client, which is not so if there are too many.
func (qt *quicTuple) answered(data []byte, segment int) bool {
	if segment <= 0 {
		segment = len(data)
	}
	ok := true
	for ; len(data) > 0 && ok; data = data[min(segment, len(data)):] {
		if p := data[:min(segment, len(data))]; sniff.LongHeader(p) {
			qt.gate.mu.Lock()
			sniff.SourceIDs(p, func(id []byte) { ok = ok && qt.gate.own(string(id), qt, nil) })
			qt.gate.mu.Unlock()
		}
	}
	return ok
}

// needs reads the datagrams of a packet: what it waits for, and whether it is worth waiting.
// mu is held.
func (qt *quicTuple) needs(p []byte, now time.Time) (n awaited, ok bool) {
	d, err := sniff.Split(p)
	if err != nil {
		return n, false
	}
	if !d.Initial() {
		// A packet of a handshake is of no use to a server that has read no hello; early
		// data may be kept until there is one.
		n.conn = qt.ids[string(d.ID)]
		return n, n.conn != nil || !d.Early && len(qt.said) > 0
	}
	c, opened := qt.find(&d, now)
	if c == nil {
		return n, false
	}
	c.last = now
	if qt.gate.bytes >= maxQUICBytes {
		qt.gate.full.Add(1)
		return n, false
	}
	before := c.Size()
	end, err := c.Add(opened)
	qt.gate.bytes += c.Size() - before
	return awaited{c, end}, err == nil
}

// find returns the connection of a datagram with Initial packets, which may begin with it,
// and what they carry. A server looks for the ID first. Only of an ID that it chose itself do
// the keys not follow. mu is held.
func (qt *quicTuple) find(d *sniff.Datagram, now time.Time) (*quicConn, sniff.Opened) {
	g, id := qt.gate, string(d.ID)
	if other := g.owners[id]; other != nil && other != qt {
		g.foreign.Add(1)
		return nil, sniff.Opened{}
	}
	c, known := qt.ids[id]
	own := c
	if c == nil || c.id != id {
		own = &quicConn{Initial: sniff.NewInitial(d.ID), id: id}
	}
	var found *quicConn
	var opened sniff.Opened
	candidates := append(make([]*quicConn, 0, len(qt.conns)+1), qt.conns...)
	if own != c {
		candidates = append(candidates, own)
	}
	for _, c := range candidates {
		o := c.Open(d)
		if !o.Any() {
			continue
		}
		if found != nil {
			g.foreign.Add(1)
			return nil, sniff.Opened{}
		}
		found, opened = c, o
	}
	switch {
	case found == nil || !opened.Whole():
		return nil, sniff.Opened{}
	case own == c && found != own, known && own != c && found == own:
		// The client's choice by another connection's keys, or the server's by keys that no
		// server would try.
		g.foreign.Add(1)
		return nil, sniff.Opened{}
	case known && found != own:
		qt.ids[id] = found
	case found != own:
		// An ID that the server chose later and told under encryption, when it had the whole
		// hello. To a server that does not know it, the packet is noise.
		if !g.own(id, qt, found) {
			return nil, sniff.Opened{}
		}
	case !known:
		if !g.room(qt, now) || !g.own(id, qt, own) {
			return nil, sniff.Opened{}
		}
		qt.conns = append(qt.conns, own)
		g.conns++
	}
	return found, opened
}

// room reports whether there may be another connection. mu is held.
func (g *quicGate) room(qt *quicTuple, now time.Time) bool {
	g.sweep(now)
	if len(qt.conns) >= maxTupleConns || len(qt.ids) >= maxTupleIDs {
		qt.retire(now)
	}
	if len(qt.conns) < maxTupleConns && g.conns < maxQUICConns && g.bytes < maxQUICBytes {
		return true
	}
	g.full.Add(1)
	return false
}

// retire forgets the connections that have been quiet for long.
func (qt *quicTuple) retire(now time.Time) {
	g := qt.gate
	qt.conns = slices.DeleteFunc(qt.conns, func(c *quicConn) bool {
		if now.Sub(c.last) < quicQuiet {
			return false
		}
		for id, of := range qt.ids {
			if of == c {
				g.disown(id, qt)
			}
		}
		g.conns, g.bytes = g.conns-1, g.bytes-c.Size()
		return true
	})
}

// settle judges a connection if its hello is whole. One that was refused is asked about
// again: the rules may have changed. It reports whether the connection may go on as far as n
// says, or has to wait for more; if neither, why not. mu is held.
func (qt *quicTuple) settle(n awaited) (allowed, waits bool, why judged) {
	c := n.conn
	switch {
	case c == nil:
		return true, false, why
	case c.Err() != nil:
		return false, false, qt.unread()
	case c.Said().Kind == sniff.None:
		return false, true, why
	}
	if !c.allowed {
		why = qt.ask(seenOf(c.Said()))
		if !why.verdict.Allowed() {
			return false, false, why
		}
		if c.allowed = qt.note(why); !c.allowed {
			return false, false, qt.unread()
		}
	}
	whole := c.Whole() >= n.end
	return whole, !whole, why
}

// note adds what a connection said, if it fits the flow: the bytes of a tuple's connections
// cannot be told apart. mu is held.
func (qt *quicTuple) note(j judged) bool {
	if i := slices.IndexFunc(qt.said, func(o judged) bool { return o.query.Seen == j.query.Seen }); i >= 0 {
		return true
	}
	if len(qt.said) > 0 && !qt.gate.admission.together(&j, &qt.said[0]) {
		return false
	}
	if len(qt.said) >= maxTupleNames {
		qt.gate.full.Add(1)
		return false
	}
	if qt.said = append(qt.said, j); len(qt.said) == 1 {
		qt.rules = j.rules
	}
	return true
}

func (qt *quicTuple) ask(seen policy.Seen) judged {
	q := qt.query
	q.Seen = seen
	j := qt.gate.admission.decide(q)
	j.query.Held = j.verdict.Name()
	return j
}

// unread is what becomes of QUIC that could not be read.
func (qt *quicTuple) unread() judged {
	qt.gate.malformed.Add(1)
	return qt.ask(policy.Seen{Kind: policy.SeenQUIC, Flaw: policy.ReasonMalformed})
}

// recheck asks again about everything that the tuple's connections said, if the rules are
// others by now. It reports whether all of it may go on, as one flow; if not, what may not.
// mu is held.
func (qt *quicTuple) recheck() (refused judged, ok bool) {
	a := qt.gate.admission
	if len(qt.said) == 0 || qt.flow != nil && a.rules.Load() == qt.rules {
		return refused, true
	}
	for i := range qt.said {
		j := &qt.said[i]
		*j = a.decide(j.query)
		if !a.together(j, &qt.said[0]) {
			return *j, false
		}
		qt.rules = j.rules
	}
	return refused, true
}

// questions are those about all that the tuple's connections said and that was allowed.
func (qt *quicTuple) questions() []policy.Query {
	qt.gate.mu.Lock()
	defer qt.gate.mu.Unlock()
	all := make([]policy.Query, len(qt.said))
	for i := range qt.said {
		all[i] = qt.said[i].query
	}
	return all
}
