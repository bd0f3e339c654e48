package forwarder

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

	"sluice/nat"
)

const (
	// pumpBudget is how many bytes one run may move before others get a turn.
	pumpBudget = 1 << 20
	// maxIovecs is how many pieces one writev takes (the kernel's UIO_MAXIOV is 1024).
	maxIovecs = 256
	// downChunk is about the most that one write hands to the stack.
	downChunk = 256 << 10
	// What the flow table adds for each segment's headers: IP, and TCP with
	// timestamps.
	tcpOverhead4 = 20 + 32
	tcpOverhead6 = 40 + 32
)

// upScratch is what one run of an up pump needs.
type upScratch struct {
	gather  gather
	discard discard
}

var upScratches = sync.Pool{New: func() any { return new(upScratch) }}

// gather collects the slices of a peeked receive queue as iovecs.
type gather struct {
	iov   [maxIovecs]unix.Iovec
	n     int
	bytes int
}

var errFull = errors.New("no room for more pieces")

func (g *gather) Write(p []byte) (int, error) {
	if g.n == len(g.iov) {
		return 0, errFull
	}
	if len(p) == 0 {
		return 0, nil
	}
	g.iov[g.n].Base = &p[0]
	g.iov[g.n].SetLen(len(p))
	g.n++
	g.bytes += len(p)
	return len(p), nil
}

// trim drops what is beyond the first n bytes, n > 0.
func (g *gather) trim(n int) {
	if n >= g.bytes {
		return
	}
	g.bytes = n
	for i := range g.iov[:g.n] {
		l := int(g.iov[i].Len)
		if l < n {
			n -= l
			continue
		}
		g.iov[i].SetLen(n)
		clear(g.iov[i+1 : g.n])
		g.n = i + 1
		return
	}
}

// reset forgets the slices, so that they are not kept alive.
func (g *gather) reset() {
	clear(g.iov[:g.n])
	g.n, g.bytes = 0, 0
}

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

// pumpUp moves what the sandbox sent, and pumpDown what the far side sent. Several
// goroutines may call them: whoever comes second leaves a note, and the first goes
// round again.
func (fl *tcpFlow) pumpUp()   { fl.run(&fl.up, (*tcpFlow).runUp) }
func (fl *tcpFlow) pumpDown() { fl.run(&fl.down, (*tcpFlow).runDown) }

func (fl *tcpFlow) run(p *pump, once func(*tcpFlow) (abort nat.Reason)) {
	p.again.Store(true)
	for p.again.Load() {
		if !p.mu.TryLock() {
			return
		}
		p.again.Store(false)
		abort := once(fl)
		p.mu.Unlock()
		if abort != "" {
			fl.fail(abort)
			return
		}
	}
}

// runUp returns a reason when the flow has to be aborted.
func (fl *tcpFlow) runUp() (abort nat.Reason) {
	if !fl.live.Load() || fl.up.done.Load() || fl.fd < 0 {
		return fl.beforeOpen()
	}
	scratch := upScratches.Get().(*upScratch)
	g := &scratch.gather
	defer func() {
		g.reset()
		upScratches.Put(scratch)
	}()
	moved := 0
	defer func() { fl.mem.fit(fl.ep.(*tcp.Endpoint), moved) }()
	for budget := pumpBudget; ; {
		if fl.revoked.Load() {
			return nat.ReasonPolicy
		}
		g.reset()
		_, terr := fl.ep.Read(g, tcpip.ReadOptions{Peek: true})
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return ""
		case *tcpip.ErrClosedForReceive:
			return fl.upEOF()
		default:
			return lostSandbox(fl.ep)
		}
		if g.n == 0 {
			return ""
		}
		if budget <= 0 {
			fl.t.engine.put(&fl.upTask)
			return ""
		}
		if fl.gate != nil {
			n, drop, abort := fl.gate.admit(g)
			if drop > 0 {
				scratch.discard.left = drop
				if _, terr := fl.ep.Read(&scratch.discard, tcpip.ReadOptions{}); terr != nil {
					return lostSandbox(fl.ep)
				}
				continue
			}
			switch {
			case abort != "":
				return abort
			case n == 0 && endpointState(fl.ep) == tcp.StateError:
				return lostSandbox(fl.ep) // what is held passes no more
			case n == 0:
				return ""
			}
			g.trim(n)
		}
		limit, rule := &fl.t.gate.bandwidth.up, fl.ruleUp()
		granted := g.bytes
		if limit.limited() || rule != nil {
			if granted = take(rule, limit, g.bytes, fl.t.gate.now(), &fl.upTask, fl.t.engine.runq); granted == 0 {
				return ""
			}
			g.trim(granted)
		}
		n, errno := writev(fl.fd, g.iov[:g.n])
		untake(rule, limit, granted-n)
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
			fl.gate.passed(g, n)
		}
		short := n < g.bytes
		scratch.discard.left = n
		if _, terr := fl.ep.Read(&scratch.discard, tcpip.ReadOptions{}); terr != nil {
			return lostSandbox(fl.ep)
		}
		fl.tallyUp(n)
		moved += n
		fl.t.engine.movedUp(fl.number, int64(n))
		budget -= n
		if short {
			// The socket is full: its EPOLLOUT will come.
			return ""
		}
	}
}

func (fl *tcpFlow) upEOF() (abort nat.Reason) {
	if err := unix.Shutdown(fl.fd, unix.SHUT_WR); err != nil && err != unix.ENOTCONN {
		return fl.lostPeer(0)
	}
	fl.up.done.Store(true)
	fl.halfClosed()
	return ""
}

// runDown returns a reason when the flow has to be aborted.
func (fl *tcpFlow) runDown() (abort nat.Reason) {
	if !fl.live.Load() || fl.fd < 0 {
		return ""
	}
	if fl.down.done.Load() {
		if fl.hostEvents.Load()&unix.EPOLLERR != 0 && !fl.up.done.Load() {
			return fl.lostPeer(0) // behind its end of stream
		}
		return ""
	}
	for budget := pumpBudget; ; {
		if fl.revoked.Load() {
			return nat.ReasonPolicy
		}
		room := downChunk
		if fl.gate != nil {
			if room = fl.gate.room(); room == 0 {
				return ""
			}
		}
		queued, errno := siocinq(fl.fd)
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
			fl.t.engine.put(&fl.downTask)
			return ""
		}
		held := fl.mem.maySend(fl.ep.(*tcp.Endpoint), min(queued, room))
		if held == 0 {
			fl.t.timer.raise()
			return ""
		}
		limit, rule := &fl.t.gate.bandwidth.down, fl.ruleDown()
		granted := fl.t.downSize(held)
		if limit.limited() || rule != nil {
			if granted = take(rule, limit, granted, fl.t.gate.now(), &fl.downTask, fl.t.engine.runq); granted == 0 {
				return ""
			}
		}
		fl.reader = hostReader{fd: fl.fd, left: granted, gate: fl.gate}
		n, terr := fl.ep.Write(&fl.reader, tcpip.WriteOptions{})
		untake(rule, limit, granted-int(n))
		fl.mem.wrote(int(n))
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return ""
		case *tcpip.ErrBadBuffer:
			// The kernel had said that the bytes were there.
			fl.t.shortRead.Add(1)
			return fl.lostPeer(0)
		default:
			return lostSandbox(fl.ep)
		}
		fl.tallyDown(int(n))
		fl.t.engine.moved(fl.number, n)
		budget -= int(n)
		if int(n) == queued && fl.hostEvents.Load() == 0 {
			// More can only have come after the event that brought us here was
			// taken, and then there is another event.
			return ""
		}
	}
}

// downSize is how much of what is queued one write hands to the stack. A write that is
// no multiple of what the stack sends in one packet ends in a small packet, which costs
// the sandbox as much as a large one.
func (t *tcpForwarder) downSize(queued int) int {
	n := min(queued, downChunk)
	if n > t.gsoPayload {
		n -= n % t.gsoPayload
	}
	return n
}

// probeHost finds out what a hang-up or error event meant, now that nothing is
// queued.
func (fl *tcpFlow) probeHost() (again bool, abort nat.Reason) {
	var b [1]byte
	n, errno := recvPeek(fl.fd, b[:])
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
	fl.down.done.Store(true)
	if terr := fl.ep.Shutdown(tcpip.ShutdownWrite); terr != nil {
		if _, gone := terr.(*tcpip.ErrNotConnected); !gone {
			return false, lostSandbox(fl.ep)
		}
	}
	fl.halfClosed()
	return false, ""
}

// halfClosed notes that one more end of stream was passed on.
func (fl *tcpFlow) halfClosed() {
	fl.lease.SetState(nat.CloseWait)
	fl.t.engine.put(&fl.settling)
}

// tallyUp charges the segments that came from the sandbox since it was last called,
// and payload of theirs that was passed on. The caller holds up.mu.
func (fl *tcpFlow) tallyUp(payload int) {
	fl.tally(fl.dirUp(), fl.up.tallied(&fl.counts.SegmentsReceived), payload)
	// Of a flow that only sends, what goes the other way is acknowledgements, and
	// its own pump never runs.
	if fl.down.mu.TryLock() {
		fl.tallyDown(0)
		fl.unlockDown()
	}
}

// unlockUp and unlockDown give back a pump's lock that was taken for something else.
func (fl *tcpFlow) unlockUp()   { fl.unlock(&fl.up, &fl.upTask) }
func (fl *tcpFlow) unlockDown() { fl.unlock(&fl.down, &fl.downTask) }

func (fl *tcpFlow) unlock(p *pump, t *task) {
	p.mu.Unlock()
	if p.again.Load() {
		// The pump was called meanwhile, found its lock taken, and left it to the holder
		// to go round again.
		fl.t.engine.put(t)
	}
}

// tallyDown is the same for segments to the sandbox. The caller holds down.mu.
func (fl *tcpFlow) tallyDown(payload int) {
	fl.tally(fl.dirUp()^1, fl.down.tallied(&fl.counts.SegmentsSent), payload)
}

func (fl *tcpFlow) tally(d nat.Dir, segments, payload int) {
	if segments == 0 && payload == 0 {
		return
	}
	fl.lease.Account(d, int64(segments), int64(payload+segments*tcpOverhead(fl.id.RemoteAddress.Len() == 4)))
}

// tallied returns how far c has come since the last call.
func (p *pump) tallied(c *tcpip.StatCounter) int {
	now := c.Value()
	n := now - p.counted
	p.counted = now
	return int(n)
}

// dirUp is the direction of what comes from the sandbox.
func (fl *tcpFlow) dirUp() nat.Dir {
	if fl.ingress {
		return nat.Reply
	}
	return nat.Original
}

func tcpOverhead(v4 bool) int {
	if v4 {
		return tcpOverhead4
	}
	return tcpOverhead6
}

// segmentsOf is how many segments of at most 64 KiB carry n bytes.
func segmentsOf(n int) int { return (n + 65535) / 65536 }

// hostReader is the payload of one write to the stack: exactly left bytes that
// the kernel has queued, read where the stack wants them.
type hostReader struct {
	fd   int
	left int
	gate gate // follows what is read; may be nil
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
			r.gate.answered(p[:n])
		}
		return int(n), nil
	}
}

// The calls below are on non-blocking sockets and return at once, so they are
// made without telling the scheduler.

func writev(fd int, iov []unix.Iovec) (int, unix.Errno) {
	n, _, errno := syscall.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

func siocinq(fd int) (int, unix.Errno) {
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
