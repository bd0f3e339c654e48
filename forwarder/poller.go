package forwarder

// Host readiness.
//
// A poller is an epoll instance whose own descriptor sits in the Go runtime's
// poller: while nothing is ready the goroutine is parked and holds no thread,
// and when a host socket becomes ready the runtime wakes it like any other
// network goroutine, with no hand-off to a second thread. Registrations are
// edge-triggered; a handler therefore works until EAGAIN or until its budget is
// spent, and in the latter case puts itself on a run queue.
//
// A token names a slot and the slot's generation, so that an event that epoll
// had already returned for a descriptor removed meanwhile finds a newer
// generation and is dropped.

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pollHandler is told what epoll reported for its descriptor. It runs on the
// poller's goroutine and must not block.
type pollHandler interface {
	pollReady(events uint32)
}

// pollToken names one registration; the zero value names none.
type pollToken struct {
	slot uint32
	gen  uint32
}

type pollSlot struct {
	gen     uint32
	handler pollHandler
}

type poller struct {
	file *os.File
	raw  syscall.RawConn
	epfd int

	closed atomic.Bool // run is to return

	mu    sync.Mutex
	slots []pollSlot
	free  []uint32
}

// pollBatch is how many events one epoll_wait may return.
const pollBatch = 128

func newPoller() (*poller, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("creating an epoll instance: %w", err)
	}
	if err := unix.SetNonblock(epfd, true); err != nil {
		unix.Close(epfd)
		return nil, fmt.Errorf("making epoll non-blocking: %w", err)
	}
	f := os.NewFile(uintptr(epfd), "epoll")
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("registering epoll with the runtime: %w", err)
	}
	// Slot 0 stays unused so that the zero token names nothing.
	return &poller{file: f, raw: raw, epfd: epfd, slots: make([]pollSlot, 1)}, nil
}

// add registers fd, edge-triggered, for events (EPOLLIN, EPOLLOUT, …). An error
// means that nothing was registered.
func (p *poller) add(fd int, events uint32, h pollHandler) (pollToken, error) {
	p.mu.Lock()
	var slot uint32
	if n := len(p.free); n > 0 {
		slot = p.free[n-1]
		p.free = p.free[:n-1]
	} else {
		slot = uint32(len(p.slots))
		p.slots = append(p.slots, pollSlot{})
	}
	s := &p.slots[slot]
	s.gen++
	s.handler = h
	t := pollToken{slot: slot, gen: s.gen}
	p.mu.Unlock()

	ev := unix.EpollEvent{Events: events | unix.EPOLLET}
	*(*pollToken)(unsafe.Pointer(&ev.Fd)) = t
	if err := unix.EpollCtl(p.epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		p.release(t)
		return pollToken{}, fmt.Errorf("adding descriptor to epoll: %w", err)
	}
	return t, nil
}

// remove ends a registration. fd must still be open. No pollReady for t starts
// afterwards; one that runs already may still be running.
func (p *poller) remove(t pollToken, fd int) {
	if t == (pollToken{}) {
		return
	}
	// The error is of no use: the descriptor leaves epoll when it is closed.
	_ = unix.EpollCtl(p.epfd, unix.EPOLL_CTL_DEL, fd, nil)
	p.release(t)
}

func (p *poller) release(t pollToken) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.slots[t.slot]
	if s.gen != t.gen || s.handler == nil {
		return
	}
	s.handler = nil
	p.free = append(p.free, t.slot)
}

func (p *poller) lookup(t pollToken) pollHandler {
	p.mu.Lock()
	defer p.mu.Unlock()
	if int(t.slot) >= len(p.slots) || p.slots[t.slot].gen != t.gen {
		return nil
	}
	return p.slots[t.slot].handler
}

// run dispatches events until close. It is the body of one goroutine, owned by
// Forwarder.Run.
func (p *poller) run() error {
	events := make([]unix.EpollEvent, pollBatch)
	for {
		var n int
		var werr error
		err := p.raw.Read(func(fd uintptr) bool {
			n, werr = epollWaitNow(int(fd), events)
			return n != 0 || werr != nil
		})
		switch {
		case p.closed.Load():
			return nil
		case err != nil:
			return fmt.Errorf("waiting for host sockets: %w", err)
		case werr == unix.EINTR:
			continue
		case werr != nil:
			return fmt.Errorf("waiting for host sockets: %w", werr)
		}
		for i := range events[:n] {
			ev := &events[i]
			t := *(*pollToken)(unsafe.Pointer(&ev.Fd))
			if h := p.lookup(t); h != nil {
				h.pollReady(ev.Events)
			}
		}
	}
}

// close makes run return and frees the epoll instance.
func (p *poller) close() {
	p.closed.Store(true)
	// Nothing was written to it: there is no error to report.
	_ = p.file.Close()
}

// epollWaitNow is epoll_wait with a zero timeout. It cannot block, so it is made without
// telling the scheduler, which saves the hand-off of the processor.
func epollWaitNow(epfd int, events []unix.EpollEvent) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epfd),
		uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
