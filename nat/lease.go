package nat

import (
	"sync"
	"sync/atomic"
	"time"
)

// streamAfter is how long UDP traffic both ways must last to be a stream: ASSURED,
// with the longer timeout (nf_conntrack_proto_udp.c, stream_ts).
const streamAfter = int64(2 * time.Second)

// Lease is one flow's place in the table. Acquire returns it; Release gives it back.
//
// Account is the hot path. It adds to counters and stores the time atomically, and takes a lock
// only when a packet changes the flow's status (the first answer, UDP turning into a stream): at
// most twice in a flow's life.
type Lease struct {
	table *Table
	spec  Spec
	id    uint64
	began int64 // ns since Table.epoch

	status atomic.Uint32          // a status; written under mu, read anywhere
	seen   atomic.Int64           // ns since Table.epoch of the last packet
	sent   atomic.Int64           // likewise, of the last packet in the direction of Orig
	count  [2]counter             // by Dir
	budget atomic.Pointer[Budget] // may hold nil; written under Table.mu

	short atomic.Bool // Spec.Short, until Outlast

	mu     sync.Mutex // taken before Table.mu
	reply  Tuple
	reason Reason // why it ended
	ended  int64

	// Guarded by Table.mu.
	timer         timer
	before, after *Lease
	listed        listed
	halfOpen      bool // counted in Table.halfOpen
}

type counter struct{ packets, bytes atomic.Int64 }

// counters are sums over flows, by Dir.
type counters [2]struct{ packets, bytes int64 }

func (c *counters) add(l *Lease) {
	for d := range c {
		c[d].packets += l.count[d].packets.Load()
		c[d].bytes += l.count[d].bytes.Load()
	}
}

func (c counters) bytes() int64 { return c[Original].bytes + c[Reply].bytes }

func (l *Lease) load() status { return status(l.status.Load()) }

// Orig returns the tuple that the flow was acquired with.
func (l *Lease) Orig() Tuple { return l.spec.Orig }

// Owner returns Spec.Owner.
func (l *Lease) Owner() any { return l.spec.Owner }

// Rule returns the policy rule that admitted the flow.
func (l *Lease) Rule() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.spec.Rule
}

// Describe replaces the rule, names and About of Spec, for a flow that was judged again.
func (l *Lease) Describe(rule string, names []string, about any) {
	l.mu.Lock()
	l.spec.Rule, l.spec.Names, l.spec.About = rule, names, about
	l.mu.Unlock()
}

// Ended reports whether the flow is over.
func (l *Lease) Ended() bool { return l.load()&dead != 0 }

// evictable reports whether a new flow may evict this one when its status is s.
func (l *Lease) evictable(s status) bool {
	return s.evictable() || l.spec.Forwarded && s&assured == 0
}

// State returns the flow's state.
func (l *Lease) State() State { return l.load().state() }

// Account counts packets and their bytes as the kernel does: by the IP packet's total length. It
// restarts the idle timeout and applies nf_conntrack's rules for SEEN_REPLY and ASSURED. On a flow
// that has ended it does nothing.
func (l *Lease) Account(d Dir, packets, bytes int64) {
	t, s := l.table, l.load()
	if s&dead != 0 {
		return
	}
	c := &l.count[d&1]
	c.packets.Add(packets)
	c.bytes.Add(bytes)
	now := t.cached.Load()
	if now == 0 {
		now = t.clock()
	}
	if l.seen.Load() < now {
		l.seen.Store(now)
		if !t.busy.Load() {
			t.busy.Store(true)
		}
	}
	if d == Original && l.sent.Load() < now {
		l.sent.Store(now)
	}
	if t.budget.Load() > 0 {
		t.charge(bytes)
	}
	if b := l.budget.Load(); b != nil {
		b.charge(t, bytes)
	}
	if s&settled == 0 {
		l.observe(s, d, now)
	}
}

// charge charges the byte budget, and has Expire called once it is used up.
func (t *Table) charge(bytes int64) {
	budget, used := t.budget.Load(), t.used.Add(bytes)
	if used >= budget && used-bytes < budget {
		t.rouse()
	}
}

// observe applies the rules by which a packet changes a flow's status.
func (l *Lease) observe(s status, d Dir, now int64) {
	proto := l.spec.Orig.proto
	stream := proto == protoUDP && !l.short.Load() && s&seenReply != 0 && now-l.began > streamAfter
	if !stream && (d != Reply || s&seenReply != 0) {
		return
	}
	l.transition(func(s status) status {
		switch {
		case stream && s&assured == 0:
			return s.withState(Assured) | assured | settled
		case d == Reply && s&seenReply == 0:
			s |= seenReply
			if proto != protoTCP {
				s = s.withState(Replied)
			}
			if proto != protoUDP || l.short.Load() {
				s |= settled
			}
		}
		return s
	})
}

// Outlast ends Spec.Short: the flow carries more than one question and one answer.
func (l *Lease) Outlast() {
	l.short.Store(false)
	l.transition(func(s status) status { return s &^ settled })
}

// SetState moves a TCP flow. SYN_RECV and what follows it mean that the far side answered;
// ESTABLISHED makes the flow ASSURED. It restarts the timeout. It is ignored for other protocols,
// for states other than TCP's, and for ended flows.
func (l *Lease) SetState(to State) {
	if l.spec.Orig.proto != protoTCP || !to.tcp() {
		return
	}
	l.saw(l.table.clock())
	l.transition(func(s status) status {
		s = s.withState(to)
		switch to {
		case SynRecv, FinWait, CloseWait, LastAck, TimeWait:
			s |= seenReply | settled
		case Established:
			s |= seenReply | assured | settled
		}
		return s
	})
}

// saw restarts the timeout.
func (l *Lease) saw(now int64) { l.seen.Store(max(l.seen.Load(), now)) }

// transition changes the status and reports the change, if there is one.
func (l *Lease) transition(f func(status) status) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.load()
	next := f(s)
	if s&dead != 0 || next == s {
		return
	}
	l.status.Store(uint32(next))
	l.table.mu.Lock()
	l.table.place(l)
	l.table.mu.Unlock()
	l.table.emit(Update, l)
}

// SetReply records the tuple of the answers as the far side sends them: from the far address to the
// host's socket. Until then the reply tuple is Orig's Reverse.
func (l *Lease) SetReply(t Tuple) {
	l.mu.Lock()
	l.reply = t
	l.mu.Unlock()
}

// deadline returns when the flow ends if no packet comes.
func (l *Lease) deadline() int64 { return l.ends(l.State(), l.seen.Load(), l.sent.Load()) }

// ends returns the deadline of a flow in state s: seen is when its last packet came, sent when the
// last one in the direction of Orig did.
func (l *Lease) ends(s State, seen, sent int64) int64 {
	timeouts := l.table.timeouts.Load()
	end := seen + int64(timeouts.of(l.spec.Orig.proto, s, l.short.Load()))
	if l.spec.Orig.proto == protoUDP && !l.spec.Ingress {
		end = min(end, max(l.began, sent)+int64(timeouts.UDPInbound))
	}
	return end
}

// Release ends the flow: it repays its budgets and emits DESTROY, once. Later calls do nothing.
// Spec.Expire is not called.
func (l *Lease) Release(reason Reason) { l.end(l.table.clock(), reason, false, nil) }

// Kill ends the flow as a timeout would: it calls Spec.Expire, so that the owner of the sockets
// closes them. It reports whether the flow was alive.
func (l *Lease) Kill(reason Reason) bool { return l.end(l.table.clock(), reason, true, nil) }

// end is the only way out of the table. A condition, if given, is evaluated under the lock that
// orders transitions, so a flow that has just become ASSURED or seen a packet is not ended. tell
// means that the table ends the flow, not its owner.
func (l *Lease) end(now int64, reason Reason, tell bool, still func(s status, deadline int64) bool) bool {
	t := l.table
	l.mu.Lock()
	s := l.load()
	if s&dead != 0 || (still != nil && !still(s, l.deadline())) {
		l.mu.Unlock()
		return false
	}
	l.status.Store(uint32(s | dead | settled))
	l.reason, l.ended = s.recorded(reason), now
	t.mu.Lock()
	t.remove(l)
	t.stats.count(reason, tell)
	t.mu.Unlock()
	t.emit(Destroy, l)
	l.mu.Unlock()
	if tell && l.spec.Expire != nil {
		l.spec.Expire(reason)
	}
	return true
}

// recorded returns the reason for the flow's record. A connection that both sides have ended stays
// in the table for a while; that timeout is not why it ended.
func (s status) recorded(reason Reason) Reason {
	switch {
	case reason == ReasonTimeout && s.state() == TimeWait:
		return ReasonClosed
	case reason == ReasonTimeout && s.state() == Close:
		return ReasonReset
	}
	return reason
}

// Snapshot returns the flow as it is now.
func (l *Lease) Snapshot() Flow {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.snapshot()
}
