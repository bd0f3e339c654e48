package nat

import (
	"context"
	"runtime"
	"testing"
	"time"
)

func TestTheHotCallsAllocateNothing(t *testing.T) {
	table := NewTable(Config{Limits: Limits{TotalBytes: 1 << 60}})
	tcp, udp := acquire(t, table, Spec{Orig: numbered(6, 1)}), acquire(t, table, Spec{Orig: numbered(17, 1)})
	for name, f := range map[string]func(){
		"Account":        func() { tcp.Account(Original, 1, 1500); udp.Account(Reply, 1, 1500) },
		"Lookup":         func() { table.Lookup(numbered(6, 1)) },
		"Lookup of none": func() { table.Lookup(numbered(6, 2)) },
		"State":          func() { tcp.State() },
		"SetState":       func() { tcp.SetState(Established); tcp.SetState(FinWait) },
		"NewTuple":       func() { numbered(6, 1).Reverse() },
		"Expire":         func() { table.Expire(time.Now()) },
		"a refusal":      func() { _, _ = table.Acquire(Spec{}) },
	} {
		limit := 0.0
		if name == "a refusal" {
			limit = 1 // the lease that is thrown away
		}
		if n := testing.AllocsPerRun(1000, f); n > limit {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
	n := 0
	if a := testing.AllocsPerRun(1000, func() {
		n++
		acquire(t, table, Spec{Orig: numbered(17, n+10)}).Release("done")
	}); a > 1 {
		t.Errorf("a flow's life allocates %v times, more than its lease", a)
	}
}

func TestMemoryPerFlowIsBounded(t *testing.T) {
	const flows, limit = 20_000, 1024
	var before, after runtime.MemStats
	table := NewTable(Config{})
	runtime.GC()
	runtime.ReadMemStats(&before)
	for n := range flows {
		acquire(t, table, Spec{Orig: numbered(17, n)})
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if per := (after.HeapAlloc - before.HeapAlloc) / flows; per > limit {
		t.Errorf("a flow takes %d bytes, more than %d", per, limit)
	} else {
		t.Logf("a flow takes %d bytes", per)
	}
	runtime.KeepAlive(table)
}

func BenchmarkAccount(b *testing.B) {
	for _, run := range []bool{false, true} {
		name := "clock read"
		if run {
			name = "clock cached"
		}
		b.Run(name, func(b *testing.B) {
			table := NewTable(Config{})
			l := acquire(b, table, Spec{Orig: numbered(6, 1)})
			l.SetState(Established)
			if run {
				l.Account(Original, 1, 1)
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				go table.Run(ctx)
			}
			for b.Loop() {
				l.Account(Original, 1, 1500)
			}
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	table := NewTable(Config{})
	for n := range 10_000 {
		acquire(b, table, Spec{Orig: numbered(17, n)})
	}
	key := numbered(17, 5000)
	for b.Loop() {
		table.Lookup(key)
	}
}

func BenchmarkAcquireRelease(b *testing.B) {
	table := NewTable(Config{})
	for n := range 10_000 {
		acquire(b, table, Spec{Orig: numbered(17, n)})
	}
	spec := Spec{Orig: numbered(6, 1)}
	for b.Loop() {
		spec.Orig.sport++
		l, err := table.Acquire(spec)
		if err != nil {
			b.Fatal(err)
		}
		l.Release("done")
	}
}

// BenchmarkExpire is one second's work with 60 000 flows that see packets all the time.
func BenchmarkExpire(b *testing.B) {
	clock := newFakeClock()
	table := NewTable(Config{Now: clock.now})
	var leases []*Lease
	for n := range 60_000 {
		leases = append(leases, acquire(b, table, Spec{Orig: numbered(17, n)}))
		clock.advance(time.Millisecond / 2)
	}
	for b.Loop() {
		b.StopTimer()
		clock.advance(time.Second)
		for _, l := range leases {
			l.seen.Store(table.clock())
		}
		b.StartTimer()
		table.Expire(clock.t)
	}
}
