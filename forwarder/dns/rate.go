package dns

import (
	"sync"
	"time"
)

// gatedRate is how many questions a second are accepted that the cache cannot answer, while the
// policy gates names and sets no limit of its own.
const gatedRate = 1000

// bucket is a token bucket that holds one second's worth. Its zero value is full.
type bucket struct {
	mu    sync.Mutex
	spent float64 // tokens taken and not yet refilled
	since time.Time
}

// take takes a token, if there is one at this rate per second; a rate of zero has no bound.
func (b *bucket) take(rate int, now time.Time) bool {
	if rate <= 0 {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if passed := now.Sub(b.since); passed > 0 {
		b.spent = max(0, b.spent-passed.Seconds()*float64(rate))
		b.since = now
	}
	if b.spent+1 > float64(rate) {
		return false
	}
	b.spent++
	return true
}
