package nat

import (
	"context"
	"math"
	"time"
)

const (
	// clockTick is how often Run looks while packets flow, and so how late the
	// cached clock may make a timeout.
	clockTick = 250 * time.Millisecond
	// idleTick is how often it looks while there are flows and no packets: to
	// notice that packets flow again.
	idleTick = 10 * time.Second
)

// Never is what Expire returns when there is no flow that could time out.
const Never = time.Duration(math.MaxInt64)

// Expire ends the flows whose time has come and says how long until it wants to be
// called again: not later than the first timeout that is left. It may be called at
// any time from any goroutine; it ends a flow at most a wheel grain (134 ms) late
// and never early. Long-lived owners use Run.
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
			t.wheel.arm(l, d) // packets came since it was armed
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
		if !ended { // a packet came just now, or it is gone
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

// Run calls Expire whenever there is something to do, until ctx ends. It is the
// goroutine of whoever owns the table.
//
// While it runs it also keeps a cached clock for Account, whose cost is otherwise
// mostly reading the clock: as long as packets flow, it stores the time every
// clockTick. What it stores is the end of the tick to come, so that a flow never
// ends early by it. When nothing flows it stores nothing and sleeps.
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
			// Nobody need rouse Run for what is due after it comes back.
			t.mu.Lock()
			t.wakeAt = min(t.wakeAt, (now+int64(next))>>grainBits)
			t.mu.Unlock()
		}
		timer.Reset(next)
	}
}
