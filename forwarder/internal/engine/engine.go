package engine

// The engine runs everything that moves bytes: what epoll reports of the device's
// queues and of host sockets, and the tasks that this gives rise to.
//
// One goroutine, the leader, sleeps in epoll_wait(2) itself, not in the Go
// runtime's poller, and runs what it finds to completion: a packet that comes in on
// the device leaves through its socket, and the answer returns, with no other
// thread involved. On a machine whose processors client and server want themselves,
// a hand-over to a thread costs more than the work.
//
// When the leader has been busy with several flows for a while without a pause it calls
// helpers, which take events and tasks from the same two places until there are none:
//
//	             ┌─ leader: epoll_wait ─► dispatch ─► tasks ─┐ busy for helpAfter
//	epoll, runq ─┤                                           ▼
//	             └─ helpers: the same, until nothing is left
//
// Neither handlers nor tasks block, but for a device that is full, which its writer
// waits for; none of either runs twice at once (poller.go, runq.go), and an idle engine
// is one thread asleep.
//
// The leader sleeps without telling the Go scheduler, and keeps its P, so that a wake-up
// finds everything as it was, and the runtime's monitor has no reason to look every 20 µs
// whether the P is to be taken away. Nothing of the runtime's is held up: who wants the
// world stopped, or the leader's stack, sends it a signal, again and again, and the
// monitor does when it has run for 10 ms. The signal ends the sleep, and the next one
// is told, as is every one while helpers want the other Ps.

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
	// helpAfter is how long the leader works without a pause, helpBytes how much it
	// moves meanwhile, and helpTurns how often that is another flow's, before it calls help
	// and, if the sandbox sends, has the device use its other queues. All else is better off
	// with one thread: requests and responses, new connections, and a single flow, whose
	// endpoint has one lock.
	helpAfter = 40 * time.Microsecond
	helpBytes = 256 << 10
	helpTurns = 2
	// pause is the least rest after which the leader counts as idle until then.
	pause = 20 * time.Microsecond
	// helpRounds is how often a helper finds nothing to do before it goes.
	helpRounds = 4
)

type Engine struct {
	Poll *Poller
	Runq *RunQueue

	helpers int
	idle    atomic.Int32  // helpers that wait to be called
	help    chan struct{} // capacity helpers; closed by the leader
	Start   time.Time
	Spread  atomic.Bool   // the device has more than its first queue attached
	Crowded chan struct{} // capacity 1: it has not, and several flows of the sandbox's send in bulk
	CrowdAt atomic.Int64  // when they did last; a Duration since start

	bulk  atomic.Int64  // bytes moved
	up    atomic.Int64  // those that the sandbox sent
	turns atomic.Int64  // how often they were another flow's than the last ones
	last  atomic.Uint64 // whose the last ones were
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

// MovedUp notes n bytes of fl's that the sandbox sent.
func (e *Engine) MovedUp(flow uint64, n int64) {
	e.Moved(flow, n)
	e.up.Add(n)
}

// Moved notes n bytes of fl's.
func (e *Engine) Moved(flow uint64, n int64) {
	e.bulk.Add(n)
	if e.last.Load() != flow {
		e.last.Store(flow)
		e.turns.Add(1)
	}
}

// helped tells whether somebody beside the leader is at work.
func (e *Engine) helped() bool { return int(e.idle.Load()) < e.helpers }

// Put queues t; see RunQueue.
func (e *Engine) Put(t *Task) { e.Runq.Put(t) }

// Run works until close, and returns after its helpers have.
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
				e.Poll.wake() // what woke us was meant for the leader
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

// work dispatches events and runs tasks. It tells whether there were any.
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

// Close makes run return. Tasks that are queued are not run.
func (e *Engine) Close() { e.Poll.close() }

// Responds returns a channel that is closed when a task has run that is queued now.
func (e *Engine) Responds() <-chan struct{} {
	done := make(chan struct{})
	e.Put(&Task{Run: func() { close(done) }})
	return done
}

// Free releases the engine's descriptors. No goroutine may be in it.
func (e *Engine) Free() { e.Poll.free() }
