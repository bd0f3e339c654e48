package inbound

// Bandwidth of the inbound path. A proxied connection is slowed down by not reading from it;
// forwarded packets have no socket to stop reading from, and a TCP whose packets are dropped at the
// limit gets only a fraction of it. So packets wait here in order, in a queue of queueSpan, as in a
// token bucket filter (tc-tbf(8)). Packets that do not fit are dropped and counted.
//
// A rule with bandwidth of its own has queues of its own before the sandbox's, so that its packets
// delay no others:
//
//	flow of a limited rule ──► the rule's queue ──┐
//	flow of any other rule ───────────────────────┴─► the sandbox's queue ──► link

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
)

const (
	// queueSpan bounds the waiting traffic, as time at the limit's rate.
	queueSpan = 100 * time.Millisecond
	// queueMin is the smallest queue: two large segments.
	queueMin = 128 << 10
)

// shaper is one direction's queue.
type shaper struct {
	o      *Path
	bucket *admit.Bucket
	next   *shaper // of a rule's queue: the sandbox's
	to     *outlet // without next

	Waits atomic.Int32 // packets in the queue: none is overtaken when a limit goes

	mu     sync.Mutex
	queue  []*stack.PacketBuffer // ready to be written; the oldest at first
	first  int
	bytes  int
	timer  *time.Timer // runs while there is a queue
	closed bool
}

// send writes a packet of size bytes now or later, and reports whether it does. It owns pkt.
func (s *shaper) send(pkt *stack.PacketBuffer, size int) bool {
	if !s.bucket.Limited() && s.Waits.Load() == 0 {
		return s.write(pkt, size)
	}
	s.mu.Lock()
	if s.first == len(s.queue) && s.bucket.Admit(size, s.o.Gate.Now()) {
		s.mu.Unlock()
		return s.write(pkt, size)
	}
	room := max(int(float64(s.bucket.Rate.Load())*queueSpan.Seconds()), queueMin)
	if s.closed || s.bytes+size > room {
		s.mu.Unlock()
		pkt.DecRef()
		return false
	}
	s.queue = append(s.queue, pkt)
	s.bytes += size
	s.Waits.Add(1)
	if s.timer == nil {
		s.timer = time.AfterFunc(admit.RefillEvery, s.drain)
	}
	s.mu.Unlock()
	return true
}

// drain writes the packets that may be written now, and runs again while any are left.
func (s *shaper) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	if s.closed {
		return
	}
	for s.first < len(s.queue) {
		pkt := s.queue[s.first]
		size := pkt.Size() - len(pkt.LinkHeader().Slice())
		if !s.bucket.Admit(size, s.o.Gate.Now()) {
			s.timer = time.AfterFunc(admit.RefillEvery, s.drain)
			break
		}
		s.queue[s.first] = nil
		s.first++
		s.bytes -= size
		if !s.write(pkt, size) { // under the lock: later packets must queue behind
			s.o.n.bandwidth.Add(1)
		}
		s.Waits.Add(-1)
	}
	if s.first == len(s.queue) {
		s.queue, s.first = s.queue[:0], 0
	} else if s.first > len(s.queue)/2 {
		n := copy(s.queue, s.queue[s.first:])
		clear(s.queue[n:])
		s.queue, s.first = s.queue[:n], 0
	}
}

// write passes a packet on, and reports whether the next queue, if there is one, took it.
func (s *shaper) write(pkt *stack.PacketBuffer, size int) bool {
	if s.next != nil {
		return s.next.send(pkt, size)
	}
	if !s.to.write(pkt) {
		s.o.n.writeFailed.Add(1)
	}
	pkt.DecRef()
	return true
}

// ruleQueues are the queues of one rule.
type ruleQueues struct {
	limits  *admit.RuleLimits
	in, out shaper
}

// queues returns the queues of a rule's flows, made on first use.
func (o *Path) queues(l *admit.RuleLimits) *ruleQueues {
	if q, ok := l.Queues.Load().(*ruleQueues); ok {
		return q
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if q, ok := l.Queues.Load().(*ruleQueues); ok {
		return q
	}
	q := &ruleQueues{limits: l}
	q.in = shaper{o: o, bucket: &l.Down, next: &o.in, closed: o.closed}
	q.out = shaper{o: o, bucket: &l.Up, next: &o.Out, closed: o.closed}
	l.Queues.Store(q)
	o.Ruled = append(o.Ruled, q)
	return q
}

// Retire removes the queues of rules that no longer have limits, and forwards the packets in them.
// Afterwards they stay empty, since their buckets set no limit.
func (o *Path) Retire() {
	o.mu.Lock()
	var gone []*ruleQueues
	o.Ruled = slices.DeleteFunc(o.Ruled, func(q *ruleQueues) bool {
		if o.Gate.Limited.Has(q.limits) {
			return false
		}
		gone = append(gone, q)
		return true
	})
	o.mu.Unlock()
	for _, q := range gone {
		q.in.drain()
		q.out.drain()
	}
}

// close drops the waiting packets.
func (s *shaper) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
	for _, pkt := range s.queue[s.first:] {
		pkt.DecRef()
	}
	s.queue, s.first, s.bytes = nil, 0, 0
}
