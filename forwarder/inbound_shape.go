package forwarder

// Bandwidth of the inbound path. A proxied connection is slowed down by not reading
// from it; packets that pass have nobody to hold back, and a TCP whose packets are
// dropped at the limit gets a fraction of it. So they wait here, in order, for as
// long as a queue of queueSpan lasts, as a token bucket filter (tc-tbf(8)) has them
// wait. What does not fit is dropped and counted.

import (
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// queueSpan is how much traffic waits at most, as time at the limit's rate.
	queueSpan = 100 * time.Millisecond
	// queueMin is the least that may wait: two large segments.
	queueMin = 128 << 10
)

// shaper is one direction's queue.
type shaper struct {
	o      *outside
	bucket *bucket
	to     *outlet

	waits atomic.Int32 // packets in the queue: none is overtaken when a limit goes

	mu     sync.Mutex
	queue  []*stack.PacketBuffer // ready to be written; the oldest at first
	first  int
	bytes  int
	timer  *time.Timer // runs while there is a queue
	closed bool
}

// send writes a packet of size bytes now or later, and says whether it does. It owns
// pkt.
func (s *shaper) send(pkt *stack.PacketBuffer, size int) bool {
	if !s.bucket.limited() && s.waits.Load() == 0 {
		s.write(pkt)
		return true
	}
	s.mu.Lock()
	if s.first == len(s.queue) && s.bucket.admit(size, s.o.f.now()) {
		s.mu.Unlock()
		s.write(pkt)
		return true
	}
	room := max(int(float64(s.bucket.rate.Load())*queueSpan.Seconds()), queueMin)
	if s.closed || s.bytes+size > room {
		s.mu.Unlock()
		pkt.DecRef()
		return false
	}
	s.queue = append(s.queue, pkt)
	s.bytes += size
	s.waits.Add(1)
	if s.timer == nil {
		s.timer = time.AfterFunc(refillEvery, s.drain)
	}
	s.mu.Unlock()
	return true
}

// drain writes what may be written by now, and comes back while something is left.
func (s *shaper) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer = nil
	if s.closed {
		return
	}
	for s.first < len(s.queue) {
		pkt := s.queue[s.first]
		size := pkt.Size() - len(pkt.LinkHeader().Slice())
		if !s.bucket.admit(size, s.o.f.now()) {
			s.timer = time.AfterFunc(refillEvery, s.drain)
			break
		}
		s.queue[s.first] = nil
		s.first++
		s.bytes -= size
		s.write(pkt) // under the lock: whoever comes now must come behind
		s.waits.Add(-1)
	}
	if s.first == len(s.queue) {
		s.queue, s.first = s.queue[:0], 0
	} else if s.first > len(s.queue)/2 {
		n := copy(s.queue, s.queue[s.first:])
		clear(s.queue[n:])
		s.queue, s.first = s.queue[:n], 0
	}
}

func (s *shaper) write(pkt *stack.PacketBuffer) {
	if !s.to.write(pkt) {
		s.o.n.writeFailed.Add(1)
	}
	pkt.DecRef()
}

// close drops what waits.
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
