package nat

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestAcquireRefuses(t *testing.T) {
	far := func(n int) string { return fmt.Sprintf("192.0.2.1:%d", n) }
	for _, tt := range []struct {
		name   string
		limits Limits
		before func(t *testing.T, table *Table)
		spec   Spec
		want   error
	}{
		{"a flow that exists", Limits{}, func(t *testing.T, table *Table) {
			acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:1", far(1))})
		}, Spec{Orig: tuple(6, "10.0.2.100:1", far(1))}, ErrExists},
		{"a flow that is the mapped form of one that exists", Limits{}, func(t *testing.T, table *Table) {
			acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:1", far(1))})
		}, Spec{Orig: tuple(6, "10.0.2.100:1", "[::ffff:192.0.2.1]:1")}, ErrExists},
		{"one more than nf_conntrack_max when all others were answered", Limits{Max: 2}, func(t *testing.T, table *Table) {
			acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:1", far(1))}).SetState(Established)
			acquire(t, table, Spec{Orig: tuple(17, "10.0.2.100:1", far(1))}).Account(Reply, 1, 100)
		}, Spec{Orig: tuple(6, "10.0.2.100:2", far(1))}, ErrTableFull},
		{"a third to a far address that may have two", Limits{PerDestination: 2}, func(t *testing.T, table *Table) {
			acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:1", far(1))})
			acquire(t, table, Spec{Orig: tuple(17, "10.0.2.100:1", far(2))})
		}, Spec{Orig: tuple(6, "10.0.2.100:2", far(3))}, ErrDestLimit},
		{"not one to another far address", Limits{PerDestination: 2}, func(t *testing.T, table *Table) {
			acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:1", far(1))})
			acquire(t, table, Spec{Orig: tuple(17, "10.0.2.100:1", far(2))})
		}, Spec{Orig: tuple(6, "10.0.2.100:2", "192.0.2.2:1")}, nil},
		{"not one to a published port, whose destination is the sandbox", Limits{PerDestination: 1}, func(t *testing.T, table *Table) {
			acquire(t, table, Spec{Orig: tuple(6, far(1), "10.0.2.100:80"), Ingress: true})
		}, Spec{Orig: tuple(6, far(2), "10.0.2.100:80"), Ingress: true}, nil},
		{"a third half-open flow where two are allowed", Limits{HalfOpen: 2}, func(t *testing.T, table *Table) {
			acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:1", far(1))})
			acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:2", far(1))}).SetState(SynRecv)
		}, Spec{Orig: tuple(6, "10.0.2.100:3", far(1))}, ErrHalfOpen},
		{"not one after a handshake was finished", Limits{HalfOpen: 1}, func(t *testing.T, table *Table) {
			acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:1", far(1))}).SetState(Established)
		}, Spec{Orig: tuple(6, "10.0.2.100:3", far(1))}, nil},
		{"not a UDP flow for half-open TCP flows", Limits{HalfOpen: 1}, func(t *testing.T, table *Table) {
			acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:1", far(1))})
		}, Spec{Orig: tuple(17, "10.0.2.100:3", far(1))}, nil},
		{"a fourth in a second where three are allowed", Limits{NewPerSecond: 3}, func(t *testing.T, table *Table) {
			for n := range 3 {
				acquire(t, table, Spec{Orig: tuple(17, "10.0.2.100:1", far(n+1))})
			}
		}, Spec{Orig: tuple(17, "10.0.2.100:9", far(1))}, ErrRate},
		{"any once the bytes are used up", Limits{TotalBytes: 1000}, func(t *testing.T, table *Table) {
			l := acquire(t, table, Spec{Orig: tuple(17, "10.0.2.100:1", far(1))})
			l.Account(Original, 1, 400)
			l.Account(Reply, 1, 600)
			l.Release("done")
		}, Spec{Orig: tuple(17, "10.0.2.100:9", far(1))}, ErrTotalBytes},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := NewTable(Config{Limits: tt.limits, Now: newFakeClock().now})
			tt.before(t, table)
			n := table.Len()
			l, err := table.Acquire(tt.spec)
			if !errors.Is(err, tt.want) || (l != nil) != (err == nil) {
				t.Fatalf("Acquire: %v, want %v", err, tt.want)
			}
			if err != nil && table.Len() != n {
				t.Errorf("a refused flow changed the table from %d flows to %d", n, table.Len())
			}
		})
	}
}

func TestNewFlowRateRefills(t *testing.T) {
	clock := newFakeClock()
	table := NewTable(Config{Limits: Limits{NewPerSecond: 10}, Now: clock.now})
	admitted, n := 0, 0
	for range 1000 { // ten seconds in steps of 10 ms
		for range 3 {
			n++
			if _, err := table.Acquire(Spec{Orig: numbered(17, n)}); err == nil {
				admitted++
			} else if !errors.Is(err, ErrRate) {
				t.Fatal(err)
			}
		}
		clock.advance(10 * time.Millisecond)
	}
	if admitted < 108 || admitted > 110 { // a second's burst and ten seconds' worth
		t.Errorf("%d flows in ten seconds of ten a second and a burst of ten", admitted)
	}
	if s := table.Stats(); s.RateLimit != uint64(n-admitted) {
		t.Errorf("%d refusals counted of %d", s.RateLimit, n-admitted)
	}
}

func TestEarlyDrop(t *testing.T) {
	clock := newFakeClock()
	var dropped []string
	table := NewTable(Config{Limits: Limits{Max: 4}, Now: clock.now})
	add := func(name string, proto uint8) *Lease {
		return acquire(t, table, Spec{Orig: numbered(proto, table.Len()+len(dropped)+1), Expire: func(reason Reason) {
			dropped = append(dropped, name+": "+string(reason))
		}})
	}
	add("first mute", protoUDP)
	add("established", protoTCP).SetState(Established)
	add("second mute", protoICMP)
	closing := add("closing", protoTCP)
	closing.SetState(Established)
	closing.SetState(TimeWait)
	add("a", protoTCP).SetState(Established)
	add("b", protoUDP).Account(Reply, 1, 1)
	add("c", protoICMP).Account(Reply, 1, 1)
	if _, err := table.Acquire(Spec{Orig: numbered(6, 99)}); !errors.Is(err, ErrTableFull) {
		t.Errorf("with nothing to drop: %v", err)
	}
	want := []string{"closing: early drop", "first mute: early drop", "second mute: early drop"}
	if fmt.Sprint(dropped) != fmt.Sprint(want) {
		t.Errorf("dropped %q, want %q", dropped, want)
	}
}

func TestTimeouts(t *testing.T) {
	tcp := func(s State) func(*Lease, *fakeClock) {
		return func(l *Lease, _ *fakeClock) { l.SetState(Established); l.SetState(s) }
	}
	for _, tt := range []struct {
		name  string
		proto uint8
		short bool
		do    func(*Lease, *fakeClock)
		want  time.Duration
	}{
		{"a SYN without an answer", 6, false, nil, 120 * time.Second},
		{"a SYN/ACK without an ACK", 6, false, tcp(SynRecv), 60 * time.Second},
		{"an idle connection", 6, false, tcp(Established), 5 * 24 * time.Hour},
		{"one that said FIN", 6, false, tcp(FinWait), 120 * time.Second},
		{"one that heard FIN", 6, false, tcp(CloseWait), 7440 * time.Second},
		{"one that waits for the last ACK", 6, false, tcp(LastAck), 30 * time.Second},
		{"TIME_WAIT, as long as the stack's own", 6, false, tcp(TimeWait), time.Second},
		{"one that was reset", 6, false, tcp(Close), 10 * time.Second},
		{"a datagram without an answer, by RFC 4787 REQ-5", 17, false, nil, 120 * time.Second},
		{"a question and its answer", 17, false, func(l *Lease, _ *fakeClock) { l.Account(Reply, 1, 1) }, 120 * time.Second},
		{"a stream", 17, false, func(l *Lease, c *fakeClock) {
			l.Account(Reply, 1, 1)
			c.advance(2*time.Second + 1)
			l.Account(Original, 1, 1)
		}, 120 * time.Second},
		{"a DNS flow, however long it lasts", 17, true, func(l *Lease, c *fakeClock) {
			l.Account(Reply, 1, 1)
			c.advance(9 * time.Second)
			l.Account(Original, 1, 1)
			c.advance(9 * time.Second)
			l.Account(Reply, 1, 1)
		}, 10 * time.Second},
		{"one that turned out to be no DNS", 17, true, func(l *Lease, c *fakeClock) {
			l.Account(Reply, 1, 1)
			c.advance(9 * time.Second)
			l.Outlast()
			l.Account(Original, 1, 1)
		}, 120 * time.Second},
		{"a ping", 1, false, func(l *Lease, _ *fakeClock) { l.Account(Reply, 1, 1) }, 30 * time.Second},
		{"a ping of IPv6", 58, false, nil, 30 * time.Second},
		{"another protocol", 47, false, nil, 600 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			clock := newFakeClock()
			table := NewTable(Config{Now: clock.now})
			var ended Reason
			l := acquire(t, table, Spec{Orig: numbered(tt.proto, 1), Short: tt.short, Expire: func(r Reason) { ended = r }})
			if tt.do != nil {
				tt.do(l, clock)
			}
			if got := l.Snapshot().TimeoutLeft; got != tt.want {
				t.Errorf("it has %v left, want %v", got, tt.want)
			}
			clock.advance(tt.want - 1)
			table.Expire(clock.t)
			if ended != "" {
				t.Fatalf("it ended early")
			}
			clock.advance(1 + 1<<grainBits)
			if next := table.Expire(clock.t); next != Never {
				t.Errorf("Expire wants to be called again in %v", next)
			}
			if ended != ReasonTimeout {
				t.Fatalf("it did not end, or by %q", ended)
			}
			want := map[State]Reason{TimeWait: ReasonClosed, Close: ReasonReset}[l.Snapshot().State]
			if want == "" {
				want = ReasonTimeout
			}
			if f := l.Snapshot(); f.TimeoutLeft != 0 || f.Reason != want || !f.End.Equal(clock.t) {
				t.Errorf("its record, which should say %q: %+v", want, f)
			}
			wantEmpty(t, table)
		})
	}
}

func TestAPacketKeepsAFlow(t *testing.T) {
	clock := newFakeClock()
	table := NewTable(Config{Now: clock.now})
	l := acquire(t, table, Spec{Orig: numbered(17, 1)})
	for range 100 {
		clock.advance(29 * time.Second)
		l.Account(Original, 1, 1)
		table.Expire(clock.t)
	}
	if table.Len() != 1 {
		t.Fatal("a flow with a packet every 29 s ended")
	}
	// A datagram that nobody answers keeps it UNREPLIED, as in the kernel.
	if f := l.Snapshot(); f.SeenReply || f.Assured || f.State != Unreplied {
		t.Errorf("it is %+v", f)
	}
}

// A flow whose owner holds bytes that nobody has taken is not silent, however long it stands;
// once it holds none, it may be silent for as long as any other.
func TestBytesThatWaitKeepAFlow(t *testing.T) {
	for s := SynSent; s <= Close; s++ {
		t.Run(s.String(), func(t *testing.T) {
			clock := newFakeClock()
			table := NewTable(Config{Now: clock.now})
			held := true
			l := acquire(t, table, Spec{Orig: numbered(protoTCP, 1), Pending: func() bool { return held }})
			l.SetState(s)
			timeout := l.Snapshot().TimeoutLeft
			for range 5 {
				clock.advance(timeout + time.Second)
				table.Expire(clock.t)
			}
			if l.Ended() {
				t.Fatal("it ended while bytes waited")
			}
			held = false
			clock.advance(timeout - time.Second)
			if table.Expire(clock.t); l.Ended() {
				t.Fatal("it ended before it had been silent for its timeout")
			}
			clock.advance(2 * time.Second)
			if table.Expire(clock.t); !l.Ended() {
				t.Fatal("it did not end in its silence")
			}
			wantEmpty(t, table)
		})
	}
}

// What comes from outside keeps a flow for a while and not for ever, or whoever the
// sandbox once wrote to would keep the way in.
func TestPacketsFromOutsideKeepAFlowOnlySoLong(t *testing.T) {
	for _, row := range []struct {
		what  string
		spec  Spec
		dir   Dir // of the packets
		alive bool
	}{
		{"UDP, answered again and again", Spec{Orig: numbered(protoUDP, 1)}, Reply, false},
		{"UDP, asked again and again", Spec{Orig: numbered(protoUDP, 1)}, Original, true},
		{"UDP, a published port's client", Spec{Orig: numbered(protoUDP, 1), Ingress: true}, Reply, true},
		{"ICMP", Spec{Orig: numbered(protoICMP, 1)}, Reply, true},
	} {
		clock := newFakeClock()
		table := NewTable(Config{Now: clock.now})
		l := acquire(t, table, row.spec)
		l.Account(Original, 1, 1)
		for clock.t.Sub(l.Snapshot().Start) < DefaultTimeouts().UDPInbound-time.Second {
			clock.advance(10 * time.Second)
			table.Expire(clock.t)
			l.Account(row.dir, 1, 1)
		}
		if l.Ended() {
			t.Errorf("%s: it ended while it may live", row.what)
		}
		clock.advance(time.Second)
		table.Expire(clock.t)
		if alive := table.Len() == 1; alive != row.alive {
			t.Errorf("%s: alive after five minutes: %v", row.what, alive)
		}
	}
}

func TestReleaseRepaysEveryBudgetOnce(t *testing.T) {
	ends := map[string]func(*Table, *Lease, *fakeClock){
		"Release":      func(_ *Table, l *Lease, _ *fakeClock) { l.Release("done") },
		"Kill":         func(_ *Table, l *Lease, _ *fakeClock) { l.Kill("policy") },
		"the timeout":  func(table *Table, _ *Lease, c *fakeClock) { c.advance(9000 * time.Hour); table.Expire(c.t) },
		"early drop":   func(table *Table, l *Lease, _ *fakeClock) { l.SetState(TimeWait); table.makeRoom(t) },
		"byte budget":  func(table *Table, l *Lease, c *fakeClock) { l.Account(Reply, 1, 1<<40); table.Expire(c.t) },
		"all together": func(table *Table, l *Lease, c *fakeClock) { l.Release("a"); l.Kill("b"); l.Release("c") },
	}
	for name, end := range ends {
		for _, s := range []State{SynSent, SynRecv, Established, FinWait, TimeWait, Close} {
			clock := newFakeClock()
			destroyed := 0
			table := NewTable(Config{
				Limits: Limits{Max: 1, HalfOpen: 1, PerDestination: 1, TotalBytes: 1 << 40}, Now: clock.now,
				OnEvent: func(ev Event) {
					if ev.Type == Destroy {
						destroyed++
					}
				},
			})
			for n := range 3 {
				l, err := table.Acquire(Spec{Orig: numbered(6, n)})
				if errors.Is(err, ErrTotalBytes) {
					break
				} else if err != nil {
					t.Fatalf("%s of a flow in %v did not repay: %v", name, s, err)
				}
				l.SetState(s)
				end(table, l, clock)
				l.Release("once more")
				if destroyed != n+1 && name != "early drop" {
					t.Errorf("%s: %d DESTROY events for %d flows", name, destroyed, n+1)
				}
			}
			wantEmpty(t, table)
		}
	}
}

// makeRoom has the table drop a flow early, for one that goes away at once.
func (t *Table) makeRoom(tb testing.TB) {
	acquire(tb, t, Spec{Orig: tuple(17, "10.0.2.100:9", "198.51.100.9:9")}).Release("made room")
}

// TestNoAnsweredFlowIsEvicted hammers a small table from several goroutines and
// watches every early drop.
func TestNoAnsweredFlowIsEvicted(t *testing.T) {
	var wrong, drops atomic.Int64
	table := NewTable(Config{Limits: Limits{Max: 50}, OnEvent: func(ev Event) {
		if ev.Type == Destroy && ev.Flow.Reason == ReasonEarlyDrop {
			drops.Add(1)
			if ev.Flow.Assured && !ev.Flow.State.closing() || ev.Flow.SeenReply && !ev.Flow.State.closing() {
				wrong.Add(1)
			}
		}
	}})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 3))
			var mine []*Lease
			for n := range 4000 {
				proto := []uint8{protoTCP, protoUDP}[rng.IntN(2)]
				if l, err := table.Acquire(Spec{Orig: numbered(proto, g<<16|n)}); err == nil {
					mine = append(mine, l)
				}
				if len(mine) == 0 {
					continue
				}
				i := rng.IntN(len(mine))
				switch l := mine[i]; rng.IntN(6) {
				case 0, 1:
					l.Account(Reply, 1, 1)
				case 2:
					l.SetState(Established)
				case 3:
					l.SetState(TimeWait)
				case 4:
					l.Release("done")
					mine = append(mine[:i], mine[i+1:]...)
				case 5:
					table.Expire(time.Now())
					table.Lookup(l.Orig())
					l.Snapshot()
				}
				if n := table.Len(); n > 50 {
					t.Errorf("%d flows in a table of 50", n)
				}
			}
			for _, l := range mine {
				l.Release("end")
			}
		})
	}
	wg.Wait()
	if wrong.Load() > 0 || drops.Load() == 0 {
		t.Errorf("of %d flows dropped early %d had been answered", drops.Load(), wrong.Load())
	}
	wantEmpty(t, table)
}

func TestByteBudgetEndsEveryFlow(t *testing.T) {
	clock := newFakeClock()
	table := NewTable(Config{Now: clock.now})
	ended := 0
	var l *Lease
	for n := range 3 {
		l = acquire(t, table, Spec{Orig: numbered(6, n), Expire: func(reason Reason) {
			if reason == ReasonTotalBytes {
				ended++
			}
		}})
		l.Account(Original, 1, 100)
	}
	table.SetLimits(Limits{TotalBytes: 301}) // what was carried before it was set counts
	if table.Expire(clock.t); ended != 0 {
		t.Fatal("flows were ended before the budget was used up")
	}
	<-drain(table.wake)
	l.Account(Reply, 1, 1)
	select {
	case <-table.wake:
	default:
		t.Error("the owner of Expire was not woken")
	}
	if table.Expire(clock.t); ended != 3 {
		t.Errorf("%d of 3 flows were ended", ended)
	}
	table.SetLimits(Limits{TotalBytes: 1000})
	acquire(t, table, Spec{Orig: numbered(6, 9)})
}

// drain empties c and gives a channel that is ready.
func drain(c chan struct{}) chan struct{} {
	select {
	case <-c:
	default:
	}
	ready := make(chan struct{})
	close(ready)
	return ready
}

// TestRun is about the goroutine that owns time, under synctest's clock.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := NewTable(Config{})
		ctx, cancel := context.WithCancel(t.Context())
		go table.Run(ctx)
		synctest.Wait()
		began := time.Now()
		var endedAt atomic.Pointer[time.Time]
		expire := func(Reason) { now := time.Now(); endedAt.Store(&now) }
		after := func() time.Duration { return endedAt.Load().Sub(began) }

		acquire(t, table, Spec{Orig: numbered(17, 1), Expire: expire})
		time.Sleep(121 * time.Second)
		if ended := after(); ended < 120*time.Second || ended > 120*time.Second+1<<grainBits {
			t.Errorf("an unanswered datagram's flow ended after %v", ended)
		}

		// A flow with a timeout of days, then one of a second: Run must be woken.
		l := acquire(t, table, Spec{Orig: numbered(6, 1), Expire: expire})
		l.SetState(Established)
		time.Sleep(time.Hour)
		began = time.Now()
		l.SetState(TimeWait)
		time.Sleep(2 * time.Second)
		if ended := after(); ended < time.Second || ended > time.Second+1<<grainBits {
			t.Errorf("TIME_WAIT ended after %v", ended)
		}

		// While packets flow the clock is cached: never early, hardly late.
		l = acquire(t, table, Spec{Orig: numbered(17, 2), Expire: expire})
		for range 12_000 { // longer than idleTick
			l.Account(Original, 1, 100)
			time.Sleep(time.Millisecond)
		}
		if table.cached.Load() == 0 {
			t.Error("the clock is not cached while packets flow")
		}
		began = time.Now()
		l.Account(Original, 1, 100)
		if left := l.Snapshot().TimeoutLeft; left != 120*time.Second {
			t.Errorf("a flow has %v left at its last packet", left)
		}
		time.Sleep(121 * time.Second)
		if ended := after(); ended < 120*time.Second || ended > 120*time.Second+clockTick+1<<grainBits {
			t.Errorf("a flow ended %v after its last packet", ended)
		}
		if table.cached.Load() != 0 {
			t.Error("the clock is cached with nothing going on")
		}
		wantEmpty(t, table)
		cancel()
		synctest.Wait()
	})
}
