package tun

import (
	"fmt"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"golang.org/x/sys/unix"
)

// The read path. All of a queue's frames are read, inspected and delivered on one
// goroutine, so that a frame costs no hand-over between threads, and the order of
// the wire is kept. The system calls are raw ones: the descriptor never blocks, so
// telling Go's scheduler about each would only cost time and invite it to move the
// processor to another thread.

const (
	// batchBudget is how many frames a reader takes before it lets other
	// goroutines run. At 64 KiB a frame that is 4 MiB, some hundreds of microseconds.
	batchBudget = 64
	// maxBadReads bounds consecutive failures of a queue that is not gone by its
	// own account; past it the device is given up rather than spun on.
	maxBadReads = 64
)

// read delivers to to until that is detached, the queue is closed, or it fails.
func (q *queue) read(to *dispatcher) {
	defer q.e.readers.Done()
	q.reading.Lock() // an earlier reader may still be on its way out
	defer q.reading.Unlock()
	defer q.rx.release()
	// Attach(nil) first changes the dispatcher, then sets a deadline. So either the
	// check in onReadable, which comes after this, sees the change, or the deadline
	// comes after this one.
	err := q.file.SetReadDeadline(time.Time{})
	if err == nil {
		q.to, q.readErr = to, nil
		err = q.raw.Read(q.onReadable)
	}
	if q.readErr != nil {
		err = q.readErr
	}
	if err == nil || q.stopped() {
		return
	}
	q.e.end(fmt.Errorf("reading from %s: %w", q.e.device.name, err))
}

// stopped says that somebody wants the reader to end.
func (q *queue) stopped() bool { return q.e.closing.Load() || q.e.dispatcher.Load() != q.to }

// onReadable takes frames until the queue is empty (false: the poller parks us) or
// has ended (true). After each batch it lets other goroutines run and looks once
// more: what they did often made the container answer already, and finding that
// costs a read, while parking costs a wake-up. An idle queue is never polled.
func (q *queue) onReadable(fd uintptr) bool {
	for woken := true; ; woken = false {
		n := 0
		for more := true; more && n < batchBudget; {
			if q.stopped() {
				return true
			}
			var ended bool
			if more, ended = q.readFrame(fd); ended {
				return true
			}
			if more {
				n++
			}
		}
		if n == 0 {
			return false
		}
		if woken {
			q.count.rxWakeups.Add(1)
		}
		q.endBatch()
		runtime.Gosched()
	}
}

func (q *queue) endBatch() {
	if f := q.e.batchEnd.Load(); f != nil {
		(*f)()
	}
}

// readFrame reads and handles one frame.
func (q *queue) readFrame(fd uintptr) (more, ended bool) {
	q.rx.refill()
	n, _, errno := syscall.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&q.rx.iov[0])), uintptr(len(q.rx.iov)))
	switch {
	case errno == 0 && n == 0:
		q.readErr = fmt.Errorf("%w (%w)", ErrDeviceGone, errUnexpectedEnd)
		return false, true
	case errno == 0:
		q.badReads = 0
		q.frame(int(n))
		return true, false
	case errno == unix.EAGAIN:
		return false, false
	case errno == unix.EINTR:
		return true, false
	case isGone(errno):
		q.readErr = fmt.Errorf("%w (%w)", ErrDeviceGone, errno)
		return false, true
	}
	// The kernel gave up on a frame (EINVAL: it could not describe it in a
	// virtio-net header; ENOMEM). The next one may well be fine.
	q.count.rxErrors.Add(1)
	if q.badReads++; q.badReads >= maxBadReads {
		q.readErr = errno
		return false, true
	}
	return true, false
}

// frame handles the n bytes that were read into q.rx, virtio-net header included.
func (q *queue) frame(n int) {
	if n < vnetHeaderLen {
		q.dropRx(shortVnetHeader, 0)
		return
	}
	n -= vnetHeaderLen
	if n > maxFrame {
		q.dropRx(oversizedFrame, maxFrame)
		return
	}
	e := q.e
	v, why := e.filter.inspect(q.rx.head(n), n, decodeVnet(&q.rx.vnet))
	if why != reasonNone {
		q.dropRx(why, n)
		return
	}
	if captures := e.captures.Load(); captures != nil {
		q.captureRx(*captures, n)
	}

	q.settleChecksum(n, &v)
	q.count.rxFrames.Add(1)
	q.count.rxBytes.Add(uint64(n))
	if v.gso {
		q.count.rxGSO.Add(1)
	}
	if v.linkLen != 0 {
		if from := v.source.uint64(); from != e.guest.Load() {
			e.guest.Store(from)
		}
	}
	q.deliver(n, &v)
}

// settleChecksum fills in what the receiver would not understand to be open.
func (q *queue) settleChecksum(n int, v *verdict) {
	if !v.fill && v.validated && !q.to.keepsChecksums() {
		v.validated = false
		v.fill = v.fillAt != 0
	}
	if v.fill {
		q.rx.fillChecksum(n, v.fillStart, v.fillAt)
		q.count.rxFilled.Add(1)
	}
}

func (q *queue) deliver(n int, v *verdict) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: q.rx.take(n)})
	defer pkt.DecRef()
	if v.linkLen != 0 {
		if _, ok := pkt.LinkHeader().Consume(v.linkLen); !ok {
			panic("tun: a frame that passed inspection has no link header")
		}
	}
	pkt.PktType = v.pktType
	pkt.NetworkProtocolNumber = v.proto
	pkt.GSOOptions.MSS = v.segment
	if v.fillAt != 0 && !v.fill {
		// Still open. Type stays GSONone: to the stack this is a packet like any other;
		// who passes it on has to say so again.
		pkt.GSOOptions.NeedsCsum = true
		pkt.GSOOptions.L3HdrLen = uint16(v.fillStart - v.linkLen)
		pkt.GSOOptions.CsumOffset = uint16(v.fillAt - v.fillStart)
	}
	pkt.RXChecksumValidated = v.validated
	q.to.DeliverNetworkPacket(v.proto, pkt)
}

// dropRx counts a refused frame of n bytes and shows it to captures.
func (q *queue) dropRx(why reason, n int) {
	q.count.dropped[why].Add(1)
	if captures := q.e.captures.Load(); captures != nil {
		for _, c := range *captures {
			if r := c.reserve(frameInterface, inbound, n, why.String()); r != nil {
				r.data = q.rx.copyTo(r.data, n, c.snapLen)
				c.commit(r)
			}
		}
	}
}

func (q *queue) captureRx(captures []*Capture, n int) {
	for _, c := range captures {
		if c.dropsOnly {
			continue
		}
		if r := c.reserve(frameInterface, inbound, n, ""); r != nil {
			r.data = q.rx.copyTo(r.data, n, c.snapLen)
			c.commit(r)
		}
	}
}
