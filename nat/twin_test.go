package nat

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"
)

// twin is the stupid table: a map that is scanned for everything, written from what
// the documentation promises and not from the code.
type twin struct {
	clock    *fakeClock
	start    time.Time
	limits   Limits
	timeouts Timeouts
	credit   time.Duration // of the new-flow bucket, up to a second
	credited time.Time
	flows    map[Tuple]*twinFlow
	lastID   uint64
	lastRun  int64 // grain of the last Expire
	turn     int
	stats    Stats
	gone     []string // "id reason" of each flow that the table ended
}

type twinFlow struct {
	Flow
	short     bool
	sent      time.Time // the last packet in the direction of Orig
	evictable int       // 0: not; else since which turn
	closing   bool
}

func (w *twin) grain(t time.Time, up bool) int64 {
	ns := int64(t.Sub(w.start)) + 1
	if up {
		ns += 1<<grainBits - 1
	}
	return ns >> grainBits
}

func (w *twin) acquire(s Spec) error {
	toDest, halfOpen := 0, 0
	for _, f := range w.flows {
		if !f.Ingress && f.Orig.dst == s.Orig.dst {
			toDest++
		}
		if f.State == SynSent || f.State == SynRecv {
			halfOpen++
		}
	}
	for evicted := 0; ; evicted++ {
		switch {
		case evicted == maxEvictions:
			w.stats.TableFull++
			return ErrTableFull
		case w.flows[s.Orig] != nil:
			w.stats.Exists++
			return ErrExists
		case w.exhausted():
			w.stats.TotalBytesLimit++
			return ErrTotalBytes
		case !s.Ingress && w.limits.PerDestination > 0 && toDest >= w.limits.PerDestination:
			w.stats.DestLimit++
			return ErrDestLimit
		case s.Orig.proto == protoTCP && halfOpen >= w.limits.HalfOpen:
			w.stats.HalfOpenLimit++
			return ErrHalfOpen
		}
		if len(w.flows) < w.limits.Max {
			break
		}
		var victim *twinFlow
		for _, f := range w.flows {
			if f.evictable > 0 && (victim == nil || f.closing && !victim.closing ||
				f.closing == victim.closing && f.evictable < victim.evictable) {
				victim = f
			}
		}
		if victim == nil {
			w.stats.TableFull++
			return ErrTableFull
		}
		if victim.Assured && !victim.closing || victim.SeenReply && !victim.closing {
			panic("the twin evicts a flow that was answered")
		}
		w.drop(victim, ReasonEarlyDrop)
		w.stats.EarlyDrop++
	}
	if r := w.limits.NewPerSecond; r > 0 {
		w.credit = min(time.Second, w.credit+w.clock.t.Sub(w.credited))
		w.credited = w.clock.t
		if w.credit < time.Second/time.Duration(r) {
			w.stats.RateLimit++
			return ErrRate
		}
		w.credit -= time.Second / time.Duration(r)
	}
	w.lastID++
	w.stats.Created++
	f := &twinFlow{short: s.Short, sent: w.clock.t, Flow: Flow{ID: w.lastID, State: Unreplied, Orig: s.Orig, Reply: s.Orig.Reverse(),
		Start: w.clock.t, LastSeen: w.clock.t, Ingress: s.Ingress, Rule: s.Rule}}
	if s.Orig.proto == protoTCP {
		f.State = SynSent
	}
	w.flows[s.Orig] = f
	w.file(f)
	return nil
}

func (w *twin) exhausted() bool {
	used := w.stats.OrigBytes + w.stats.ReplyBytes
	return w.limits.TotalBytes > 0 && used >= w.limits.TotalBytes
}

// file notes since when a flow may be evicted.
func (w *twin) file(f *twinFlow) {
	closing := f.State == TimeWait || f.State == Close
	mute := !f.SeenReply && !f.Assured
	switch {
	case !closing && !mute:
		f.evictable = 0
	case f.evictable == 0 || closing != f.closing:
		w.turn++
		f.evictable = w.turn
	}
	f.closing = closing
}

func (w *twin) drop(f *twinFlow, reason Reason) {
	delete(w.flows, f.Orig)
	w.gone = append(w.gone, fmt.Sprint(f.ID, " ", reason))
}

func (w *twin) timeout(f *twinFlow) time.Duration {
	byName := map[State]time.Duration{
		SynSent: w.timeouts.TCPSynSent, SynRecv: w.timeouts.TCPSynRecv, Established: w.timeouts.TCPEstablished,
		FinWait: w.timeouts.TCPFinWait, CloseWait: w.timeouts.TCPCloseWait, LastAck: w.timeouts.TCPLastAck,
		TimeWait: w.timeouts.TCPTimeWait, Close: w.timeouts.TCPClose,
		Unreplied: w.timeouts.UDP, Replied: w.timeouts.UDP, Assured: w.timeouts.UDPStream,
	}
	switch {
	case f.Orig.proto == protoICMP:
		return w.timeouts.ICMP
	case f.short:
		return w.timeouts.UDPShort
	}
	return byName[f.State]
}

// ends is when a flow does if nothing more comes.
func (w *twin) ends(f *twinFlow) time.Time {
	end := f.LastSeen.Add(w.timeout(f))
	if last := f.sent.Add(w.timeouts.UDPInbound); f.Orig.proto == protoUDP && !f.Ingress && last.Before(end) {
		return last
	}
	return end
}

func (w *twin) expire() {
	if w.exhausted() {
		for _, f := range w.flows {
			w.drop(f, ReasonTotalBytes)
			w.stats.OverBytes++
		}
	}
	now := w.grain(w.clock.t, false)
	if now <= w.lastRun {
		return
	}
	w.lastRun = now
	for _, f := range w.flows {
		if w.grain(w.ends(f), true) <= now {
			w.drop(f, ReasonTimeout)
			w.stats.TimedOut++
		}
	}
}

func (w *twin) account(f *twinFlow, d Dir, packets, bytes int64) {
	f.LastSeen = w.clock.t
	if d == Original {
		f.sent = w.clock.t
		f.OrigPackets, f.OrigBytes = f.OrigPackets+packets, f.OrigBytes+bytes
		w.stats.OrigPackets, w.stats.OrigBytes = w.stats.OrigPackets+packets, w.stats.OrigBytes+bytes
	} else {
		f.ReplyPackets, f.ReplyBytes = f.ReplyPackets+packets, f.ReplyBytes+bytes
		w.stats.ReplyPackets, w.stats.ReplyBytes = w.stats.ReplyPackets+packets, w.stats.ReplyBytes+bytes
	}
	udp := f.Orig.proto == protoUDP
	if udp && f.SeenReply && !f.short && w.clock.t.Sub(f.Start) > 2*time.Second {
		f.State, f.Assured = Assured, true
	} else if d == Reply && !f.SeenReply {
		f.SeenReply = true
		if f.Orig.proto != protoTCP {
			f.State = Replied
		}
	}
	w.file(f)
}

func (w *twin) setState(f *twinFlow, s State) {
	f.LastSeen = w.clock.t
	f.State = s
	if s >= SynRecv && s != Close {
		f.SeenReply = true
	}
	if s == Established {
		f.Assured = true
	}
	w.file(f)
}

func (w *twin) list() []Flow {
	var all []Flow
	for _, f := range w.flows {
		g := f.Flow
		g.TimeoutLeft = max(0, w.ends(f).Sub(w.clock.t))
		all = append(all, g)
	}
	slices.SortFunc(all, func(a, b Flow) int { return int(a.ID) - int(b.ID) })
	return all
}

// play runs the table and its twin through the same operations, chosen by next (which
// answers with a number below its argument), and compares them after each.
func play(t *testing.T, steps int, next func(n int) int) {
	clock := newFakeClock()
	limits := Limits{Max: 30, HalfOpen: 12, PerDestination: 20}.orDefault()
	w := &twin{clock: clock, start: clock.t, limits: limits, timeouts: DefaultTimeouts(), credit: time.Second,
		flows: map[Tuple]*twinFlow{}}
	w.credited = clock.t
	var gone []string
	var assuredEvicted bool
	table := NewTable(Config{Limits: limits, Now: clock.now, OnEvent: func(ev Event) {
		f := ev.Flow
		if f.Reason == ReasonEarlyDrop && (f.SeenReply || f.Assured) && !f.State.closing() {
			assuredEvicted = true
		}
	}})
	leases := map[Tuple]*Lease{}
	protos := []uint8{protoTCP, protoUDP, protoICMP}
	pick := func() (*twinFlow, *Lease) {
		if len(w.flows) == 0 {
			return nil, nil
		}
		all := w.list()
		f := w.flows[all[next(len(all))].Orig]
		return f, leases[f.Orig]
	}
	for step := range steps {
		switch op := next(20); op {
		case 0, 1, 2, 3, 4, 5:
			n := next(60)
			orig := NewTuple(protos[next(3)], tuple(0, "10.0.2.100:1", "10.0.0.0:0").Src(), tuple(0, "10.0.0.0:0", fmt.Sprintf("192.0.2.%d:%d", n%3, n)).Dst())
			s := Spec{Orig: orig, Rule: fmt.Sprint(n), Ingress: n%7 == 0, Short: orig.proto == protoUDP && n%5 == 0}
			id := uint64(0)
			s.Expire = func(reason Reason) { gone = append(gone, fmt.Sprint(id, " ", reason)) }
			l, err := table.Acquire(s)
			if want := w.acquire(s); !errors.Is(err, want) {
				t.Fatalf("step %d: Acquire says %v, its twin %v", step, err, want)
			}
			if err == nil {
				id = l.Snapshot().ID
				leases[orig] = l
			}
		case 6, 7, 8, 9, 10:
			if f, l := pick(); f != nil {
				d, packets, bytes := Dir(next(2)), int64(next(5)), int64(next(9000))
				l.Account(d, packets, bytes)
				w.account(f, d, packets, bytes)
			}
		case 11, 12, 13:
			if f, l := pick(); f != nil {
				s := State(1 + next(8))
				l.SetState(s)
				if f.Orig.proto == protoTCP {
					w.setState(f, s)
				}
			}
		case 14:
			if f, l := pick(); f != nil {
				l.Release("done")
				l.Release("again")
				l.Account(Original, 1, 1)
				l.SetState(Established)
				delete(w.flows, f.Orig)
				w.stats.Released++
			}
		case 15:
			clock.advance(time.Duration(next(1500)) * time.Millisecond)
		case 16:
			clock.advance(time.Duration(next(130)) * time.Second)
		case 17, 18:
			next := table.Expire(clock.t)
			w.expire()
			for _, f := range w.flows {
				if left := f.LastSeen.Add(w.timeout(f)).Sub(clock.t) + 2<<grainBits; next > max(left, 2<<grainBits) {
					t.Fatalf("step %d: Expire wants to be called in %v, a flow ends in %v", step, next, left)
				}
			}
			if len(w.flows) == 0 && next != Never {
				t.Fatalf("step %d: Expire wants to be called in %v for no flow", step, next)
			}
		case 19:
			switch next(4) {
			case 0:
				w.limits = Limits{Max: 1 + next(40), HalfOpen: 1 + next(20), PerDestination: next(30), NewPerSecond: []int{0, 0, 1, 5, 10}[next(5)]}
				if next(8) == 0 {
					w.limits.TotalBytes = int64(1 + next(9_000_000))
				}
				table.SetLimits(w.limits)
			case 1:
				w.timeouts.UDP = time.Duration(1+next(60)) * time.Second
				w.timeouts.TCPEstablished = time.Duration(1+next(600)) * time.Second
				table.SetTimeouts(w.timeouts)
			}
		}
		compare(t, step, table, w, leases)
		slices.Sort(gone)
		slices.Sort(w.gone)
		if !slices.Equal(gone, w.gone) {
			t.Fatalf("step %d: the table ended %q, its twin %q", step, gone, w.gone)
		}
		gone, w.gone = nil, nil
	}
	if assuredEvicted {
		t.Error("a flow that was answered was dropped for a new one")
	}
	for _, l := range table.Leases() {
		l.Release("end")
	}
	wantEmpty(t, table)
}

func compare(t *testing.T, step int, table *Table, w *twin, leases map[Tuple]*Lease) {
	t.Helper()
	got, want := table.List(), w.list()
	for i := range got { // times are the same if they are the same instant
		got[i].Start, got[i].LastSeen = got[i].Start.Round(0), got[i].LastSeen.Round(0)
	}
	if len(got) != len(want) || len(got) > 0 && !reflect.DeepEqual(got, want) {
		t.Fatalf("step %d: the table holds\n%+v\nits twin\n%+v", step, got, want)
	}
	for orig := range w.flows {
		if table.Lookup(orig) != leases[orig] {
			t.Fatalf("step %d: Lookup(%v) does not find its lease", step, orig)
		}
	}
	if table.Len() != len(w.flows) {
		t.Fatalf("step %d: Len is %d, not %d", step, table.Len(), len(w.flows))
	}
	s := w.stats
	dests := map[[16]byte]bool{}
	for _, f := range w.flows {
		if !f.Ingress {
			dests[f.Orig.dst] = true
		}
		if f.State == SynSent || f.State == SynRecv {
			s.HalfOpen++
		}
	}
	s.Count, s.Max, s.Destinations = len(w.flows), w.limits.Max, len(slices.Collect(maps.Keys(dests)))
	if got := table.Stats(); got != s {
		t.Fatalf("step %d: the table counts\n%+v\nits twin\n%+v", step, got, s)
	}
}

func TestTableAgainstItsTwin(t *testing.T) {
	for seed := range uint64(12) {
		rng := rand.New(rand.NewPCG(seed, 2))
		play(t, 1500, rng.IntN)
	}
}

// FuzzTable lets the fuzzer choose the operations.
func FuzzTable(f *testing.F) {
	f.Add([]byte{0, 1, 0, 6, 0, 1, 9, 15, 200, 6, 0, 0, 3, 16, 100, 17, 17, 19, 0, 1})
	f.Add([]byte{0, 5, 1, 11, 0, 2, 0, 6, 1, 14, 0, 16, 120, 17})
	f.Fuzz(func(t *testing.T, data []byte) {
		play(t, min(len(data), 300), func(n int) int {
			if len(data) == 0 {
				return 0
			}
			b := int(data[0])
			if data = data[1:]; n > 256 && len(data) > 0 {
				b, data = b<<8|int(data[0]), data[1:]
			}
			return b % n
		})
	})
}
