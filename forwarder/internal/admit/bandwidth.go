package admit

// Bandwidth. (The flow table limits the number of flows and the total volume.)
//
// Each direction has one token bucket for the whole sandbox. A TCP pump takes what it may move now
// and, when that is nothing, waits in a queue that is woken as tokens return, first come first
// served and a quantum each while it is contended, so that one heavy flow does not starve the small
// ones: the bytes it may not move yet stay where they are, and backpressure does the rest.
// Datagrams have no sender to hold back: one that meets an empty bucket is dropped and counted.

import (
	"sync"
	"sync/atomic"
	"time"

	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/policy"
)

const (
	// bucketSpan bounds how much traffic a bucket holds, as time at its rate.
	bucketSpan = 50 * time.Millisecond
	// BucketMin is the least that a bucket holds: one large segment.
	BucketMin = 64 << 10
	// Quantum is what one flow gets at a time while others wait.
	Quantum = 16 << 10
	// RefillEvery is how often waiting flows are woken.
	RefillEvery = 5 * time.Millisecond
	// leastGrant is the smallest grant to a flow that wants more, or what the rate allows in
	// RefillEvery if that is more. A flow that took every byte as it became available would keep
	// itself and all others from anything else.
	leastGrant = 1460
)

// bandwidth holds the byte rate limits of one sandbox.
type bandwidth struct {
	Up, Down Bucket // from and to the sandbox
}

func (b *bandwidth) set(l policy.Limits) {
	b.Up.SetRate(int64(l.EgressBandwidth) / 8)
	b.Down.SetRate(int64(l.IngressBandwidth) / 8)
}

// stop releases all waiting tasks and ends the timers.
func (b *bandwidth) stop() { b.set(policy.Limits{}) }

// Bucket is one direction's token bucket; the zero value sets no limit.
type Bucket struct {
	Rate atomic.Int64 // bytes per second; 0: no limit

	mu      sync.Mutex
	tokens  float64
	last    time.Time
	waiters []parked
	timer   *time.Timer
}

// parked is a task to queue when tokens are available again.
type parked struct {
	t *engine.Task
	q *engine.RunQueue
}

func (b *Bucket) SetRate(rate int64) {
	b.Rate.Store(rate)
	b.Wake()
}

// Limited reports whether Take can return less than it was asked for.
func (b *Bucket) Limited() bool { return b.Rate.Load() > 0 }

// Take returns how many of want bytes may move now. If there are none, or too few to be worthwhile,
// it returns 0 and queues t on q once that changes.
func (b *Bucket) Take(want int, now time.Time, t *engine.Task, q *engine.RunQueue) int {
	rate := b.Rate.Load()
	if rate <= 0 {
		return want
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(rate, now)
	if len(b.waiters) > 0 {
		want = min(want, Quantum)
	}
	n := min(want, int(b.tokens))
	if n < min(want, max(leastGrant, int(float64(rate)*RefillEvery.Seconds()))) {
		b.waiters = append(b.waiters, parked{t, q})
		if len(b.waiters) == 1 {
			b.timer = time.AfterFunc(RefillEvery, b.Wake)
		}
		return 0
	}
	b.tokens -= float64(n)
	return n
}

// untake returns unused tokens.
func (b *Bucket) untake(n int) {
	if n <= 0 || !b.Limited() {
		return
	}
	b.mu.Lock()
	b.tokens += float64(n)
	b.mu.Unlock()
}

// Admit reports whether a datagram of n bytes may pass. The bucket may go into debt, so that a
// large datagram is not refused for ever.
func (b *Bucket) Admit(n int, now time.Time) bool {
	rate := b.Rate.Load()
	if rate <= 0 {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(rate, now)
	if b.tokens <= 0 {
		return false
	}
	b.tokens -= float64(n)
	return true
}

func (b *Bucket) refill(rate int64, now time.Time) {
	most := max(float64(rate)*bucketSpan.Seconds(), BucketMin)
	if b.last.IsZero() {
		b.tokens = most
	} else if d := now.Sub(b.last); d > 0 {
		b.tokens = min(most, b.tokens+float64(rate)*d.Seconds())
	}
	b.last = now
}

// Wake queues all waiting tasks. A task that finds nothing waits again, behind those that came
// meanwhile.
func (b *Bucket) Wake() {
	b.mu.Lock()
	w := b.waiters
	b.waiters = nil
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
	b.mu.Unlock()
	for _, w := range w {
		w.q.Put(w.t)
	}
}
