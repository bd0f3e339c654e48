package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sluice/policy"
)

// workerLink is one living worker as the monitor sees it: requests go down the
// channel and are matched with their acks. It is usable from the moment the
// worker said ready until it ends; from then on every call fails with
// errWorkerGone.
type workerLink struct {
	p *process

	mu   sync.Mutex
	seq  uint64
	acks map[uint64]chan error
	gone bool

	ready chan struct{} // closed by readLoop on msgReady
	// wantSocket is told that the worker would like one more socket of the
	// guest's namespace.
	wantSocket func(l *workerLink, v6 bool)
	// wantFlowLog is told that the worker's flow log is full.
	wantFlowLog func(l *workerLink)
	logWants    atomic.Int64  // such wishes that are not answered yet
	grants      *policy.Names // what its workers granted

	// blame is why the monitor has killed the worker; guarded by mu.
	blame string
}

var errWorkerGone = errors.New("the worker is not running")

// A worker that does not answer is killed: what it goes on doing nobody knows, and its
// successor starts with all that it was to be told.
const (
	// ackTimeout bounds one request.
	ackTimeout = 5 * time.Second
	// rulesTimeout bounds new rules. Ten thousand addresses take a worker some 100 ms.
	rulesTimeout = time.Second
	// killPatience bounds the wait for the end of a worker that was killed.
	killPatience = 300 * time.Millisecond
	// watchEvery is how often a worker is asked whether its packets move. Asking wakes an
	// idle worker, hence no more often.
	watchEvery = 10 * time.Second
	// watchPatience bounds the wait for the answer. It costs a worker all of its flows, so it is
	// longer than a machine with many times more to do than processors needs to come round. New
	// rules do not wait for it: they have patience of their own.
	watchPatience = 15 * time.Second
)

func newWorkerLink(p *process, wantSocket func(*workerLink, bool), wantFlowLog func(*workerLink), grants *policy.Names) *workerLink {
	l := &workerLink{p: p, acks: make(map[uint64]chan error), ready: make(chan struct{}), wantSocket: wantSocket, wantFlowLog: wantFlowLog, grants: grants}
	go l.readLoop()
	return l
}

// readLoop is owned by the link and ends with the channel, that is with the
// worker. A worker that breaks the protocol is killed.
func (l *workerLink) readLoop() {
	isReady := false
	for {
		m, _, err := l.p.ch.Receive()
		if err == nil {
			switch {
			case m.Type == msgReady && !isReady:
				isReady = true
				close(l.ready)
			case m.Type == msgAck:
				l.acked(m)
			case m.Type == msgWantSocket4, m.Type == msgWantSocket6:
				l.wantSocket(l, m.Type == msgWantSocket6)
			case m.Type == msgWantFlowLog:
				l.wantFlowLog(l)
			case m.Type == msgGrant:
				var g grantMessage
				if err = json.Unmarshal(m.Body, &g); err != nil {
					err = errProtocol
				} else {
					err = g.take(l.grants, time.Now())
				}
			default:
				err = errProtocol
			}
		}
		if err == nil {
			continue
		}
		if errors.Is(err, errProtocol) {
			_ = l.p.cmd.Kill()
		}
		l.close()
		return
	}
}

func (l *workerLink) acked(m message) {
	l.mu.Lock()
	ch := l.acks[m.Seq]
	delete(l.acks, m.Seq)
	l.mu.Unlock()
	if ch == nil {
		return // its request timed out
	}
	if m.Error != "" {
		ch <- errors.New(cleanLine(m.Error))
	} else {
		ch <- nil
	}
}

// close fails what waits for an ack.
func (l *workerLink) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone = true
	for seq, ch := range l.acks {
		ch <- errWorkerGone
		delete(l.acks, seq)
	}
}

// watch kills a worker that hangs. It is owned by the link, and ends with the worker.
func (l *workerLink) watch(every, patience time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-l.ended():
			return
		case <-t.C:
		}
		if l.requestWithin(patience, msgPing, nil) != nil {
			return
		}
	}
}

// hung kills a worker that failed to do something in time.
func (l *workerLink) hung(why string) error {
	l.mu.Lock()
	l.blame = why + ", and was killed"
	l.mu.Unlock()
	_ = l.p.cmd.Kill()
	t := time.NewTimer(killPatience)
	defer t.Stop()
	select {
	case <-l.ended():
		return fmt.Errorf("%w: it %s, and was killed", errWorkerGone, why)
	case <-t.C:
		return fmt.Errorf("the worker %s, was killed, and has not ended yet", why)
	}
}

// post sends a message that nobody acknowledges.
func (l *workerLink) post(typ string, body any, fds ...int) error {
	err := l.p.ch.Send(typ, 0, body, fds...)
	if errors.Is(err, errStuck) {
		return l.hung("did not take " + typ)
	}
	return err
}

// request sends a message and waits until it took effect.
func (l *workerLink) request(typ string, body any, fds ...int) error {
	return l.requestWithin(ackTimeout, typ, body, fds...)
}

func (l *workerLink) requestWithin(patience time.Duration, typ string, body any, fds ...int) error {
	ch := make(chan error, 1)
	l.mu.Lock()
	if l.gone {
		l.mu.Unlock()
		return errWorkerGone
	}
	l.seq++
	seq := l.seq
	l.acks[seq] = ch
	l.mu.Unlock()
	forget := func() {
		l.mu.Lock()
		delete(l.acks, seq)
		l.mu.Unlock()
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	if err := l.p.ch.Send(typ, seq, body, fds...); err != nil {
		forget()
		if errors.Is(err, errStuck) {
			return l.hung("did not take " + typ)
		}
		return err
	}
	select {
	case err := <-ch:
		return err
	case <-t.C:
		forget()
		return l.hung(fmt.Sprintf("did not confirm %s within %s", typ, patience))
	}
}

// ended and reason make a workerLink supervised.
func (l *workerLink) ended() <-chan struct{} { return l.p.done }

func (l *workerLink) reason() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.blame != "" {
		return "it " + l.blame
	}
	return l.p.why
}

// survived is what went wrong with a request, but for the worker's end: its successor
// starts with what it was told.
func (l *workerLink) survived(err error) error {
	if errors.Is(err, errWorkerGone) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return nil
	}
	return err
}
