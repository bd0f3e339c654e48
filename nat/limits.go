package nat

import (
	"math"
	"time"
)

// Defaults of Limits. They bound what one sandbox can use of its host: an entry costs about 512
// bytes here and a socket in the kernel.
const (
	DefaultMax      = 65536
	DefaultHalfOpen = 4096
)

// Limits are a sandbox's budgets. A zero Max or HalfOpen means the default; a zero in the other
// fields sets no further bound.
type Limits struct {
	Max            int   // flows in all: nf_conntrack_max
	HalfOpen       int   // TCP flows that have not finished their handshake
	PerDestination int   // flows to one far address, not counting published ports
	NewPerSecond   int   // new flows per second, with a second's worth of burst
	TotalBytes     int64 // bytes of all flows both ways, since the table was made
}

func (l Limits) orDefault() Limits {
	if l.Max <= 0 {
		l.Max = DefaultMax
	}
	if l.HalfOpen <= 0 {
		l.HalfOpen = DefaultHalfOpen
	}
	l.PerDestination = max(l.PerDestination, 0)
	l.NewPerSecond = max(l.NewPerSecond, 0)
	l.TotalBytes = max(l.TotalBytes, 0)
	return l
}

// bucket is a token bucket of rate tokens per second, with a burst of the same size. It starts
// full.
type bucket struct {
	rate int // 0: no bound
	debt int64
	last int64 // ns; debt is as of then
}

// take takes a token and reports whether there was one. The bucket keeps a debt in nanoseconds of
// refill: one token costs second/rate, the debt drains as time passes, and it cannot exceed one
// second.
func (b *bucket) take(now int64) bool {
	if b.rate <= 0 {
		return true
	}
	b.debt = max(0, b.debt-max(0, now-b.last))
	b.last = now
	cost := int64(math.Ceil(float64(time.Second) / float64(b.rate)))
	if b.debt+cost > int64(time.Second)+int64(b.rate) { // the second term: what rounding up can add
		return false
	}
	b.debt += cost
	return true
}
