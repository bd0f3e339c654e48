package tun

import (
	"fmt"
	"syscall"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"golang.org/x/sys/unix"
)

// The read path. A batch of a queue's frames is read, inspected and delivered on the caller's
// goroutine, so a frame costs no hand-over between threads and the wire order is kept. The system
// calls are raw: the descriptor never blocks, so telling Go's scheduler about each would only cost
// time and invite it to move the P to another thread.

const (
	// batchFrames and batchBytes bound a batch, so that its data is still in the processor's cache
	// when it is passed on.
	batchFrames = 64
	batchBytes  = 512 << 10
	// maxBadReads bounds consecutive failed reads of a queue that does not report being gone.
	// Beyond it the device is given up, instead of spinning.
	maxBadReads = 64
)

// read delivers a batch of frames and reports whether there may be more.
func (q *queue) read() (more bool) {
	q.reading.Lock()
	defer q.reading.Unlock()
	q.to = q.e.dispatcher.Load()
	if q.to == nil || q.e.closing.Load() || q.readErr != nil {
		return false
	}
	before := q.count.rxBytes.Load()
	n := 0
	for n < batchFrames && q.count.rxBytes.Load()-before < batchBytes {
		more, ended := q.readFrame()
		if ended {
			q.e.end(fmt.Errorf("reading from %s: %w", q.e.device.name, q.readErr))
			return false
		}
		if !more {
			break
		}
		n++
	}
	if n > 0 {
		q.count.rxBatches.Add(1)
	}
	return n == batchFrames || q.count.rxBytes.Load()-before >= batchBytes
}

// readFrame reads and handles one frame.
func (q *queue) readFrame() (more, ended bool) {
	q.rx.refill()
	n, _, errno := syscall.RawSyscall(unix.SYS_READV, uintptr(q.fd), uintptr(unsafe.Pointer(&q.rx.iov[0])), uintptr(len(q.rx.iov)))
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
	// The kernel gave up on a frame (EINVAL: it could not describe it in a virtio-net header;
	// ENOMEM). The next one may be fine.
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

// settleChecksum fills in a checksum that the receiver would not know is open.
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
		// Still open. Type stays GSONone: to the stack this is a packet like any other; the code
		// that forwards it must mark it open again.
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
