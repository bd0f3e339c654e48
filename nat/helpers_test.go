package nat

import (
	"net/netip"
	"testing"
	"time"
)

// fakeClock is a clock that moves only when told to.
type fakeClock struct{ t time.Time }

func newFakeClock() *fakeClock { return &fakeClock{t: time.Unix(1_700_000_000, 0)} }

func (c *fakeClock) now() time.Time          { return c.t }
func (c *fakeClock) advance(d time.Duration) { c.t = c.t.Add(d) }

func tuple(proto uint8, src, dst string) Tuple {
	return NewTuple(proto, netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst))
}

// numbered is the n-th of many distinct tuples.
func numbered(proto uint8, n int) Tuple {
	src := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 24), byte(n >> 16)}), uint16(n))
	return NewTuple(proto, src, netip.MustParseAddrPort("192.0.2.1:443"))
}

func acquire(t testing.TB, table *Table, s Spec) *Lease {
	t.Helper()
	l, err := table.Acquire(s)
	if err != nil {
		t.Fatalf("Acquire(%v): %v", s.Orig, err)
	}
	return l
}

// wantEmpty fails unless every budget is back to the start.
func wantEmpty(t testing.TB, table *Table) {
	t.Helper()
	s := table.Stats()
	if s.Count != 0 || s.HalfOpen != 0 || s.Destinations != 0 {
		t.Errorf("not all was repaid: %d flows, %d half-open, %d destinations", s.Count, s.HalfOpen, s.Destinations)
	}
	if table.over.first != nil || table.over.last != nil || table.mute.first != nil || table.mute.last != nil {
		t.Error("an eviction list is not empty")
	}
	if table.wheel.used != [wheelLevels]uint64{} {
		t.Error("the timer wheel is not empty")
	}
}
