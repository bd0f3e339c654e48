package nat

import (
	"sync"
	"sync/atomic"
	"time"
)

// EventType is what happened to a flow, under conntrack -E's names.
type EventType uint8

// A flow is reported once by NEW, then whenever its state, SEEN_REPLY or ASSURED changes, and once
// by DESTROY.
const (
	New EventType = iota
	Update
	Destroy
)

// String returns NEW, UPDATE or DESTROY.
func (e EventType) String() string { return [...]string{"NEW", "UPDATE", "DESTROY"}[e%3] }

// Event is a change of a flow, with the flow as it was right after the change.
type Event struct {
	Type EventType
	Time time.Time
	Flow Flow
	Lost uint64 // events dropped for this subscriber before this one
}

// subscribers are the channels of Subscribe.
type subscribers struct {
	n    atomic.Int32  // their number, readable without the lock
	lost atomic.Uint64 // total
	mu   sync.RWMutex
	all  map[*subscriber]struct{}
}

type subscriber struct {
	c    chan Event
	mu   sync.Mutex
	lost uint64 // since the last delivered event
}

// Subscribe delivers events from now on. A slow subscriber loses events and never delays the packet
// path; each event says how many were lost before it. cancel ends the subscription and closes the
// channel.
func (t *Table) Subscribe(buffer int) (events <-chan Event, cancel func()) {
	s := &subscriber{c: make(chan Event, max(buffer, 1))}
	t.subs.mu.Lock()
	defer t.subs.mu.Unlock()
	if t.subs.all == nil {
		t.subs.all = make(map[*subscriber]struct{})
	}
	t.subs.all[s] = struct{}{}
	t.subs.n.Add(1)
	return s.c, func() {
		t.subs.mu.Lock()
		defer t.subs.mu.Unlock()
		if _, ok := t.subs.all[s]; ok {
			delete(t.subs.all, s)
			t.subs.n.Add(-1)
			close(s.c)
		}
	}
}

// emit reports a change of l, whose mu is held. Without subscribers it costs one atomic load.
func (t *Table) emit(typ EventType, l *Lease) {
	if t.onEvent == nil && t.subs.n.Load() == 0 {
		return
	}
	ev := Event{Type: typ, Time: t.at(t.clock()), Flow: l.snapshot()}
	if typ == Destroy {
		ev.Time = ev.Flow.End
	}
	if t.onEvent != nil {
		t.onEvent(ev)
	}
	t.subs.mu.RLock()
	defer t.subs.mu.RUnlock()
	for s := range t.subs.all {
		s.mu.Lock()
		ev.Lost = s.lost
		select {
		case s.c <- ev:
			s.lost = 0
		default:
			s.lost++
			t.subs.lost.Add(1)
		}
		s.mu.Unlock()
	}
}
