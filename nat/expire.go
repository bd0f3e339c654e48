package nat

import (
	"context"
	"math"
	"time"
)

const (
	// clockTick is how often Run looks while packets flow, and so how late the cached clock can
	// make a timeout.
	clockTick = 250 * time.Millisecond
	// idleTick is how often Run looks while there are flows but no packets, to notice when packets
	// flow again.
	idleTick = 10 * time.Second
)

// Never is what Expire returns when there is no flow that could time out.
const Never = time.Duration(math.MaxInt64)

// Expire ends the flows whose time has come and returns how long until it must be called again: no
// later than the first remaining timeout. It may be called at any time from any goroutine. It ends
// a flow at most one wheel grain (134 ms) late, and never early. Long-lived owners use Run.
func (t *Table) Expire(now time.Time) time.Duration {
	return t.expire(int64(now.Sub(t.epoch)))
}

func (t *Table) expire(now int64) time.Duration {
	if t.exhausted() {
		for _, l := range t.Leases() {
			l.end(now, ReasonTotalBytes, true, nil)
		}
	}
	if t.overspent.Load() && t.overspent.Swap(false) {
		for _, l := range t.Leases() {
			if b := l.budget.Load(); b != nil && b.spent() {
				l.end(now, ReasonBudgetBytes, true, nil)
			}
		}
	}
	grain := now >> grainBits
	var due []*Lease
	t.mu.Lock()
	t.wheel.advance(grain, func(l *Lease) {
		if d := grainAt(l.deadline()); d > grain {
			t.wheel.arm(l, d) // packets came after it was armed
		} else {
			due = append(due, l)
		}
	})
	t.mu.Unlock()
	for _, l := range due {
		if l.spec.Pending != nil && l.spec.Pending() {
			l.saw(now)
		}
		ended := l.end(now, ReasonTimeout, true, func(_ status, deadline int64) bool { return grainAt(deadline) <= grain })
		if !ended { // a packet came just now, or the flow is gone
			t.mu.Lock()
			if t.byTuple[l.spec.Orig] == l {
				t.arm(l, l.deadline())
			}
			t.mu.Unlock()
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.wakeAt = t.wheel.next()
	if t.wakeAt == never {
		return Never
	}
	return time.Duration(max(t.wakeAt<<grainBits-now, 1))
}

// Run calls Expire whenever there is something to do, until ctx ends. The owner of the table runs
// it in a goroutine.
//
// Run also keeps a cached clock for Account, which would otherwise spend most of its time reading
// the clock: while packets flow, it stores the time every clockTick. It stores the end of the
// coming tick, so the cached clock never ends a flow early. When nothing flows it stores nothing
// and sleeps.
func (t *Table) Run(ctx context.Context) {
	defer t.cached.Store(0)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.wake:
		case <-timer.C:
		}
		now := t.clock()
		next := t.expire(now)
		switch {
		case t.busy.Swap(false):
			t.cached.Store(now + int64(clockTick))
			next = min(next, clockTick)
		case next != Never:
			t.cached.Store(0)
			next = min(next, idleTick)
		default:
			t.cached.Store(0)
		}
		if next != Never {
			// Timers due after Run looks again need not wake it.
			t.mu.Lock()
			t.wakeAt = min(t.wakeAt, (now+int64(next))>>grainBits)
			t.mu.Unlock()
		}
		timer.Reset(next)
	}
}
