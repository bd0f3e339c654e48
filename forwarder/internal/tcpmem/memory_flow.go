package tcpmem

// A TCP flow's part of the memory budget.
//
//	up    segments of the sandbox's, until the host socket takes their bytes
//	down  bytes of the far side's, until the sandbox acknowledges them
//
// Up, netstack counts the memory that it holds, and it is charged here. Segments that take much
// more memory than they have bytes are copied before they are queued (Queue). Down, each write to
// the stack is recorded with the memory that it takes, which is released in the order of the
// acknowledgements (SendLedger).
//
// Backpressure comes before refusal. Down, bytes that may not be held are not read from the host
// socket, whose window closes; the pump goes on when an acknowledgement has made room. Up, the
// window holds the sandbox back: it begins small and grows only for a flow whose bytes are taken as
// they come, so that many flows with stalled readers are not promised more than there is. Bytes
// that are sent nonetheless, within a window that was offered when there was more, are cut to the
// flow's share: the sandbox sends them again.

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/netstack"
)

const (
	// ReceiveStart is the receive buffer that a flow begins with, of which netstack offers half as
	// window; ReceiveStartPressed is the same under pressure.
	ReceiveStart        = BufferDefault
	ReceiveStartPressed = 8 << 10
	// receiveJudged is the size to which it may grow while first bytes are judged, which wait where
	// they are: 1 500 segments of one byte, a ClientHello, take more than 1 MiB.
	receiveJudged = BufferMax
	// ReceiveOffered is the most memory that the segments of a window of ReceiveStartPressed take.
	// Under pressure, they are accepted in order as long as anything is left: a flow that keeps to
	// its window does not lose a part of it.
	ReceiveOffered = 12 << 10
	// provenMoving is how many bytes must pass before a flow counts as moving under pressure: more
	// than a kernel's buffer (net.core.rmem_max) holds for a stalled reader.
	provenMoving = 256 << 10
	// receiveSteady is the payload that a flow may always have waiting, in order, so that it makes
	// progress whatever else it holds.
	receiveSteady = 512
	// smallRead is a read whose structures take more memory than its bytes. While more than
	// SmallReads is held, such bytes stay in the host socket and gather.
	smallRead  = 1 << 10
	SmallReads = 256 << 10
)

// Flow holds the charges of a flow through the stack.
type Flow struct {
	admit.Shares
	Starved atomic.Bool   // the down pump waits until less is held (MaySend)
	moving  atomic.Bool   // up: the bytes were taken as they came, and were many
	queued  atomic.Uint32 // end of the last segment queued in order

	// Guarded by the up pump's mu.
	window int // the receive buffer as last set; 0: as it was made
	grew   int // bytes that passed since
	proven int // bytes that passed since something was left waiting under pressure

	// Guarded by the down pump's mu.
	sent       SendLedger
	sendBuffer int64 // the send buffer's size before the pump had to wait; 0: it is not waiting
}

// TallyReceived charges the sandbox's bytes that ep holds.
func (fm *Flow) TallyReceived(ep *tcp.Endpoint) {
	fm.Up.Set(max(ReceivedCost(ep), admit.FlowMinimum))
}

// ReceivedCost is the most memory that the segments held by ep take.
func ReceivedCost(ep *tcp.Endpoint) int64 {
	return int64(netstack.ReceiveMemUsed(ep)) * netstack.WasteOf / netstack.WasteIn
}

// TallySent charges the far side's bytes that ep still holds. The caller holds the down pump's mu.
func (fm *Flow) TallySent(ep *tcp.Endpoint) {
	fm.sent.Settle(netstack.SendQueued(ep))
	fm.Down.Set(max(fm.sent.Held, admit.FlowMinimum))
}

// MaySend is how many of queued bytes may be read from the host socket and written to the stack
// now. If it is 0 the flow is starved until the pump asks again. settleMemory makes it ask when the
// sandbox has acknowledged some bytes, and so does the endpoint, if it can be told in time. The
// caller holds the down pump's mu.
func (fm *Flow) MaySend(ep *tcp.Endpoint, queued int) int {
	fm.TallySent(ep)
	n := fm.sendRoom(queued)
	if n == 0 {
		fm.Starved.Store(true)
		fm.M.Starving.Store(true)
		fm.starve(ep)
		// No notification comes for bytes acknowledged before this.
		fm.TallySent(ep)
		n = fm.sendRoom(queued)
	}
	if n == 0 && !netstack.Connected(netstack.EndpointState(ep)) {
		n = queued // let the write fail: its error says why
	}
	if n > 0 && fm.sendBuffer > 0 {
		ep.SocketOptions().SetSendBufferSize(fm.sendBuffer, false)
		fm.sendBuffer = 0
	}
	if n > 0 && fm.Starved.Load() {
		fm.Starved.Store(false)
	}
	return n
}

// starve makes the endpoint signal the next acknowledgement: netstack signals when the used part of
// the send buffer falls below half. An acknowledgement that is being processed at this moment may
// go by the old size, and then no signal comes.
func (fm *Flow) starve(ep *tcp.Endpoint) {
	opts := ep.SocketOptions()
	if fm.sendBuffer == 0 {
		fm.sendBuffer = opts.GetSendBufferSize()
	}
	opts.SetSendBufferSize(2*int64(netstack.SendQueued(ep)), false)
}

func (fm *Flow) sendRoom(queued int) int {
	held := fm.sent.Held
	if held > SmallReads && queued < smallRead {
		return 0
	}
	room := int(fm.M.Limit(fm.sent.acked >= provenMoving)-held) - netstack.SegmentOverhead
	if room < netstack.LeastChunk {
		return 0
	}
	if room >= netstack.MostChunk {
		return min(queued, room-room/netstack.MostChunk*netstack.ViewOverhead)
	}
	chunk := netstack.LeastChunk // the largest that there is room for
	for chunk<<1 <= room {
		chunk <<= 1
	}
	return min(queued, chunk)
}

// Wrote charges a write of n bytes. The caller holds the down pump's mu.
func (fm *Flow) Wrote(n int) {
	fm.sent.Wrote(n)
	fm.Down.Set(max(fm.sent.Held, admit.FlowMinimum))
}

// Fit sets the window to the flow's share, after n bytes were taken from ep. The caller holds the
// up pump's mu.
func (fm *Flow) Fit(ep *tcp.Endpoint, n int) {
	fm.TallyReceived(ep)
	empty := netstack.ReceiveQueued(ep) == 0
	if fm.window == 0 {
		fm.window = int(ep.SocketOptions().GetReceiveBufferSize())
	}
	pressed := fm.M.Pressed.Load()
	want := fm.window
	if fm.proven < provenMoving {
		if fm.proven += n; fm.proven >= provenMoving {
			fm.moving.Store(true)
		}
	}
	switch fm.grew += n; {
	case empty && fm.grew >= fm.window/2:
		// At least a window has come and gone.
		if most := fm.mostWindow(pressed); fm.window < most {
			want = min(fm.window*2, most)
		}
		fm.grew = 0
	case !empty && pressed && fm.window > ReceiveStartPressed:
		want = ReceiveStartPressed
		fm.proven = 0
		fm.moving.Store(false)
	}
	if want != fm.window {
		fm.window = want
		ep.SocketOptions().SetReceiveBufferSize(int64(want), true)
	}
}

// FitJudged makes room for first bytes that come in small pieces. It does so only without pressure:
// a flow that begins under pressure has room for a few segments. The caller holds the up pump's mu.
func (fm *Flow) FitJudged(ep *tcp.Endpoint) {
	opts := ep.SocketOptions()
	size := opts.GetReceiveBufferSize()
	if int64(netstack.ReceiveMemUsed(ep)) > size/2 && size < receiveJudged && !fm.M.Pressed.Load() {
		opts.SetReceiveBufferSize(min(2*size, receiveJudged), true)
	}
}

// mostWindow is the size to which a receive buffer may grow.
func (fm *Flow) mostWindow(pressed bool) int {
	if !pressed {
		return BufferDefault
	}
	return int(max(2*fm.M.Limit(fm.moving.Load()), ReceiveStartPressed))
}

// SendLedger records the memory of writes to the stack, oldest first, until they are acknowledged.
// It keeps only a few marks: the memory between two is released when all of its bytes are
// acknowledged.
type SendLedger struct {
	written uint64 // bytes, ever
	acked   uint64 // of them
	Held    int64  // not yet released
	N       int
	Marks   [8]sendMark
}

// sendMark says that all writes up to a byte, since the mark before it, take cost.
type sendMark struct {
	end  uint64
	cost int64
}

// sendGrain is roughly the least memory that a mark stands for.
const sendGrain = 64 << 10

// Wrote records a write of bytes.
func (l *SendLedger) Wrote(bytes int) {
	if bytes <= 0 {
		return
	}
	cost := int64(netstack.SegmentOverhead + netstack.ChunksFor(bytes))
	l.written += uint64(bytes)
	l.Held += cost
	if l.N == 0 || l.Marks[l.N-1].cost >= sendGrain {
		if l.N == len(l.Marks) {
			for i := range l.N / 2 {
				l.Marks[i] = sendMark{l.Marks[2*i+1].end, l.Marks[2*i].cost + l.Marks[2*i+1].cost}
			}
			l.N /= 2
		}
		l.Marks[l.N] = sendMark{}
		l.N++
	}
	last := &l.Marks[l.N-1]
	last.end = l.written
	last.cost += cost
}

// Settle releases the writes that have no bytes left among the queued ones.
func (l *SendLedger) Settle(queued int) {
	l.acked = l.written - min(uint64(queued), l.written)
	done := 0
	for done < l.N && l.Marks[done].end <= l.acked {
		l.Held -= l.Marks[done].cost
		done++
	}
	if done > 0 {
		l.N = copy(l.Marks[:], l.Marks[done:l.N])
	}
}

// MayReceive cuts a segment with data to what the flow may hold under pressure, and returns
// how many bytes that leaves it.
func (fm *Flow) MayReceive(ep *tcp.Endpoint, pkt *stack.PacketBuffer) int {
	h := header.TCP(pkt.TransportHeader().Slice())
	payload := pkt.Data().Size()
	next, ok := netstack.ReceiveNext(ep)
	if !ok || h.Flags().Contains(header.TCPFlagRst) {
		return payload
	}
	if queued := fm.queued.Load(); int32(queued-next) > 0 {
		next = queued // it follows what the batch has queued, not yet processed
	}
	room := int(fm.M.Limit(fm.moving.Load())-ReceivedCost(ep))*netstack.WasteIn/netstack.WasteOf - netstack.SegmentOverhead
	if ahead := int32(h.SequenceNumber() - next); ahead > 0 {
		// It waits for earlier segments, which must find room when they come.
		if room/2 >= payload {
			return payload
		}
		fm.M.Dropped.Add(1)
		return 0
	}
	if fm.M.Left() > 0 {
		room = max(room, int(ReceiveOffered-ReceivedCost(ep))*netstack.WasteIn/netstack.WasteOf-netstack.SegmentOverhead)
	}
	if netstack.ReceiveQueued(ep) < receiveSteady {
		room = max(room, receiveSteady+int(next-h.SequenceNumber()))
	}
	if room < payload {
		if room < receiveSteady || !cutSegment(pkt, h, room) {
			fm.M.Dropped.Add(1)
			return 0
		}
		fm.M.Cut.Add(1)
		payload = room
	}
	fm.queued.Store(h.SequenceNumber() + uint32(payload))
	return payload
}

// cutSegment keeps the first n bytes of a segment's data, if its checksum is right.
func cutSegment(pkt *stack.PacketBuffer, h header.TCP, n int) bool {
	if !pkt.RXChecksumValidated {
		src, dst := pkt.Network().SourceAddress(), pkt.Network().DestinationAddress()
		if _, intact, ok := header.TCPValid(h, func() uint16 { return pkt.Data().Checksum() }, uint16(pkt.Data().Size()), src, dst, false); !ok || !intact {
			return false
		}
		pkt.RXChecksumValidated = true
	}
	pkt.Data().CapLength(n)
	// The end of the stream or of a record is no longer where it was.
	h.SetFlags(uint8(h.Flags() &^ (header.TCPFlagFin | header.TCPFlagPsh)))
	return true
}

const (
	// streamBuffer is netstack's buffer for a connection to the resolver, each way. The memory that
	// it takes in small answers is below streamMemory.
	streamBuffer = 8 << 10
	streamMemory = 256 << 10
)

// HoldStream charges, once and for all, the memory that a connection to the resolver may hold. The
// resolver's goroutines read and write it, and there are few such connections (dns.Limits.Streams).
func (fm *Flow) HoldStream(ep *tcp.Endpoint) {
	fm.Up.Set(streamMemory)
	opts := ep.SocketOptions()
	opts.SetReceiveBufferSize(streamBuffer, true)
	opts.SetSendBufferSize(streamBuffer, true)
}
