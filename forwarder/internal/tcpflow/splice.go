package tcpflow

// The splice engine moves a flow's bytes. It holds no goroutine and no buffer
// for an idle flow, and none of its calls blocks:
//
//	up    stack → host   peek at the queued segments, one writev(2) of all of them, then discard
//	                     exactly what the kernel took.
//	down  host → stack   ask how much is queued, read it straight into the stack's own chunks.
//
// Both run on whichever of the engine's goroutines learned that there is something to
// move: the one that read the segments, that epoll told, or that took the task.
//
// Backpressure is the two sides' own: data that the host socket does not take
// stays in the stack's receive queue, whose window closes; data that the stack's
// send buffer does not take stays in the host's receive queue.
//
// Fairness: a pump that spends its budget goes to the tail of the run queue.

import (
	"errors"
	"io"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/gate"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/nat"
)

const (
	// PumpBudget is how many bytes one run may move before others get a turn.
	PumpBudget = 1 << 20
	// What the flow table adds for each segment's headers: IP, and TCP with
	// timestamps.
	tcpOverhead4 = 20 + 32
	tcpOverhead6 = 40 + 32
)

// upScratch is what one run of an up pump needs.
type upScratch struct {
	gather  gate.Gather
	discard discard
}

var upScratches = sync.Pool{New: func() any { return new(upScratch) }}

var errFull = errors.New("no room for more pieces")

// discard accepts exactly left bytes.
type discard struct{ left int }

func (d *discard) Write(p []byte) (int, error) {
	if len(p) <= d.left {
		d.left -= len(p)
		return len(p), nil
	}
	n := d.left
	d.left = 0
	return n, errFull
}

// pumpUp moves bytes from the sandbox, and pumpDown bytes from the far side. Several goroutines may
// call them: the second leaves a note, and the first goes round again.
func (fl *Flow) pumpUp() { fl.run(&fl.Up, (*Flow).runUp) }

func (fl *Flow) pumpDown() { fl.run(&fl.Down, (*Flow).runDown) }

func (fl *Flow) run(p *pump, once func(*Flow) (abort nat.Reason)) {
	p.Again.Store(true)
	for p.Again.Load() {
		if !p.Mu.TryLock() {
			return
		}
		p.Again.Store(false)
		abort := once(fl)
		p.Mu.Unlock()
		if abort != "" {
			fl.fail(abort)
			return
		}
	}
}

// runUp returns a reason if the flow must be aborted.
func (fl *Flow) runUp() (abort nat.Reason) {
	if !fl.Live.Load() || fl.Up.Done.Load() || fl.FD < 0 {
		return fl.check.beforeOpen()
	}
	scratch := upScratches.Get().(*upScratch)
	g := &scratch.gather
	defer func() {
		g.Reset()
		upScratches.Put(scratch)
	}()
	moved := 0
	defer func() { fl.mem.Fit(fl.Ep.(*tcp.Endpoint), moved) }()
	for budget := PumpBudget; ; {
		if fl.Revoked.Load() {
			return nat.ReasonPolicy
		}
		g.Reset()
		_, terr := fl.Ep.Read(g, tcpip.ReadOptions{Peek: true})
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return ""
		case *tcpip.ErrClosedForReceive:
			return fl.upEOF()
		default:
			return lostSandbox(fl.Ep)
		}
		if g.N == 0 {
			return ""
		}
		if budget <= 0 {
			fl.T.Engine.Put(&fl.UpTask)
			return ""
		}
		if fl.gate != nil {
			step := fl.gate.Admit(g)
			if step.Drop > 0 {
				scratch.discard.left = step.Drop
				if _, terr := fl.Ep.Read(&scratch.discard, tcpip.ReadOptions{}); terr != nil {
					return lostSandbox(fl.Ep)
				}
				continue
			}
			switch {
			case step.Abort != "":
				return step.Abort
			case step.Refusing != "":
				if abort := fl.check.awaitRefusal(step.Refusing); abort != "" {
					return abort
				}
			case step.End != nil:
				fl.check.end(step.End)
			}
			switch {
			case step.Pass == 0 && netstack.EndpointState(fl.Ep) == tcp.StateError:
				return lostSandbox(fl.Ep) // what is held passes no more
			case step.Pass == 0:
				return ""
			}
			g.Trim(step.Pass)
		}
		limit, rule := &fl.T.Gate.Bandwidth.Up, fl.RuleUp()
		granted := g.Bytes
		if limit.Limited() || rule != nil {
			if granted = admit.Take(rule, limit, g.Bytes, fl.T.Gate.Now(), &fl.UpTask, fl.T.Engine.Runq); granted == 0 {
				return ""
			}
			g.Trim(granted)
		}
		n, errno := writev(fl.FD, g.Iov[:g.N])
		admit.Untake(rule, limit, granted-n)
		switch errno {
		case 0:
		case unix.EAGAIN:
			return ""
		case unix.EINTR:
			continue
		default:
			return fl.brokenUp(errno)
		}
		if fl.gate != nil {
			fl.gate.Passed(g, n)
		}
		short := n < g.Bytes
		scratch.discard.left = n
		if _, terr := fl.Ep.Read(&scratch.discard, tcpip.ReadOptions{}); terr != nil {
			return lostSandbox(fl.Ep)
		}
		fl.TallyUp(n)
		moved += n
		fl.T.Engine.MovedUp(fl.number, int64(n))
		budget -= n
		if short {
			// The socket is full: its EPOLLOUT will come.
			return ""
		}
	}
}

func (fl *Flow) upEOF() (abort nat.Reason) {
	if err := unix.Shutdown(fl.FD, unix.SHUT_WR); err != nil && err != unix.ENOTCONN {
		return fl.lostPeer(0)
	}
	fl.Up.Done.Store(true)
	fl.halfClosed()
	return ""
}

// runDown returns a reason if the flow must be aborted.
func (fl *Flow) runDown() (abort nat.Reason) {
	if !fl.Live.Load() || fl.FD < 0 {
		return ""
	}
	if fl.Down.Done.Load() {
		if fl.hostEvents.Load()&unix.EPOLLERR != 0 && !fl.Up.Done.Load() {
			return fl.lostPeer(0) // behind its end of stream
		}
		return ""
	}
	for budget := PumpBudget; ; {
		if fl.Revoked.Load() {
			return nat.ReasonPolicy
		}
		room := gate.Chunk
		if fl.gate != nil {
			var end *gate.Ending
			room, end = fl.gate.Room()
			switch {
			case end != nil && end.Reset:
				return end.Why
			case end != nil:
				fl.check.end(end)
			}
			if room == 0 {
				return ""
			}
		}
		queued, errno := Siocinq(fl.FD)
		if errno != 0 {
			return fl.lostPeer(errno)
		}
		if queued == 0 {
			if fl.hostEvents.Load() == 0 {
				return ""
			}
			again, abort := fl.probeHost()
			if abort != "" || !again {
				return abort
			}
			continue
		}
		if budget <= 0 {
			fl.T.Engine.Put(&fl.DownTask)
			return ""
		}
		held := fl.mem.MaySend(fl.Ep.(*tcp.Endpoint), min(queued, room))
		if held == 0 {
			fl.T.Timer.Raise()
			return ""
		}
		limit, rule := &fl.T.Gate.Bandwidth.Down, fl.RuleDown()
		granted := fl.T.downSize(held)
		if limit.Limited() || rule != nil {
			if granted = admit.Take(rule, limit, granted, fl.T.Gate.Now(), &fl.DownTask, fl.T.Engine.Runq); granted == 0 {
				return ""
			}
		}
		fl.reader = hostReader{fd: fl.FD, left: granted, gate: fl.gate}
		n, terr := fl.Ep.Write(&fl.reader, tcpip.WriteOptions{})
		admit.Untake(rule, limit, granted-int(n))
		fl.mem.Wrote(int(n))
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return ""
		case *tcpip.ErrBadBuffer:
			// The kernel had said that the bytes were there.
			fl.T.shortRead.Add(1)
			return fl.lostPeer(0)
		default:
			return lostSandbox(fl.Ep)
		}
		fl.tallyDown(int(n))
		fl.T.Engine.Moved(fl.number, n)
		budget -= int(n)
		if int(n) == queued && fl.hostEvents.Load() == 0 {
			// More can only have come after the event that brought us here was
			// taken, and then there is another event.
			return ""
		}
	}
}

// downSize is how much of the queued data one write hands to the stack. If a write is not a
// multiple of the stack's packet payload, it ends in a small packet, which costs the sandbox as
// much as a large one.
func (t *Forwarder) downSize(queued int) int {
	n := min(queued, gate.Chunk)
	if n > t.gsoPayload {
		n -= n % t.gsoPayload
	}
	return n
}

// probeHost finds out the meaning of a hang-up or error event, now that nothing is queued.
func (fl *Flow) probeHost() (again bool, abort nat.Reason) {
	var b [1]byte
	n, errno := recvPeek(fl.FD, b[:])
	switch {
	case errno == unix.EINTR:
		return true, ""
	case errno == unix.EAGAIN:
		fl.hostEvents.Store(0)
		return false, ""
	case errno != 0:
		return false, fl.lostPeer(errno)
	case n > 0:
		return true, ""
	case fl.broken.Load() != 0: // writing has taken the error that reading would tell
		return false, fl.lostPeer(0)
	}
	fl.Down.Done.Store(true)
	if terr := fl.Ep.Shutdown(tcpip.ShutdownWrite); terr != nil {
		if _, gone := terr.(*tcpip.ErrNotConnected); !gone {
			return false, lostSandbox(fl.Ep)
		}
	}
	fl.halfClosed()
	return false, ""
}

// halfClosed records that one more end of stream was passed on.
func (fl *Flow) halfClosed() {
	fl.Lease.SetState(nat.CloseWait)
	fl.T.Engine.Put(&fl.settling)
}

// TallyUp charges the segments that came from the sandbox since it was last called,
// and payload of theirs that was passed on. The caller holds up.mu.
func (fl *Flow) TallyUp(payload int) {
	fl.tally(fl.dirUp(), fl.Up.tallied(&fl.Counts.SegmentsReceived), payload)
	// Of a flow that only sends, what goes the other way is acknowledgements, and
	// its own pump never runs.
	if fl.Down.Mu.TryLock() {
		fl.tallyDown(0)
		fl.UnlockDown()
	}
}

// unlockUp and UnlockDown give back a pump's lock that was taken for something else.
func (fl *Flow) unlockUp() { fl.unlock(&fl.Up, &fl.UpTask) }

func (fl *Flow) UnlockDown() { fl.unlock(&fl.Down, &fl.DownTask) }

func (fl *Flow) unlock(p *pump, t *engine.Task) {
	p.Mu.Unlock()
	if p.Again.Load() {
		// The pump was called meanwhile, found its lock taken, and left it to the holder to go
		// round again.
		fl.T.Engine.Put(t)
	}
}

// tallyDown does the same for segments to the sandbox. The caller holds down.mu.
func (fl *Flow) tallyDown(payload int) {
	fl.tally(fl.dirUp()^1, fl.Down.tallied(&fl.Counts.SegmentsSent), payload)
}

func (fl *Flow) tally(d nat.Dir, segments, payload int) {
	if segments == 0 && payload == 0 {
		return
	}
	fl.Lease.Account(d, int64(segments), int64(payload+segments*Overhead(fl.id.RemoteAddress.Len() == 4)))
}

// tallied returns how far c has come since the last call.
func (p *pump) tallied(c *tcpip.StatCounter) int {
	now := c.Value()
	n := now - p.counted
	p.counted = now
	return int(n)
}

// dirUp is the direction from the sandbox.
func (fl *Flow) dirUp() nat.Dir {
	if fl.ingress {
		return nat.Reply
	}
	return nat.Original
}

func Overhead(v4 bool) int {
	if v4 {
		return tcpOverhead4
	}
	return tcpOverhead6
}

// SegmentsOf returns how many segments of at most 64 KiB carry n bytes.
func SegmentsOf(n int) int { return (n + 65535) / 65536 }

// hostReader is the payload of one write to the stack: exactly left bytes that
// the kernel has queued, read where the stack wants them.
type hostReader struct {
	fd   int
	left int
	gate gate.Gate // follows what is read; may be nil
}

// Len is a promise to the stack.
func (r *hostReader) Len() int { return r.left }

func (r *hostReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.left == 0 {
		return 0, io.EOF
	}
	if len(p) > r.left {
		p = p[:r.left]
	}
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_READ, uintptr(r.fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return 0, errno
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		}
		r.left -= int(n)
		if r.gate != nil {
			r.gate.Answered(p[:n])
		}
		return int(n), nil
	}
}

// The calls below are on non-blocking sockets and return at once, so they bypass the scheduler.

func writev(fd int, iov []unix.Iovec) (int, unix.Errno) {
	n, _, errno := syscall.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

func Siocinq(fd int) (int, unix.Errno) {
	var n int32
	_, _, errno := syscall.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCINQ, uintptr(unsafe.Pointer(&n)))
	return int(n), errno
}

func recvPeek(fd int, p []byte) (int, unix.Errno) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)),
		unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
