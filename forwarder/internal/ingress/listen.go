package ingress

// Accepting connections on a published TCP port.

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
)

// acceptBudget is how many connections one listener may take before the others
// get a turn.
const acceptBudget = 64

// Port accepts from one listening socket, on the run queue.
type Port struct {
	in *Ports
	hostsock.Listener
	tok       engine.PollToken
	accepting engine.Task
	starved   atomic.Bool // accept(2) failed for lack of descriptors

	mu     sync.Mutex // held during accept(2), so that close cannot pull the descriptor away
	closed bool
}

// Listen begins to accept from l, and takes over its descriptor if it succeeds.
func (in *Ports) Listen(l hostsock.Listener) (*Port, error) {
	tl := &Port{in: in, Listener: l}
	tl.accepting.Run = tl.accept
	tok, err := in.Engine.Poll.Add(l.FD, unix.EPOLLIN, tl)
	if err != nil {
		return nil, fmt.Errorf("publishing %s: %w", l.Host, err)
	}
	tl.tok = tok
	return tl, nil
}

// Retry accepts again if descriptors had run out, and reports whether they had.
func (l *Port) Retry() bool {
	if !l.starved.Swap(false) {
		return false
	}
	l.in.Engine.Put(&l.accepting)
	return true
}

func (l *Port) PollReady(uint32) { l.in.Engine.Put(&l.accepting) }

func (l *Port) Close() {
	l.in.Engine.Poll.Remove(l.tok, l.FD)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	unix.Close(l.FD)
}

func (l *Port) accept() {
	for range acceptBudget {
		l.mu.Lock()
		if l.closed {
			l.mu.Unlock()
			return
		}
		fd, sa, err := unix.Accept4(l.FD, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		l.mu.Unlock()
		switch err {
		case nil:
			l.in.Dialer.Sockets.Add(1)
			l.in.take(fd, client{Caller: tcpflow.Caller{From: hostsock.AddrPort(sa), Host: localAddr(fd, l.Host)}, ways: waysTo(&l.Listener, hostsock.AddrPort(sa).Addr())})
		case unix.EAGAIN:
			return
		case unix.EINTR, unix.ECONNABORTED, unix.EPROTO, unix.EPERM:
			// accept(2): errors of that one connection, which was gone before it was accepted.
		default:
			l.in.failed.Add(1)
			l.starved.Store(true)
			l.in.Timer.Raise()
			return
		}
	}
	l.in.Engine.Put(&l.accepting)
}
