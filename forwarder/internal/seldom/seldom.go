// Package seldom reports persistent failures without flooding the log.
package seldom

import (
	"sync"
	"time"
)

// Every is the least time between two reports, and how long failures count.
const Every = time.Minute

// Failures counts failures. The zero value is ready; its method may be called from any goroutine.
type Failures struct {
	mu    sync.Mutex
	since time.Time // the first of n
	n     int
	told  time.Time
}

// Note counts a failure. tell reports whether to log it: there were at least least failures within
// Every, n in all, and none was reported in that time.
func (f *Failures) Note(least int, now time.Time) (n int, tell bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now.Sub(f.since) >= Every {
		f.since, f.n = now, 0
	}
	f.n++
	if f.n < least || now.Sub(f.told) < Every {
		return f.n, false
	}
	f.told = now
	return f.n, true
}
