package nat

import (
	"sync"
	"sync/atomic"
	"time"
)

// EventType is what happened to a flow, by conntrack -E's names.
type EventType uint8

// A flow is told of once by NEW, then whenever its state, SEEN_REPLY or ASSURED
// changes, and once by DESTROY.
const (
	New EventType = iota
	Update
	Destroy
)

// String is NEW, UPDATE or DESTROY.
func (e EventType) String() string { return [...]string{"NEW", "UPDATE", "DESTROY"}[e%3] }

// Event is a change of a flow, with the flow as it then stood.
type Event struct {
	Type EventType
	Time time.Time
	Flow Flow
	Lost uint64 // how many events this subscriber had no room for before this one
}

// subscribers are the channels of Subscribe.
type subscribers struct {
	n    atomic.Int32  // how many, for those who want to know without the lock
	lost atomic.Uint64 // in all
	mu   sync.RWMutex
	all  map[*subscriber]struct{}
}

type subscriber struct {
	c    chan Event
	mu   sync.Mutex
	lost uint64 // since the last that had room
}

// Subscribe delivers events from now on. A subscriber that does not keep up loses
// events, never time of the packet path: each event says how many were lost before
// it. cancel ends the subscription and closes the channel.
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

// emit tells of l, whose mu is held. Nobody listening, it costs a load.
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
