package datagram

// QUIC connections whose names are judged.
//
// A tuple may carry many connections, one after the other or at once, each with a name of its own;
// and a server identifies a connection by its ID, whatever tuple it comes on. So the gate
// remembers, for the whole sandbox, which tuple an ID belongs to: both the IDs that clients began
// with and those that servers chose. The gate ensures that
//
//   - all Initial packets of a datagram belong to one connection, and only its keys open them;
//   - an ID belongs to one tuple only;
//   - every byte received of a connection's hellos is kept, even if the connection is refused,
//     and must be the same whenever it is sent again;
//   - a datagram passes once the hellos are whole as far as its bytes reach, and allowed;
//   - anything that does not fit is refused. No state that a server may still hold is forgotten
//     to make room.
//
// A connection is remembered as long as its tuple has a flow, and QUICLinger longer. Datagrams with
// short headers do not tell their connection; they pass as long as every hello on their tuple is
// allowed.

import (
	"container/list"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

const (
	// maxQUICConns bounds the remembered connections, and MaxTupleConns those of one tuple.
	maxQUICConns  = 4096
	MaxTupleConns = 256
	// maxQUICBytes bounds the remembered bytes of their hellos.
	maxQUICBytes = 8 << 20
	// maxTupleNames bounds the names of one tuple's connections: each is judged again when rules
	// change.
	maxTupleNames = 64
	// maxTupleIDs bounds the IDs of one tuple; most connections have two.
	maxTupleIDs = 4 * MaxTupleConns
	// QUICLinger is how long the connections of a tuple without a flow are remembered. By then a
	// server has given up a connection that it has heard nothing of.
	QUICLinger = 2 * time.Minute
	// QUICQuiet is how long a connection in a flow must have sent no Initial packet before it makes
	// room for another one. No server waits that long for the rest of a hello.
	QUICQuiet = 10 * time.Minute
	// minSharedID is the least length of an ID that no two tuples have by chance.
	minSharedID = 4
)

// QUICGate holds the QUIC state of one sandbox.
type QUICGate struct {
	admission                *admit.Gate
	List                     *firstbytes.List // of tuples that hold packets
	malformed, full, foreign *atomic.Uint64

	Mu     sync.Mutex
	Tuples map[nat.Tuple]*QUICTuple
	Owners map[string]*QUICTuple // by connection ID
	Idle   list.List             // of *QUICTuple without a flow, by until
	Conns  int
	Bytes  int // of hellos
	closed bool
}

func NewQUICGate(gate *admit.Gate, s *count.Set, timer *engine.Need) *QUICGate {
	return &QUICGate{
		admission: gate, List: firstbytes.NewList(s, timer, gate.Now, "udp"), Tuples: make(map[nat.Tuple]*QUICTuple), Owners: make(map[string]*QUICTuple),
		malformed: s.Counter("udp_first_bytes_malformed"), // includes packets of no known connection
		full:      s.Counter("udp_quic_full"),             // no room for another connection, name, ID or packet
		foreign:   s.Counter("udp_quic_foreign"),          // an ID, or keys, of another connection
	}
}

// QUICTuple holds one tuple's connections.
type QUICTuple struct {
	gate  *QUICGate
	tuple nat.Tuple
	query policy.Query     // of the tuple, with nothing seen
	entry firstbytes.Entry // while packets are held

	// Guarded by gate.mu.
	Flow  *Flow // nil: none, and the tuple is in gate.idle
	Conns []*quicConn
	Ids   map[string]*quicConn // nil: the server chose it, for an unknown connection
	said  []admit.Judged       // allowed hellos of the connections
	rules *policy.Rules        // by which all of it was last judged
	Held  []heldPacket
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

// TupleOf finds or makes a tuple's entry. mu is held.
func (g *QUICGate) TupleOf(tuple nat.Tuple, q policy.Query) *QUICTuple {
	if qt := g.Tuples[tuple]; qt != nil {
		return qt
	}
	qt := &QUICTuple{gate: g, tuple: tuple, query: q, Ids: make(map[string]*quicConn)}
	g.Tuples[tuple] = qt
	g.Rest(qt)
	return qt
}

// Rest schedules a tuple without a flow to be forgotten. mu is held.
func (g *QUICGate) Rest(qt *QUICTuple) {
	if qt.place != nil {
		g.Idle.Remove(qt.place)
	}
	qt.until = g.admission.Now().Add(QUICLinger)
	qt.place = g.Idle.PushBack(qt)
}

// Sweep forgets the tuples whose time is up. mu is held.
func (g *QUICGate) Sweep(now time.Time) {
	for at := g.Idle.Front(); at != nil; at = g.Idle.Front() {
		qt := at.Value.(*QUICTuple)
		if !now.After(qt.until) {
			return
		}
		g.forget(qt)
	}
}

// drop forgets a tuple with nothing to remember. mu is held.
func (g *QUICGate) drop(qt *QUICTuple) {
	if qt.Flow == nil && len(qt.Conns) == 0 && len(qt.Held) == 0 {
		g.forget(qt)
	}
}

// forget forgets a tuple without a flow. mu is held.
func (g *QUICGate) forget(qt *QUICTuple) {
	if qt.place != nil {
		g.Idle.Remove(qt.place)
		qt.place = nil
	}
	if g.Tuples[qt.tuple] == qt {
		delete(g.Tuples, qt.tuple)
	}
	DropHeld(qt.takeHeld())
	for id := range qt.Ids {
		g.disown(id, qt)
	}
	for _, c := range qt.Conns {
		g.Conns, g.Bytes = g.Conns-1, g.Bytes-c.Size()
	}
	qt.Conns, qt.said = nil, nil
}

func (g *QUICGate) disown(id string, qt *QUICTuple) {
	delete(qt.Ids, id)
	if g.Owners[id] == qt {
		delete(g.Owners, id)
	}
}

// own records an ID as qt's. It fails if the ID is another tuple's, or there are too many. mu is
// held.
func (g *QUICGate) own(id string, qt *QUICTuple, c *quicConn) bool {
	if _, known := qt.Ids[id]; known && c == nil {
		return true
	}
	if len(qt.Ids) >= maxTupleIDs {
		g.full.Add(1)
		return false
	}
	if len(id) >= minSharedID {
		if other := g.Owners[id]; other != nil && other != qt {
			g.foreign.Add(1)
			return false
		}
		g.Owners[id] = qt
	}
	qt.Ids[id] = c
	return true
}

// attach notes that qt has a flow, and detach that it no longer has one.
func (qt *QUICTuple) attach(fl *Flow) {
	g := qt.gate
	g.Mu.Lock()
	defer g.Mu.Unlock()
	qt.Flow = fl
	if qt.place != nil {
		g.Idle.Remove(qt.place)
		qt.place = nil
	}
}

func (qt *QUICTuple) detach(fl *Flow) {
	g := qt.gate
	g.Mu.Lock()
	defer g.Mu.Unlock()
	if g.Tuples[qt.tuple] == qt && (qt.Flow == fl || qt.Flow == nil) {
		qt.Flow = nil
		g.Rest(qt)
		g.drop(qt)
	}
}

// Answered reads a packet from the server, for the IDs that it chose. It reports whether the packet
// may reach the client; it may not if there are too many IDs.
func (qt *QUICTuple) Answered(data []byte, segment int) bool {
	if segment <= 0 {
		segment = len(data)
	}
	ok := true
	for ; len(data) > 0 && ok; data = data[min(segment, len(data)):] {
		if p := data[:min(segment, len(data))]; sniff.LongHeader(p) {
			qt.gate.Mu.Lock()
			sniff.SourceIDs(p, func(id []byte) { ok = ok && qt.gate.own(string(id), qt, nil) })
			qt.gate.Mu.Unlock()
		}
	}
	return ok
}

// needs reads the datagrams of a packet. It returns what the packet waits for, and whether it is
// worth waiting. mu is held.
func (qt *QUICTuple) needs(p []byte, now time.Time) (n awaited, ok bool) {
	d, err := sniff.Split(p)
	if err != nil {
		return n, false
	}
	if !d.Initial() {
		// A handshake packet is of no use to a server that has read no hello; early data may be
		// kept until there is one.
		n.conn = qt.Ids[string(d.ID)]
		return n, n.conn != nil || !d.Early && len(qt.said) > 0
	}
	c, opened := qt.find(&d, now)
	if c == nil {
		return n, false
	}
	c.last = now
	if qt.gate.Bytes >= maxQUICBytes {
		qt.gate.full.Add(1)
		return n, false
	}
	before := c.Size()
	end, err := c.Add(opened)
	qt.gate.Bytes += c.Size() - before
	return awaited{c, end}, err == nil
}

// find returns the connection of a datagram with Initial packets, which may begin with it, and the
// packets' contents. A server looks for the ID first. The keys follow from the ID, unless the
// server chose it. mu is held.
func (qt *QUICTuple) find(d *sniff.Datagram, now time.Time) (*quicConn, sniff.Opened) {
	g, id := qt.gate, string(d.ID)
	if other := g.Owners[id]; other != nil && other != qt {
		g.foreign.Add(1)
		return nil, sniff.Opened{}
	}
	c, known := qt.Ids[id]
	own := c
	if c == nil || c.id != id {
		own = &quicConn{Initial: sniff.NewInitial(d.ID), id: id}
	}
	var found *quicConn
	var opened sniff.Opened
	candidates := append(make([]*quicConn, 0, len(qt.Conns)+1), qt.Conns...)
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
		// The client's ID with another connection's keys, or the server's ID with keys that no
		// server would try.
		g.foreign.Add(1)
		return nil, sniff.Opened{}
	case known && found != own:
		qt.Ids[id] = found
	case found != own:
		// The server chose this ID later and sent it encrypted, when it had the whole hello. To a
		// server that does not know it, the packet is noise.
		if !g.own(id, qt, found) {
			return nil, sniff.Opened{}
		}
	case !known:
		if !g.room(qt, now) || !g.own(id, qt, own) {
			return nil, sniff.Opened{}
		}
		qt.Conns = append(qt.Conns, own)
		g.Conns++
	}
	return found, opened
}

// room reports whether another connection may be added. mu is held.
func (g *QUICGate) room(qt *QUICTuple, now time.Time) bool {
	g.Sweep(now)
	if len(qt.Conns) >= MaxTupleConns || len(qt.Ids) >= maxTupleIDs {
		qt.retire(now)
	}
	if len(qt.Conns) < MaxTupleConns && g.Conns < maxQUICConns && g.Bytes < maxQUICBytes {
		return true
	}
	g.full.Add(1)
	return false
}

// retire forgets the connections that have been quiet for long.
func (qt *QUICTuple) retire(now time.Time) {
	g := qt.gate
	qt.Conns = slices.DeleteFunc(qt.Conns, func(c *quicConn) bool {
		if now.Sub(c.last) < QUICQuiet {
			return false
		}
		for id, of := range qt.Ids {
			if of == c {
				g.disown(id, qt)
			}
		}
		g.Conns, g.Bytes = g.Conns-1, g.Bytes-c.Size()
		return true
	})
}

// settle judges a connection if its hello is whole. A refused connection is judged again: the rules
// may have changed. It reports whether the connection may go on as far as n says, or must wait for
// more; if neither, it returns the reason. mu is held.
func (qt *QUICTuple) settle(n awaited) (allowed, waits bool, why admit.Judged) {
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
		why = qt.ask(firstbytes.SeenOf(c.Said()))
		if !why.Verdict.Allowed() {
			return false, false, why
		}
		if c.allowed = qt.note(why); !c.allowed {
			return false, false, qt.unread()
		}
	}
	whole := c.Whole() >= n.end
	return whole, !whole, why
}

// note adds a connection's hello, if it fits the flow: the bytes of a tuple's connections cannot be
// told apart. mu is held.
func (qt *QUICTuple) note(j admit.Judged) bool {
	if i := slices.IndexFunc(qt.said, func(o admit.Judged) bool { return o.Query.Seen == j.Query.Seen }); i >= 0 {
		return true
	}
	if len(qt.said) > 0 && !qt.gate.admission.Together(&j, &qt.said[0]) {
		return false
	}
	if len(qt.said) >= maxTupleNames {
		qt.gate.full.Add(1)
		return false
	}
	if qt.said = append(qt.said, j); len(qt.said) == 1 {
		qt.rules = j.Rules
	}
	return true
}

func (qt *QUICTuple) ask(seen policy.Seen) admit.Judged {
	q := qt.query
	q.Seen = seen
	j := qt.gate.admission.Decide(q)
	j.Query.Held = j.Verdict.Name()
	return j
}

// unread is the verdict on QUIC that could not be read.
func (qt *QUICTuple) unread() admit.Judged {
	qt.gate.malformed.Add(1)
	return qt.ask(policy.Seen{Kind: policy.SeenQUIC, Flaw: policy.ReasonMalformed})
}

// recheck judges every hello of the tuple's connections again, if the rules have changed. It
// reports whether all of them may go on, as one flow; if not, it returns one that may not. mu is
// held.
func (qt *QUICTuple) recheck() (refused admit.Judged, ok bool) {
	a := qt.gate.admission
	if len(qt.said) == 0 || qt.Flow != nil && a.Rules.Load() == qt.rules {
		return refused, true
	}
	for i := range qt.said {
		j := &qt.said[i]
		*j = a.Decide(j.Query)
		if !a.Together(j, &qt.said[0]) {
			return *j, false
		}
		qt.rules = j.Rules
	}
	return refused, true
}

// questions returns the queries for every allowed hello of the tuple's connections.
func (qt *QUICTuple) questions() []policy.Query {
	qt.gate.Mu.Lock()
	defer qt.gate.Mu.Unlock()
	all := make([]policy.Query, len(qt.said))
	for i := range qt.said {
		all[i] = qt.said[i].Query
	}
	return all
}
