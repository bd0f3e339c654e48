package forwarder

// Accepting from a published TCP port.

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// acceptBudget is how many connections one listener may take before the others
// get a turn.
const acceptBudget = 64

// tcpListener accepts from one listening socket, on the run queue.
type tcpListener struct {
	in *ingressTCP
	Listener
	tok       pollToken
	accepting task
	starved   atomic.Bool // accept(2) failed for want of descriptors

	mu     sync.Mutex // held over accept(2), so that close cannot pull the descriptor away
	closed bool
}

// listen begins to accept from l, and takes over its descriptor if it succeeds.
func (in *ingressTCP) listen(l Listener) (*tcpListener, error) {
	tl := &tcpListener{in: in, Listener: l}
	tl.accepting.run = tl.accept
	tok, err := in.engine.poll.add(l.FD, unix.EPOLLIN, tl)
	if err != nil {
		return nil, fmt.Errorf("publishing %s: %w", l.Host, err)
	}
	tl.tok = tok
	return tl, nil
}

// retry tries again if descriptors ran out, and reports whether they had.
func (l *tcpListener) retry() bool {
	if !l.starved.Swap(false) {
		return false
	}
	l.in.engine.put(&l.accepting)
	return true
}

func (l *tcpListener) pollReady(uint32) { l.in.engine.put(&l.accepting) }

func (l *tcpListener) close() {
	l.in.engine.poll.remove(l.tok, l.FD)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	unix.Close(l.FD)
}

func (l *tcpListener) accept() {
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
			l.in.dialer.sockets.Add(1)
			l.in.take(fd, client{caller: caller{from: addrPort(sa), host: localAddr(fd, l.Host)}, ways: waysTo(&l.Listener, addrPort(sa).Addr())})
		case unix.EAGAIN:
			return
		case unix.EINTR, unix.ECONNABORTED, unix.EPROTO, unix.EPERM:
			// accept(2): errors of the one connection, gone before it was taken.
		default:
			l.in.failed.Add(1)
			l.starved.Store(true)
			l.in.timer.raise()
			return
		}
	}
	l.in.engine.put(&l.accepting)
}
