package forwarder

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/internal/testutil"
)

func TestRunQueueRunsEachTaskOncePerRequest(t *testing.T) {
	q := engine.NewRunQueue(func() {})
	ran, after := 0, 0
	var tk engine.Task
	tk.Run = func() {
		if ran++; ran == 1 {
			q.Put(&tk) // a task may ask for itself while it runs
		}
	}
	tk.Then = func() { after++ }
	q.Put(&tk)
	q.Put(&tk) // already queued
	for next := q.Next(); next != nil; next = q.Next() {
		q.Run(next)
	}
	if ran != 2 || after != 2 {
		t.Errorf("ran %d times, and %d times after it, want 2", ran, after)
	}
}

func TestRunQueueWakesWhoRestsOnce(t *testing.T) {
	wakes := 0
	q := engine.NewRunQueue(func() { wakes++ })
	var a, b engine.Task
	if !q.Rest() {
		t.Fatal("an empty queue lets nobody rest")
	}
	q.Put(&a)
	q.Put(&b)
	if wakes != 1 {
		t.Errorf("%d wakes for two tasks, want 1", wakes)
	}
	q.Woken() // a helper, which takes both
	q.Next()
	q.Next()
	var c engine.Task
	q.Put(&c)
	if wakes != 2 {
		t.Errorf("a helper took the wake, and the leader was not called again: %d wakes", wakes)
	}
	q.Woken()
	q.Wakened()
	if q.Rest() {
		t.Error("a queue with a task lets the leader rest")
	}
}

func newTestEngine(t *testing.T, threads int) *engine.Engine {
	t.Helper()
	e, err := engine.New(threads)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- e.Run() }()
	t.Cleanup(func() {
		e.Close()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the engine ended with %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("the engine did not end")
		}
		e.Free()
	})
	return e
}

// The leader sleeps with its P: a goroutine that stops the world must get it, and other goroutines
// must not starve, even if there is only one other P.
func TestTheLeadersSleepHoldsNobodyUp(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	e := newTestEngine(t, 1)
	over := make(chan struct{})
	go func() { // ends with the last round, or hangs with the test failed
		defer close(over)
		for range 100 {
			ran := make(chan struct{})
			e.Put(&engine.Task{Run: func() { close(ran) }})
			<-ran
			runtime.GC()
		}
	}()
	select {
	case <-over:
	case <-time.After(20 * time.Second):
		t.Fatal("the world was not stopped a hundred times in 20 s")
	}
}

// counter is a task that must not run twice at once.
type counter struct {
	engine.Task
	running atomic.Int32
	asked   atomic.Int64
	seen    atomic.Int64
}

// Every request is served, from whichever goroutine it comes and whatever the engine is doing, and
// no task runs twice at once.
func TestEngineServesEveryRequest(t *testing.T) {
	e := newTestEngine(t, 3)
	tasks := make([]counter, 8)
	for i := range tasks {
		c := &tasks[i]
		c.Run = func() {
			if c.running.Add(1) != 1 {
				t.Error("a task runs twice at once")
			}
			c.seen.Store(c.asked.Load())
			if i%2 == 0 {
				time.Sleep(50 * time.Microsecond) // long rounds call the helpers
			}
			c.running.Add(-1)
		}
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 3000 {
				c := &tasks[i%len(tasks)]
				c.asked.Add(1)
				e.Put(&c.Task)
				if i%64 == 0 {
					time.Sleep(300 * time.Microsecond) // until the engine rests
				}
			}
		})
	}
	wg.Wait()
	testutil.Eventually(t, "every task has seen every request", func() bool {
		for i := range tasks {
			if tasks[i].seen.Load() != tasks[i].asked.Load() {
				return false
			}
		}
		return true
	})
}

// ponger answers each byte, one at a time.
type ponger struct {
	fd      int
	running atomic.Int32
	t       *testing.T
}

func (p *ponger) PollReady(uint32) {
	if p.running.Add(1) != 1 {
		p.t.Error("a handler runs twice at once")
	}
	var b [16]byte
	for {
		n, err := unix.Read(p.fd, b[:])
		if n <= 0 || err != nil {
			break
		}
		_, _ = unix.Write(p.fd, b[:n])
	}
	p.running.Add(-1)
}

func TestEngineLosesNoEvent(t *testing.T) {
	e := newTestEngine(t, 3)
	var wg sync.WaitGroup
	for range 6 {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
		if err := unix.SetNonblock(fds[1], true); err != nil {
			t.Fatal(err)
		}
		if err := unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
			t.Fatal(err)
		}
		tok, err := e.Poll.Add(fds[1], unix.EPOLLIN, &ponger{fd: fds[1], t: t})
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer e.Poll.Remove(tok, fds[1])
			b := make([]byte, 1)
			for i := range 5000 {
				if _, err := unix.Write(fds[0], b); err != nil {
					t.Errorf("round %d: %v", i, err)
					return
				}
				n, err := unix.Read(fds[0], b)
				for err == unix.EINTR {
					n, err = unix.Read(fds[0], b)
				}
				if n != 1 {
					t.Errorf("round %d was not answered: %v", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestEngineAtRestUsesNoProcessor(t *testing.T) {
	newTestEngine(t, 3)
	used := func() time.Duration {
		var ru unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
			t.Fatal(err)
		}
		return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	time.Sleep(50 * time.Millisecond) // lets its goroutines begin
	before := used()
	time.Sleep(300 * time.Millisecond)
	if d := used() - before; d > 60*time.Millisecond {
		t.Errorf("an engine with nothing to do used %v of 300 ms", d)
	}
}
