package nat

import (
	"math/rand/v2"
	"testing"
)

// TestWheelAgainstAScan runs the wheel beside a map that is scanned.
func TestWheelAgainstAScan(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var w wheel
		twin := map[*Lease]int64{}
		leases := make([]*Lease, 200)
		for i := range leases {
			leases[i] = &Lease{}
		}
		far := func() int64 { return rng.Int64N(1 << (1 + rng.IntN(32))) } // near ones as likely as far ones
		for range 3000 {
			if w.now > 1<<34 { // not to run out of time
				break
			}
			l := leases[rng.IntN(len(leases))]
			switch rng.IntN(4) {
			case 0, 1:
				d := w.now + far() - 3
				w.arm(l, d)
				twin[l] = max(d, w.now+1)
			case 2:
				w.disarm(l)
				delete(twin, l)
			case 3:
				now := w.now + far()>>rng.IntN(10)
				rang := map[*Lease]bool{}
				moved := now > w.now
				w.advance(now, func(l *Lease) { rang[l] = true })
				for l, d := range twin {
					if due := moved && d <= now; due != rang[l] {
						t.Fatalf("seed %d: at %d a lease due at %d: rang is %v", seed, now, d, rang[l])
					}
					if rang[l] {
						delete(twin, l)
						delete(rang, l)
					}
				}
				if len(rang) != 0 {
					t.Fatalf("seed %d: %d leases rang that were not armed", seed, len(rang))
				}
			}
			first := int64(never)
			for _, d := range twin {
				first = min(first, d)
			}
			if next := w.next(); next > first || (next <= w.now && len(twin) > 0) || (len(twin) == 0 && next != never) {
				t.Fatalf("seed %d: at %d next is %d, the first timer %d", seed, w.now, next, first)
			}
		}
	}
}

func TestGrainIsNeverEarly(t *testing.T) {
	for _, ns := range []int64{0, 1, 1<<grainBits - 1, 1 << grainBits, 1<<grainBits + 1, 1 << 62} {
		if g := grainAt(ns); g<<grainBits < ns || g > 0 && (g-1)<<grainBits >= ns {
			t.Errorf("%d ns is put at grain %d", ns, g)
		}
	}
	if grainAt(1<<63-1) != never {
		t.Error("the end of time is not never")
	}
}
