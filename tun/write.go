package tun

import (
	"encoding/binary"
	"fmt"
	"syscall"
	"time"
	"unsafe"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"golang.org/x/sys/unix"
)

// The write path. A packet leaves on the goroutine that made it, as one writev of
// [virtio-net header][headers][data...]; the kernel takes a frame whole or not at
// all, so writers need no lock between them. With several queues (queues.go) the flow
// picks the queue, and the kernel then answers on the same one.
//
// If a queue is full, the writer waits in poll(2) for at most writePatience: a container can keep
// its device full for as long as it likes, and other traffic must not wait for that. A frame that
// finds no room by then is lost, and the following frames do not wait at all until the queue has
// accepted one. Frames that waiting would not save are lost too: the interface is down (EIO), the
// device is gone (EBADFD), or the kernel refused the frame. All are counted and, as on any wire,
// not reported to the sender.

// maxIOV is how many pieces one writev gathers from the stack; a packet in more pieces is copied
// into one buffer first. The array lives on the writer's stack.
const maxIOV = 64

// WritePackets implements stack.LinkEndpoint. It fails only when the device has ended.
func (e *Endpoint) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for i, pkt := range pkts.AsSlice() {
		if err := e.writePacket(pkt); err != nil {
			return i, err
		}
	}
	return pkts.Len(), nil
}

// QDisc returns the queueing discipline to give to stack.NICOptions: it has no queue and writes
// packets at once. Netstack's own default does the same but allocates a list per packet.
func (e *Endpoint) QDisc() stack.QueueingDiscipline { return directQDisc{e} }

type directQDisc struct{ e *Endpoint }

func (d directQDisc) WritePacket(pkt *stack.PacketBuffer) tcpip.Error { return d.e.writePacket(pkt) }

// Close has nothing to flush.
func (directQDisc) Close() {}

func (e *Endpoint) writePacket(pkt *stack.PacketBuffer) tcpip.Error {
	q := e.queues[0]
	if n := e.written.Load(); n > 1 {
		q = e.queues[flowHash(pkt)%n]
	}
	var vnet [vnetHeaderLen]byte
	h := offloadHeader(pkt)
	h.encode(&vnet)

	var iov [maxIOV]unix.Iovec
	iov[0].Base = &vnet[0]
	iov[0].SetLen(vnetHeaderLen)
	count, size := gather(pkt, iov[1:])

	var errno syscall.Errno
	if count < 0 {
		errno = q.writeSlowly(flatten(&vnet, pkt))
	} else {
		errno = q.writev(iov[:1+count])
		if errno == unix.EAGAIN {
			errno = q.writeSlowly(flatten(&vnet, pkt))
		}
	}
	why := reasonNone
	switch {
	case errno == 0:
		q.count.txFrames.Add(1)
		q.count.txBytes.Add(uint64(size))
		if h.gsoType != gsoNone {
			q.count.txGSO.Add(1)
		}
	case errno == unix.EAGAIN:
		why = queueFull
	case errno == unix.EIO:
		why = interfaceDown
	case isGone(errno):
		why = deviceGone
		e.writeEnded(errno)
	default:
		why = writeFailed
	}
	if why != reasonNone {
		q.count.dropped[why].Add(1)
	}
	if captures := e.captures.Load(); captures != nil {
		captureTx(*captures, pkt, size, why)
	}
	if why == deviceGone {
		return &tcpip.ErrClosedForSend{}
	}
	return nil
}

// writev makes one attempt.
func (q *queue) writev(iov []unix.Iovec) syscall.Errno {
	for {
		q.fdMu.RLock()
		if q.fd < 0 || q.e.closing.Load() {
			q.fdMu.RUnlock()
			return unix.EBADFD
		}
		_, _, errno := syscall.RawSyscall(unix.SYS_WRITEV, uintptr(q.fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		q.fdMu.RUnlock()
		if errno != unix.EINTR {
			return errno
		}
	}
}

// writeSlowly writes a frame that is in one piece, waiting a while for room. It returns EAGAIN if
// there was none.
func (q *queue) writeSlowly(frame []byte) syscall.Errno {
	iov := []unix.Iovec{{Base: &frame[0]}}
	iov[0].SetLen(len(frame))
	var began time.Time
	for {
		errno := q.writev(iov)
		switch {
		case errno != unix.EAGAIN:
			q.stuck.Store(false)
			return errno
		case q.stuck.Load():
			return errno
		case began.IsZero():
			began = time.Now()
			q.count.txWaits.Add(1)
		case time.Since(began) >= writePatience:
			q.stuck.Store(true)
			return errno
		}
		q.awaitRoom()
	}
}

const (
	// writePatience bounds the wait for room in a queue. A kernel that still takes the container's
	// packets makes room within microseconds.
	writePatience = 200 * time.Millisecond
	// roomWait bounds one poll of the wait, in milliseconds, so that Close need not wait longer for
	// a writer.
	roomWait = 50
)

// awaitRoom waits until the queue may accept a frame again, or is closed.
func (q *queue) awaitRoom() {
	q.fdMu.RLock()
	defer q.fdMu.RUnlock()
	if q.fd >= 0 && !q.e.closing.Load() {
		// Whatever the result, the next attempt shows it.
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(q.fd), Events: unix.POLLOUT}}, roomWait)
	}
}

// gather lists the packet's pieces in iov. It returns a negative count if there are
// more than fit.
func gather(pkt *stack.PacketBuffer, iov []unix.Iovec) (count, size int) {
	views, skip := pkt.AsViewList()
	size = pkt.Size()
	for v := views.Front(); v != nil; v = v.Next() {
		piece := pieceOf(v, &skip)
		if len(piece) == 0 {
			continue
		}
		if count == len(iov) {
			return -1, size
		}
		iov[count].Base = &piece[0]
		iov[count].SetLen(len(piece))
		count++
	}
	return count, size
}

func flatten(vnet *[vnetHeaderLen]byte, pkt *stack.PacketBuffer) []byte {
	frame := make([]byte, 0, vnetHeaderLen+pkt.Size())
	frame = append(frame, vnet[:]...)
	return appendPacket(frame, pkt, pkt.Size())
}

// appendPacket appends at most limit bytes of the packet to dst.
func appendPacket(dst []byte, pkt *stack.PacketBuffer, limit int) []byte {
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil && limit > 0; v = v.Next() {
		piece := pieceOf(v, &skip)
		piece = piece[:min(len(piece), limit)]
		limit -= len(piece)
		dst = append(dst, piece...)
	}
	return dst
}

// pieceOf returns v without its first *skip bytes, and subtracts those from *skip.
func pieceOf(v *buffer.View, skip *int) []byte {
	piece := v.AsSlice()
	n := min(*skip, len(piece))
	*skip -= n
	return piece[n:]
}

// offloadHeader returns the work that the stack left open: the transport checksum, and cutting a
// payload larger than MSS. Packets without GSO options are complete.
func offloadHeader(pkt *stack.PacketBuffer) (h vnetHeader) {
	gso := &pkt.GSOOptions
	if gso.Type == stack.GSONone || gso.Type == stack.GSOGvisor || !gso.NeedsCsum {
		return h
	}
	transportAt := len(pkt.LinkHeader().Slice()) + int(gso.L3HdrLen)
	transportLen := len(pkt.TransportHeader().Slice())
	isUDP := pkt.TransportProtocolNumber == header.UDPProtocolNumber
	if isUDP {
		transportLen = header.UDPMinimumSize
	}
	h.flags = vnetNeedsChecksum
	h.csumStart = uint16(transportAt)
	h.csumOffset = gso.CsumOffset
	if payload := pkt.Size() - transportAt - transportLen; gso.MSS == 0 || payload <= int(gso.MSS) {
		return h
	}
	h.hdrLen = uint16(transportAt + transportLen)
	h.gsoSize = gso.MSS
	switch {
	case isUDP:
		h.gsoType = gsoUDPL4
	case gso.Type == stack.GSOTCPv6:
		h.gsoType = gsoTCPv6
	default:
		h.gsoType = gsoTCPv4
	}
	return h
}

// writeEnded ends the endpoint when a write finds the device gone, possibly before a read does.
func (e *Endpoint) writeEnded(errno syscall.Errno) {
	if !e.closing.Load() {
		e.end(fmt.Errorf("writing to %s: %w (%w)", e.device.name, ErrDeviceGone, errno))
	}
}

// flowHash spreads flows over queues by their ports, which both directions of a
// flow share. Packets without ports stay in order on the first queue.
func flowHash(pkt *stack.PacketBuffer) uint32 {
	switch pkt.TransportProtocolNumber {
	case header.TCPProtocolNumber, header.UDPProtocolNumber:
	default:
		return 0
	}
	ports := pkt.TransportHeader().Slice()
	if len(ports) < 4 {
		return 0
	}
	const fibonacci = 2654435769 // 2^32 divided by the golden ratio spreads consecutive ports
	return binary.BigEndian.Uint32(ports) * fibonacci >> 16
}
