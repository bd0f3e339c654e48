package engine

// The engine runs everything that moves bytes: the handlers of epoll's events on the device's
// queues and host sockets, and the tasks that they queue.
//
// One goroutine, the leader, sleeps in epoll_wait(2) itself, not in the Go runtime's poller, and
// runs what it finds to completion: a packet that comes in on the device leaves through its socket,
// and the answer returns, with no other thread involved. On a machine whose processors are needed
// by client and server, a hand-over to a thread costs more than the work.
//
// When the leader has been busy with several flows for a while without a pause it calls
// helpers, which take events and tasks from the same two places until there are none:
//
//	             ┌─ leader: epoll_wait ─► dispatch ─► tasks ─┐ busy for helpAfter
//	epoll, runq ─┤                                           ▼
//	             └─ helpers: the same, until nothing is left
//
// Handlers and tasks do not block, except that a writer waits for a full device. No handler or task
// runs twice at the same time (poller.go, runq.go), and an idle engine is one sleeping thread.
//
// The leader sleeps without telling the Go scheduler, and keeps its P, so that a wake-up finds
// everything as it was, and the runtime's monitor has no reason to look every 20 µs whether the P
// is to be taken away. The runtime is not held up: a goroutine that wants to stop the world, or the
// leader's stack, signals it repeatedly, and so does the monitor once it has run for 10 ms. The
// signal ends the sleep. The next sleep is announced to the scheduler, as is every one while
// helpers want the other Ps.

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pollBatch is how many events one epoll_wait may return.
	pollBatch = 64
	// taskBatch is how many tasks are run before epoll is asked again.
	taskBatch = 64
	// The leader calls help, and makes the device use its other queues if the sandbox sends, once
	// it has worked for helpAfter without a pause, moved helpBytes meanwhile, and changed flows
	// helpTurns times. Everything else is better off with one thread: requests and responses, new
	// connections, and a single flow, whose endpoint has one lock.
	helpAfter = 40 * time.Microsecond
	helpBytes = 256 << 10
	helpTurns = 2
	// pause is the shortest rest after which the leader counts as idle.
	pause = 20 * time.Microsecond
	// helpRounds is how often a helper finds nothing to do before it leaves.
	helpRounds = 4
)

type Engine struct {
	Poll *Poller
	Runq *RunQueue

	helpers int
	idle    atomic.Int32  // helpers waiting to be called
	help    chan struct{} // capacity helpers; closed by the leader
	Start   time.Time
	Spread  atomic.Bool   // the device has more than its first queue attached
	Crowded chan struct{} // capacity 1; set while only the first queue is attached and several sandbox flows send bulk data
	CrowdAt atomic.Int64  // when they last did; a Duration since start

	bulk  atomic.Int64  // bytes moved
	up    atomic.Int64  // bytes that the sandbox sent
	turns atomic.Int64  // how often the bytes belonged to another flow than the last
	last  atomic.Uint64 // the flow of the last bytes
}

// New returns an engine with at most threads goroutines at work.
func New(threads int) (*Engine, error) {
	p, err := newPoller()
	if err != nil {
		return nil, err
	}
	n := max(threads-1, 0)
	e := &Engine{Poll: p, Runq: NewRunQueue(p.wake), helpers: n, help: make(chan struct{}, n), Crowded: make(chan struct{}, 1), Start: time.Now()}
	p.onWake = e.Runq.Woken
	return e, nil
}

// MovedUp records n bytes of fl's that the sandbox sent.
func (e *Engine) MovedUp(flow uint64, n int64) {
	e.Moved(flow, n)
	e.up.Add(n)
}

// Moved records n bytes of fl's.
func (e *Engine) Moved(flow uint64, n int64) {
	e.bulk.Add(n)
	if e.last.Load() != flow {
		e.last.Store(flow)
		e.turns.Add(1)
	}
}

// helped reports whether a goroutine besides the leader is at work.
func (e *Engine) helped() bool { return int(e.idle.Load()) < e.helpers }

// Put queues t; see RunQueue.
func (e *Engine) Put(t *Task) { e.Runq.Put(t) }

// Run works until Close, and returns after its helpers have.
func (e *Engine) Run() error {
	var wg sync.WaitGroup
	for range e.helpers {
		wg.Go(e.assist) // ends when help is closed
	}
	err := e.lead()
	close(e.help)
	wg.Wait()
	return err
}

func (e *Engine) lead() error {
	events := make([]unix.EpollEvent, pollBatch)
	var busySince time.Duration
	var bulk, up, turns int64 // at busySince
	mayKeepP := runtime.GOMAXPROCS(0) > 1
	interrupted := false
	for {
		rest := e.Runq.Rest()
		timeout := 0
		if rest {
			timeout = -1
		}
		waited := time.Since(e.Start)
		quiet := mayKeepP && !interrupted && !e.helped()
		var n int
		var err error
		n, interrupted, err = e.Poll.wait(events, timeout, quiet)
		e.Runq.Wakened()
		if err != nil {
			return fmt.Errorf("waiting for descriptors: %w", err)
		}
		if e.Poll.closed.Load() {
			return nil
		}
		now := time.Since(e.Start)
		switch {
		case rest && now-waited > pause:
			busySince, bulk, up, turns = now, e.bulk.Load(), e.up.Load(), e.turns.Load()
		case now-busySince > helpAfter && e.bulk.Load()-bulk > helpBytes && e.turns.Load()-turns >= helpTurns:
			if e.idle.Load() > 0 {
				Signal(e.help)
			}
			if e.up.Load()-up > helpBytes {
				e.CrowdAt.Store(int64(now))
				if !e.Spread.Load() {
					Signal(e.Crowded)
				}
			}
		}
		e.work(events[:n])
	}
}

// Signal puts a token into c unless it is full.
func Signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// assist helps when it is called.
func (e *Engine) assist() {
	events := make([]unix.EpollEvent, pollBatch)
	for {
		e.idle.Add(1)
		_, more := <-e.help
		e.idle.Add(-1)
		if !more {
			return
		}
		for idle := 0; idle < helpRounds; {
			n, _, err := e.Poll.wait(events, 0, true)
			if err != nil {
				break // the leader says so
			}
			if e.Poll.closed.Load() {
				e.Poll.wake() // what woke this goroutine was meant for the leader
				break
			}
			if e.work(events[:n]) {
				idle = 0
				continue
			}
			idle++
			runtime.Gosched()
		}
	}
}

// work dispatches events and runs tasks. It reports whether there were any.
func (e *Engine) work(events []unix.EpollEvent) (did bool) {
	for i := range events {
		e.Poll.dispatch(&events[i])
	}
	for range taskBatch {
		t := e.Runq.Next()
		if t == nil {
			return did || len(events) > 0
		}
		e.Runq.Run(t)
		did = true
	}
	return true
}

// Close makes Run return. Queued tasks are not run.
func (e *Engine) Close() { e.Poll.close() }

// Responds returns a channel that is closed once a task queued now has run.
func (e *Engine) Responds() <-chan struct{} {
	done := make(chan struct{})
	e.Put(&Task{Run: func() { close(done) }})
	return done
}

// Free releases the engine's descriptors. No goroutine may be in it.
func (e *Engine) Free() { e.Poll.free() }
