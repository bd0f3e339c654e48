package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/logring"
)

// WorkerLink is one living worker as the monitor sees it: requests go down the
// channel and are matched with their acks. It is usable from the moment the
// worker said ready until it ends; from then on every call fails with
// ErrWorkerGone.
type WorkerLink struct {
	P *Process

	Mu   sync.Mutex
	seq  uint64
	Acks map[uint64]chan error
	gone bool

	Ready chan struct{} // closed by readLoop on MsgReady
	// wantSocket is called when the worker wants one more socket of the guest's namespace.
	wantSocket func(l *WorkerLink, v6 bool)
	// wantFlowLog is called when the worker's flow log is full.
	wantFlowLog func(l *WorkerLink)
	LogWants    atomic.Int64  // requests that are not answered yet
	Grants      *policy.Names // what its workers granted

	// blame is why the monitor has killed the worker; guarded by mu.
	blame string
}

var ErrWorkerGone = errors.New("the worker is not running")

// A worker that does not answer is killed: its further behaviour is unknown, and its successor
// starts with the new state.
const (
	// ackTimeout bounds one request.
	ackTimeout = 5 * time.Second
	// RulesTimeout bounds new rules. Ten thousand addresses take a worker some 100 ms.
	RulesTimeout = time.Second
	// KillPatience bounds the wait for the end of a worker that was killed.
	KillPatience = 300 * time.Millisecond
	// WatchEvery is how often a worker is asked whether its packets move. Asking wakes an
	// idle worker, hence no more often.
	WatchEvery = 10 * time.Second
	// WatchPatience bounds the wait for the answer. It costs a worker all of its flows, so it is
	// longer than a heavily overloaded machine needs to schedule the worker. New rules do not wait
	// for it: they have patience of their own.
	WatchPatience = 15 * time.Second
)

func NewWorkerLink(p *Process, wantSocket func(*WorkerLink, bool), wantFlowLog func(*WorkerLink), grants *policy.Names) *WorkerLink {
	l := &WorkerLink{P: p, Acks: make(map[uint64]chan error), Ready: make(chan struct{}), wantSocket: wantSocket, wantFlowLog: wantFlowLog, Grants: grants}
	go l.readLoop()
	return l
}

// readLoop is owned by the link and ends with the channel, that is with the
// worker. A worker that breaks the protocol is killed.
func (l *WorkerLink) readLoop() {
	isReady := false
	for {
		m, _, err := l.P.Ch.Receive()
		if err == nil {
			switch {
			case m.Type == channel.MsgReady && !isReady:
				isReady = true
				close(l.Ready)
			case m.Type == channel.MsgAck:
				l.acked(m)
			case m.Type == channel.MsgWantSocket4, m.Type == channel.MsgWantSocket6:
				l.wantSocket(l, m.Type == channel.MsgWantSocket6)
			case m.Type == channel.MsgWantFlowLog:
				l.wantFlowLog(l)
			case m.Type == channel.MsgGrant:
				var g channel.GrantMessage
				if err = json.Unmarshal(m.Body, &g); err != nil {
					err = channel.ErrProtocol
				} else {
					err = g.Take(l.Grants, time.Now())
				}
			default:
				err = channel.ErrProtocol
			}
		}
		if err == nil {
			continue
		}
		if errors.Is(err, channel.ErrProtocol) {
			_ = l.P.Cmd.Kill()
		}
		l.close()
		return
	}
}

func (l *WorkerLink) acked(m channel.Message) {
	l.Mu.Lock()
	ch := l.Acks[m.Seq]
	delete(l.Acks, m.Seq)
	l.Mu.Unlock()
	if ch == nil {
		return // its request timed out
	}
	if m.Error != "" {
		ch <- errors.New(logring.CleanLine(m.Error))
	} else {
		ch <- nil
	}
}

// close fails the requests that wait for an ack.
func (l *WorkerLink) close() {
	l.Mu.Lock()
	defer l.Mu.Unlock()
	l.gone = true
	for seq, ch := range l.Acks {
		ch <- ErrWorkerGone
		delete(l.Acks, seq)
	}
}

// Watch kills a worker that hangs. It is owned by the link, and ends with the worker.
func (l *WorkerLink) Watch(every, patience time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-l.Ended():
			return
		case <-t.C:
		}
		if l.RequestWithin(patience, channel.MsgPing, nil) != nil {
			return
		}
	}
}

// Hung kills a worker that failed to do something in time.
func (l *WorkerLink) Hung(why string) error {
	l.Mu.Lock()
	l.blame = why + ", and was killed"
	l.Mu.Unlock()
	_ = l.P.Cmd.Kill()
	t := time.NewTimer(KillPatience)
	defer t.Stop()
	select {
	case <-l.Ended():
		return fmt.Errorf("%w: it %s, and was killed", ErrWorkerGone, why)
	case <-t.C:
		return fmt.Errorf("the worker %s, was killed, and has not ended yet", why)
	}
}

// Post sends a message that needs no ack.
func (l *WorkerLink) Post(typ string, body any, fds ...int) error {
	err := l.P.Ch.Send(typ, 0, body, fds...)
	if errors.Is(err, channel.ErrStuck) {
		return l.Hung("did not take " + typ)
	}
	return err
}

// Request sends a message and waits until it has taken effect.
func (l *WorkerLink) Request(typ string, body any, fds ...int) error {
	return l.RequestWithin(ackTimeout, typ, body, fds...)
}

func (l *WorkerLink) RequestWithin(patience time.Duration, typ string, body any, fds ...int) error {
	ch := make(chan error, 1)
	l.Mu.Lock()
	if l.gone {
		l.Mu.Unlock()
		return ErrWorkerGone
	}
	l.seq++
	seq := l.seq
	l.Acks[seq] = ch
	l.Mu.Unlock()
	forget := func() {
		l.Mu.Lock()
		delete(l.Acks, seq)
		l.Mu.Unlock()
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	if err := l.P.Ch.Send(typ, seq, body, fds...); err != nil {
		forget()
		if errors.Is(err, channel.ErrStuck) {
			return l.Hung("did not take " + typ)
		}
		return err
	}
	select {
	case err := <-ch:
		return err
	case <-t.C:
		forget()
		return l.Hung(fmt.Sprintf("did not confirm %s within %s", typ, patience))
	}
}

// Ended and reason make a WorkerLink supervised.
func (l *WorkerLink) Ended() <-chan struct{} { return l.P.Done }

func (l *WorkerLink) Reason() string {
	l.Mu.Lock()
	defer l.Mu.Unlock()
	if l.blame != "" {
		return "it " + l.blame
	}
	return l.P.Why
}

// Survived returns the error of a request, ignoring the worker's end: the successor starts with the
// new state.
func (l *WorkerLink) Survived(err error) error {
	if errors.Is(err, ErrWorkerGone) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return nil
	}
	return err
}
