package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

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
}

var errWorkerGone = errors.New("the worker is not running")

// ackTimeout bounds one request. The slowest is a policy of ten thousand
// addresses, well under a second.
const ackTimeout = 5 * time.Second

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

// post sends a message that nobody acknowledges.
func (l *workerLink) post(typ string, body any, fds ...int) error {
	return l.p.ch.Send(typ, 0, body, fds...)
}

// request sends a message and waits until it took effect.
func (l *workerLink) request(typ string, body any, fds ...int) error {
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
	if err := l.p.ch.Send(typ, seq, body, fds...); err != nil {
		l.mu.Lock()
		delete(l.acks, seq)
		l.mu.Unlock()
		return err
	}
	t := time.NewTimer(ackTimeout)
	defer t.Stop()
	select {
	case err := <-ch:
		return err
	case <-t.C:
		l.mu.Lock()
		delete(l.acks, seq)
		l.mu.Unlock()
		return fmt.Errorf("the worker did not confirm %s within %s", typ, ackTimeout)
	}
}
