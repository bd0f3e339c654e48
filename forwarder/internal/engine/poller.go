package engine

// Readiness of descriptors: the device's queues and host sockets.
//
// Registrations are edge-triggered: a handler works until EAGAIN or until its budget is spent, and
// in the latter case puts itself on the run queue. Several goroutines may take events from one
// poller; a handler is called by one of them at a time, and events that arrive meanwhile are kept
// for it.
//
// A token names a slot and the slot's generation, so that an event that epoll
// had already returned for a descriptor removed meanwhile finds a newer
// generation and is dropped.

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pollHandler is told what epoll reported for its descriptor, one call at a time.
// It runs on the engine and must not block.
type pollHandler interface {
	PollReady(events uint32)
}

// PollToken names one registration; the zero value names none.
type PollToken struct {
	slot uint32
	gen  uint32
}

type pollSlot struct {
	gen     uint32
	handler pollHandler
	busy    bool   // a handler of this slot is running
	pending uint32 // events that arrived meanwhile
}

type Poller struct {
	Epfd, wakefd int
	onWake       func() // called by the goroutine that wake woke

	closed atomic.Bool

	mu    sync.Mutex
	slots []pollSlot // slot 0 is wakefd's and has no handler
	spare []uint32
}

func newPoller() (*Poller, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("creating an epoll instance: %w", err)
	}
	wakefd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(epfd)
		return nil, fmt.Errorf("creating an eventfd: %w", err)
	}
	p := &Poller{Epfd: epfd, wakefd: wakefd, slots: make([]pollSlot, 1)}
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}
	if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, wakefd, &ev); err != nil {
		p.free()
		return nil, fmt.Errorf("adding an eventfd to epoll: %w", err)
	}
	return p, nil
}

// Add registers fd, edge-triggered, for events (EPOLLIN, EPOLLOUT, …). An error
// means that nothing was registered.
func (p *Poller) Add(fd int, events uint32, h pollHandler) (PollToken, error) {
	p.mu.Lock()
	var slot uint32
	if n := len(p.spare); n > 0 {
		slot = p.spare[n-1]
		p.spare = p.spare[:n-1]
	} else {
		slot = uint32(len(p.slots))
		p.slots = append(p.slots, pollSlot{})
	}
	s := &p.slots[slot]
	s.gen++
	s.handler, s.pending = h, 0
	t := PollToken{slot: slot, gen: s.gen}
	p.mu.Unlock()

	ev := unix.EpollEvent{Events: events | unix.EPOLLET}
	*(*PollToken)(unsafe.Pointer(&ev.Fd)) = t
	if err := unix.EpollCtl(p.Epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		p.Release(t)
		return PollToken{}, fmt.Errorf("adding descriptor to epoll: %w", err)
	}
	return t, nil
}

// Remove ends a registration. fd must still be open. No PollReady for t starts afterwards; one
// already running may continue.
func (p *Poller) Remove(t PollToken, fd int) {
	if t == (PollToken{}) {
		return
	}
	// The error is ignored: the descriptor leaves epoll when it is closed.
	_ = unix.EpollCtl(p.Epfd, unix.EPOLL_CTL_DEL, fd, nil)
	p.Release(t)
}

func (p *Poller) Release(t PollToken) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.slots[t.slot]
	if s.gen != t.gen || s.handler == nil {
		return
	}
	s.handler = nil
	p.spare = append(p.spare, t.slot)
}

// dispatch calls the handler that ev is for, or leaves the event to the goroutine already running
// it.
func (p *Poller) dispatch(ev *unix.EpollEvent) {
	t := *(*PollToken)(unsafe.Pointer(&ev.Fd))
	if t.slot == 0 {
		p.onWake()
		return
	}
	events := ev.Events
	p.mu.Lock()
	s := &p.slots[t.slot]
	if s.gen != t.gen || s.handler == nil {
		p.mu.Unlock()
		return
	}
	if s.busy {
		s.pending |= events
		p.mu.Unlock()
		return
	}
	s.busy = true
	for h := s.handler; h != nil && events != 0; {
		p.mu.Unlock()
		h.PollReady(events)
		p.mu.Lock()
		s = &p.slots[t.slot] // the slots may have moved, and this one may be another's by now
		h, events, s.pending = s.handler, s.pending, 0
	}
	s.busy = false
	p.mu.Unlock()
}

// wait asks epoll for events, for at most timeout milliseconds; -1 means for ever. If quiet, the Go
// scheduler is not told of the sleep. interrupted means that a signal ended it.
func (p *Poller) wait(events []unix.EpollEvent, timeout int, quiet bool) (n int, interrupted bool, err error) {
	call := unix.Syscall6
	if quiet || timeout == 0 { // the latter cannot block
		call = unix.RawSyscall6
	}
	r, _, errno := call(unix.SYS_EPOLL_PWAIT, uintptr(p.Epfd),
		uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), uintptr(timeout), 0, 0)
	switch errno {
	case 0:
		return int(r), false, nil
	case unix.EINTR:
		return 0, true, nil
	}
	return 0, false, errno
}

// wake ends a wait. The eventfd is never read: each write makes a new edge.
func (p *Poller) wake() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	// It can fail only after 2^64 wakes, and then the eventfd is readable.
	_, _ = unix.Write(p.wakefd, one[:])
}

// close stops all waiting goroutines.
func (p *Poller) close() {
	p.closed.Store(true)
	p.wake()
}

// free closes the descriptors.
func (p *Poller) free() {
	unix.Close(p.wakefd)
	unix.Close(p.Epfd)
}
