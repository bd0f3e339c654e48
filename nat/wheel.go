package nat

import (
	"math"
	"math/bits"
)

// wheel is a hierarchical timer wheel of leases: arming, disarming and finding what
// is due cost the same with ten flows and with a hundred thousand, where a heap
// costs a logarithm and a scan everything.
//
// Time is cut into grains. Level 0 has a slot per grain, each further level has
// slots 64 times as wide. A lease due at grain d sits in the lowest level where
// its slot is fewer than 64 slots ahead of the current one, so a slot number is
// never ambiguous, and it is taken out when time enters its slot: it is then due
// (level 0) or armed again lower down.
//
// Leases are armed lazily. A packet moves only Lease.seen; the wheel keeps the old time, finds the
// lease then, and arms it again for the remainder. A flow that carries a million packets in its
// timeout costs the wheel one step.
//
// Guarded by Table.mu.
type wheel struct {
	now   int64 // current grain
	used  [wheelLevels]uint64
	slots [wheelLevels][wheelSlots]*Lease // heads of doubly linked rings
}

const (
	grainBits   = 27 // one grain is 2^27 ns, 134 ms: a timeout is at most that late, never early
	wheelBits   = 6
	wheelSlots  = 1 << wheelBits
	wheelLevels = 6 // 2^(27+36) ns: all of time
)

// never is the grain of a timer that never rings.
const never = math.MaxInt64 >> grainBits

// grainAt returns the first grain that begins at or after ns: when a deadline is due.
func grainAt(ns int64) int64 {
	if ns > math.MaxInt64-(1<<grainBits) {
		return never
	}
	return (ns + 1<<grainBits - 1) >> grainBits
}

// arm moves l to grain d. A grain in the past rings next.
func (w *wheel) arm(l *Lease, d int64) {
	w.disarm(l)
	d = max(d, w.now+1)
	level := 0
	for level < wheelLevels-1 && (d>>(level*wheelBits))-(w.now>>(level*wheelBits)) >= wheelSlots {
		level++
	}
	slot := int(d>>(level*wheelBits)) % wheelSlots
	l.timer = timer{due: d, level: int8(level), slot: int8(slot), armed: true}
	if head := w.slots[level][slot]; head != nil {
		l.timer.next, l.timer.prev = head, head.timer.prev
		head.timer.prev.timer.next, head.timer.prev = l, l
	} else {
		l.timer.next, l.timer.prev = l, l
		w.slots[level][slot] = l
		w.used[level] |= 1 << slot
	}
}

// disarm takes l out, if it is armed.
func (w *wheel) disarm(l *Lease) {
	t := l.timer
	if !t.armed {
		return
	}
	if t.next == l {
		w.slots[t.level][t.slot] = nil
		w.used[t.level] &^= 1 << t.slot
	} else {
		t.prev.timer.next, t.next.timer.prev = t.next, t.prev
		if w.slots[t.level][t.slot] == l {
			w.slots[t.level][t.slot] = t.next
		}
	}
	l.timer = timer{}
}

// advance moves to grain now. It removes each lease whose time has come and calls ring, which may
// arm it again.
func (w *wheel) advance(now int64, ring func(*Lease)) {
	if now <= w.now {
		return
	}
	var pending [wheelLevels]uint64
	for level := range pending {
		from, to := w.now>>(level*wheelBits), now>>(level*wheelBits)
		pending[level] = w.used[level] & slotsBetween(from, to)
	}
	// All slots are emptied before any lease is armed again. Otherwise a slot that is reused for
	// the future would lose the leases newly armed into it.
	var first *Lease
	for level, mask := range pending {
		for ; mask != 0; mask &= mask - 1 {
			slot := bits.TrailingZeros64(mask)
			head := w.slots[level][slot]
			w.slots[level][slot] = nil
			w.used[level] &^= 1 << slot
			head.timer.prev.timer.next = first // ring → chain
			first = head
		}
	}
	w.now = now
	for first != nil {
		l := first
		first = l.timer.next
		due := l.timer.due
		l.timer = timer{}
		if due > now {
			w.arm(l, due)
		} else {
			ring(l)
		}
	}
}

// slotsBetween returns the set of slots after from, up to and including to.
func slotsBetween(from, to int64) uint64 {
	n := to - from
	if n >= wheelSlots {
		return math.MaxUint64
	}
	return bits.RotateLeft64(1<<n-1, int((from+1)%wheelSlots))
}

// next returns the grain at which advance has something to do: no later than the first timer, and
// earlier if only a slot of a higher level must be opened.
func (w *wheel) next() int64 {
	best := int64(never)
	for level, mask := range w.used {
		if mask == 0 {
			continue
		}
		at := w.now>>(level*wheelBits) + 1
		ahead := bits.TrailingZeros64(bits.RotateLeft64(mask, -int(at%wheelSlots)))
		best = min(best, (at+int64(ahead))<<(level*wheelBits))
	}
	return best
}

// timer is a lease's place in the wheel.
type timer struct {
	next, prev  *Lease
	due         int64
	level, slot int8
	armed       bool
}
