package netstack

// The memory that a TCP endpoint of netstack holds. The API returns how many bytes there are to
// read; the memory that they take, and the bytes that wait to be sent, are in unexported fields.

import (
	"fmt"
	"reflect"
	"sync/atomic"
	"unsafe"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// ReceiveMemUsed is netstack's count of the memory of the sandbox's segments that ep holds, in
// whichever queue: their bytes, headers included, and the structures around them.
//
//go:linkname ReceiveMemUsed gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).receiveMemUsed
func ReceiveMemUsed(ep *tcp.Endpoint) int

// tcpFields holds the offsets of the fields that no method returns.
var tcpFields = findTCPFields()

type tcpOffsets struct {
	sndBufUsed, rcvBufUsed, rcv, rcvNxt, snd, sndWnd uintptr
}

// findTCPFields panics if netstack has changed: the counts would be nonsense.
func findTCPFields() (o tcpOffsets) {
	of := func(t reflect.Type, want reflect.Type, path ...string) (offset uintptr, last reflect.Type) {
		for _, name := range path {
			f, ok := t.FieldByName(name)
			if !ok {
				panic(fmt.Sprintf("forwarder: netstack's %s has no field %s", t, name))
			}
			offset += f.Offset
			t = f.Type
		}
		if want != nil && t.Kind() != want.Kind() {
			panic(fmt.Sprintf("forwarder: netstack's field %v is a %s, not a %s", path, t, want))
		}
		return offset, t
	}
	ep, number := reflect.TypeFor[tcp.Endpoint](), reflect.TypeFor[int]()
	o.sndBufUsed, _ = of(ep, number, "sndQueueInfo", "TCPSndBufState", "SndBufUsed")
	o.rcvBufUsed, _ = of(ep, number, "TCPRcvBufState", "RcvBufUsed")
	var receiver reflect.Type
	o.rcv, receiver = of(ep, reflect.TypeFor[*int](), "rcv")
	o.rcvNxt, _ = of(receiver.Elem(), reflect.TypeFor[uint32](), "TCPReceiverState", "RcvNxt")
	var sender reflect.Type
	o.snd, sender = of(ep, reflect.TypeFor[*int](), "snd")
	o.sndWnd, _ = of(sender.Elem(), reflect.TypeFor[uint32](), "TCPSenderState", "SndWnd")
	return o
}

// SendQueued is how many bytes ep holds that the sandbox has not acknowledged. It is read without
// the lock that guards it, and only as a size: a value that changes meanwhile is read again.
// Netstack counts an acknowledged end of stream as a byte, and so down to -1.
func SendQueued(ep *tcp.Endpoint) int {
	return max(int(atomic.LoadInt64((*int64)(unsafe.Add(unsafe.Pointer(ep), tcpFields.sndBufUsed)))), 0)
}

// ReceiveQueued is how many bytes ep has to read; likewise.
func ReceiveQueued(ep *tcp.Endpoint) int {
	return int(atomic.LoadInt64((*int64)(unsafe.Add(unsafe.Pointer(ep), tcpFields.rcvBufUsed))))
}

// ReceiveNext is the sequence number that ep waits for; likewise. It is 0 and false before the
// handshake's end.
func ReceiveNext(ep *tcp.Endpoint) (uint32, bool) {
	rcv := atomic.LoadPointer((*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(ep), tcpFields.rcv)))
	if rcv == nil {
		return 0, false
	}
	return atomic.LoadUint32((*uint32)(unsafe.Add(rcv, tcpFields.rcvNxt))), true
}

// SendWindow is how much the sandbox's window lets ep send; likewise. It is 0 before the
// handshake's end.
func SendWindow(ep *tcp.Endpoint) uint32 {
	snd := atomic.LoadPointer((*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(ep), tcpFields.snd)))
	if snd == nil {
		return 0
	}
	return atomic.LoadUint32((*uint32)(unsafe.Add(snd, tcpFields.sndWnd)))
}

const (
	// SegmentOverhead is roughly what a segment takes beside its bytes: its own structure, the
	// packet's, a view and a chunk's header.
	SegmentOverhead = tcp.SegOverheadSize + ViewOverhead
	// ViewOverhead is what each further chunk takes beside its bytes.
	ViewOverhead = 96
	// LeastChunk and MostChunk are the pool's smallest and largest chunk.
	LeastChunk = 64
	MostChunk  = buffer.MaxChunkSize
	// waste is how much larger than its bytes a waiting packet's chunks may be, as a fraction:
	// WasteOf / WasteIn.
	WasteOf, WasteIn = 3, 2
)

// ChunksFor is the size of the chunks for n bytes if they are filled from the front.
func ChunksFor(n int) (size int) {
	for ; n > MostChunk; n -= MostChunk {
		size += MostChunk + ViewOverhead
	}
	chunk := LeastChunk
	for chunk < n {
		chunk <<= 1
	}
	return size + chunk
}

// chunkOf returns the chunk for the first of left bytes: the pool's next larger one, or, if that
// would be a waste, the next smaller one, which leaves some bytes for another.
func chunkOf(left int) int {
	chunk := LeastChunk
	for chunk < left && chunk < MostChunk {
		chunk <<= 1
	}
	if chunk > LeastChunk && chunk*WasteIn > left*WasteOf {
		chunk >>= 1
	}
	return chunk
}

// PacketCost is the memory that pkt takes: its chunks and the structures around them.
func PacketCost(pkt *stack.PacketBuffer) (size int) {
	views, _ := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		size += v.Capacity() + ViewOverhead
	}
	return size + stack.PacketBufferStructSize
}

// Wasteful reports whether pkt's chunks are much larger than the packet: 9 KiB for 2 KiB of
// an 8 KiB view, 128 bytes for each 8 of a packet that came in fragments.
func Wasteful(pkt *stack.PacketBuffer) bool {
	bytes := pkt.Size()
	allowed := bytes*WasteOf/WasteIn + 2*ViewOverhead
	size := 0
	views, _ := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		if size += v.Capacity() + ViewOverhead/2; size > allowed {
			return true
		}
	}
	return false
}

// Compact returns the bytes of pkt in a packet of its own, in chunks of about their size, with the
// parsed headers and the link's metadata.
func Compact(pkt *stack.PacketBuffer) *stack.PacketBuffer {
	var out buffer.Buffer
	left := pkt.Size()
	views, skip := pkt.AsViewList()
	v := views.Front()
	for left > 0 {
		to := buffer.NewView(chunkOf(left))
		for room := min(to.Capacity(), left); room > 0; {
			for skip >= v.Size() {
				skip -= v.Size()
				v = v.Next()
			}
			n, err := to.Write(v.AsSlice()[skip:min(skip+room, v.Size())])
			if err != nil {
				panic("forwarder: a view does not take what it was made for: " + err.Error())
			}
			room, left, skip = room-n, left-n, skip+n
		}
		// Every view but the last is full, so Append links it and copies nothing.
		if err := out.Append(to); err != nil {
			panic("forwarder: appending to a buffer of one's own: " + err.Error())
		}
	}
	c := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: out})
	Consume(c.LinkHeader(), len(pkt.LinkHeader().Slice()))
	Consume(c.NetworkHeader(), len(pkt.NetworkHeader().Slice()))
	Consume(c.TransportHeader(), len(pkt.TransportHeader().Slice()))
	c.NetworkProtocolNumber, c.TransportProtocolNumber = pkt.NetworkProtocolNumber, pkt.TransportProtocolNumber
	c.PktType, c.NICID, c.InputNICID = pkt.PktType, pkt.NICID, pkt.InputNICID
	c.RXChecksumValidated, c.GSOOptions, c.NetworkPacketInfo = pkt.RXChecksumValidated, pkt.GSOOptions, pkt.NetworkPacketInfo
	return c
}

// Consume marks n bytes as a header that the packet had.
func Consume(h stack.PacketHeader, n int) {
	if n == 0 {
		return
	}
	if _, ok := h.Consume(n); !ok {
		panic("forwarder: a copy of a packet is shorter than its headers")
	}
}
