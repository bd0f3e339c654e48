package forwarder

// A TCP flow's part of the memory budget.
//
//	up    segments of the sandbox's, until the host socket takes their bytes
//	down  bytes of the far side's, until the sandbox acknowledges them
//
// Up, netstack counts what it holds; here it is charged, and segments that take much more
// memory than they have bytes are copied before they are queued (tcpQueue). Down, each write
// to the stack is noted with what it takes, and repaid in the order of the acknowledgements
// (sendLedger).
//
// Backpressure goes before refusal. Down, what may not be held is not read from the host
// socket, whose window closes; the pump goes on when an acknowledgement has made room. Up,
// the window is what holds the sandbox back: it begins small and grows only for a flow whose
// bytes are taken as they come, so that many flows whose readers stand still were not
// promised more than there is. What is sent nonetheless, within a window that was offered
// when there was more, is cut to the flow's share: the sandbox sends it again.

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

const (
	// receiveStart is the receive buffer that a flow begins with, of which netstack offers
	// half as window; receiveStartPressed under pressure.
	receiveStart        = tcpBufferDefault
	receiveStartPressed = 8 << 10
	// receiveJudged is what it may grow to while first bytes are judged, which wait where they
	// are: 1 500 segments of one byte, a ClientHello, take more than 1 MiB.
	receiveJudged = tcpBufferMax
	// receiveOffered is what the segments of a window of receiveStartPressed take at most. In
	// order they are taken in under pressure as long as anything is left: a flow that keeps to
	// its window does not lose a part of it.
	receiveOffered = 12 << 10
	// provenMoving is how much has to pass for a flow to count as moving under pressure: more
	// than a kernel's buffer (net.core.rmem_max) takes in for a reader that stands still.
	provenMoving = 256 << 10
	// receiveSteady is the payload that a flow is always let have waiting, in order, so that
	// it goes on whatever else it holds.
	receiveSteady = 512
	// smallRead is a read that takes more for the structures around it than for its bytes.
	// While more than smallReads is held, such bytes stay in the host socket and gather.
	smallRead  = 1 << 10
	smallReads = 256 << 10
)

// tcpMemory is the charges of a flow through the stack.
type tcpMemory struct {
	shares
	starved atomic.Bool   // the down pump waits until less is held (maySend)
	moving  atomic.Bool   // up: what came was taken at once, and was much
	queued  atomic.Uint32 // where the last segment that was queued in order ends

	// Guarded by the up pump's mu.
	window int // the receive buffer as last set; 0: as it was made
	grew   int // bytes that passed since
	proven int // bytes that passed since something was left waiting under pressure

	// Guarded by the down pump's mu.
	sent       sendLedger
	sendBuffer int64 // the send buffer's size before the pump had to wait; 0: it does not
}

// tallyReceived charges what ep holds of the sandbox's.
func (fm *tcpMemory) tallyReceived(ep *tcp.Endpoint) {
	fm.up.set(max(receivedCost(ep), flowMinimum))
}

// receivedCost is at most what the segments that ep holds take.
func receivedCost(ep *tcp.Endpoint) int64 {
	return int64(receiveMemUsed(ep)) * wasteOf / wasteIn
}

// tallySent charges what ep still holds of the far side's. The caller holds the down pump's mu.
func (fm *tcpMemory) tallySent(ep *tcp.Endpoint) {
	fm.sent.settle(sendQueued(ep))
	fm.down.set(max(fm.sent.held, flowMinimum))
}

// maySend is how many of queued bytes may be read from the host socket and written to the
// stack now. If it is 0 the flow is starved until the pump asks again, which settleMemory has
// it do when the sandbox has acknowledged some, and so has the endpoint, if it can be told in
// time. The caller holds the down pump's mu.
func (fm *tcpMemory) maySend(ep *tcp.Endpoint, queued int) int {
	fm.tallySent(ep)
	n := fm.sendRoom(queued)
	if n == 0 {
		fm.starved.Store(true)
		fm.m.starving.Store(true)
		fm.starve(ep)
		// What was acknowledged before is told by nobody.
		fm.tallySent(ep)
		n = fm.sendRoom(queued)
	}
	if n == 0 && !connected(endpointState(ep)) {
		n = queued // the write is told why it can have no more
	}
	if n > 0 && fm.sendBuffer > 0 {
		ep.SocketOptions().SetSendBufferSize(fm.sendBuffer, false)
		fm.sendBuffer = 0
	}
	if n > 0 && fm.starved.Load() {
		fm.starved.Store(false)
	}
	return n
}

// starve has the endpoint tell of the next acknowledgement: netstack tells when less than half
// of the send buffer is used that was more. One that is being processed at this moment may go by
// the size before, and be told by nobody.
func (fm *tcpMemory) starve(ep *tcp.Endpoint) {
	opts := ep.SocketOptions()
	if fm.sendBuffer == 0 {
		fm.sendBuffer = opts.GetSendBufferSize()
	}
	opts.SetSendBufferSize(2*int64(sendQueued(ep)), false)
}

func (fm *tcpMemory) sendRoom(queued int) int {
	held := fm.sent.held
	if held > smallReads && queued < smallRead {
		return 0
	}
	room := int(fm.m.limit(fm.sent.acked >= provenMoving)-held) - segmentOverhead
	if room < leastChunk {
		return 0
	}
	if room >= mostChunk {
		return min(queued, room-room/mostChunk*viewOverhead)
	}
	chunk := leastChunk // the largest that there is room for
	for chunk<<1 <= room {
		chunk <<= 1
	}
	return min(queued, chunk)
}

// wrote charges a write of n bytes. The caller holds the down pump's mu.
func (fm *tcpMemory) wrote(n int) {
	fm.sent.wrote(n)
	fm.down.set(max(fm.sent.held, flowMinimum))
}

// fit sets the window to what the flow may have, after n bytes were taken from ep. The caller
// holds the up pump's mu.
func (fm *tcpMemory) fit(ep *tcp.Endpoint, n int) {
	fm.tallyReceived(ep)
	empty := receiveQueued(ep) == 0
	if fm.window == 0 {
		fm.window = int(ep.SocketOptions().GetReceiveBufferSize())
	}
	pressed := fm.m.pressed.Load()
	want := fm.window
	if fm.proven < provenMoving {
		if fm.proven += n; fm.proven >= provenMoving {
			fm.moving.Store(true)
		}
	}
	switch fm.grew += n; {
	case empty && fm.grew >= fm.window/2:
		// A window and more came and went.
		if most := fm.mostWindow(pressed); fm.window < most {
			want = min(fm.window*2, most)
		}
		fm.grew = 0
	case !empty && pressed && fm.window > receiveStartPressed:
		want = receiveStartPressed
		fm.proven = 0
		fm.moving.Store(false)
	}
	if want != fm.window {
		fm.window = want
		ep.SocketOptions().SetReceiveBufferSize(int64(want), true)
	}
}

// fitJudged gives first bytes that come in small pieces the room that they need. Without
// pressure alone: a flow that begins under it has room for a few segments. The caller holds
// the up pump's mu.
func (fm *tcpMemory) fitJudged(ep *tcp.Endpoint) {
	opts := ep.SocketOptions()
	size := opts.GetReceiveBufferSize()
	if int64(receiveMemUsed(ep)) > size/2 && size < receiveJudged && !fm.m.pressed.Load() {
		opts.SetReceiveBufferSize(min(2*size, receiveJudged), true)
	}
}

// mostWindow is what a receive buffer may grow to.
func (fm *tcpMemory) mostWindow(pressed bool) int {
	if !pressed {
		return tcpBufferDefault
	}
	return int(max(2*fm.m.limit(fm.moving.Load()), receiveStartPressed))
}

// sendLedger is what writes to the stack take, oldest first, until they are acknowledged. It
// remembers a few marks only: what lies between two is repaid when all of it is acknowledged.
type sendLedger struct {
	written uint64 // bytes, ever
	acked   uint64 // of them
	held    int64  // what is not repaid
	n       int
	marks   [8]sendMark
}

// sendMark says that all writes up to a byte, since the mark before it, take cost.
type sendMark struct {
	end  uint64
	cost int64
}

// sendGrain is about what a mark stands for at least.
const sendGrain = 64 << 10

// wrote notes a write of bytes.
func (l *sendLedger) wrote(bytes int) {
	if bytes <= 0 {
		return
	}
	cost := int64(segmentOverhead + chunksFor(bytes))
	l.written += uint64(bytes)
	l.held += cost
	if l.n == 0 || l.marks[l.n-1].cost >= sendGrain {
		if l.n == len(l.marks) {
			for i := range l.n / 2 {
				l.marks[i] = sendMark{l.marks[2*i+1].end, l.marks[2*i].cost + l.marks[2*i+1].cost}
			}
			l.n /= 2
		}
		l.marks[l.n] = sendMark{}
		l.n++
	}
	last := &l.marks[l.n-1]
	last.end = l.written
	last.cost += cost
}

// settle repays the writes of which nothing is among the queued bytes any more.
func (l *sendLedger) settle(queued int) {
	l.acked = l.written - min(uint64(queued), l.written)
	done := 0
	for done < l.n && l.marks[done].end <= l.acked {
		l.held -= l.marks[done].cost
		done++
	}
	if done > 0 {
		l.n = copy(l.marks[:], l.marks[done:l.n])
	}
}

// tcpQueue queues segments at the stack's endpoints, within the memory budget. It stands in
// the place of the stack's own queue in front of every endpoint.
type tcpQueue struct {
	tcpProtocol
	queue segmentQueue // the same
	t     *tcpForwarder
}

// tcpProtocol is what the stack wants of its TCP.
type tcpProtocol interface {
	stack.TransportProtocol
	stack.SendBufSizeProto
}

// QueuePacket implements the stack's queue, for segments that come by its own way: those that
// were in fragments, or have options.
func (q *tcpQueue) QueuePacket(ep stack.TransportEndpoint, id stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	q.t.mu.Lock()
	fl := q.t.flows[id]
	q.t.mu.Unlock()
	if q.t.asks(fl, ep, id, pkt) {
		return
	}
	q.put(fl, ep, id, pkt)
}

// put queues a segment of fl's, or what there is room for of it.
func (q *tcpQueue) put(fl *tcpFlow, ep stack.TransportEndpoint, id stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	if payload := pkt.Data().Size(); payload > 0 {
		if e, ok := ep.(*tcp.Endpoint); ok && fl != nil && fl.mem.m.pressed.Load() {
			if payload = fl.mem.mayReceive(e, pkt); payload == 0 {
				return
			}
		}
		if wasteful(pkt) {
			pkt = q.t.gate.memory.compact(pkt)
			defer pkt.DecRef()
		}
	}
	q.queue.QueuePacket(ep, id, pkt)
}

// mayReceive cuts a segment with data to what the flow may hold under pressure, and returns
// how many bytes that leaves it.
func (fm *tcpMemory) mayReceive(ep *tcp.Endpoint, pkt *stack.PacketBuffer) int {
	h := header.TCP(pkt.TransportHeader().Slice())
	payload := pkt.Data().Size()
	next, ok := receiveNext(ep)
	if !ok || h.Flags().Contains(header.TCPFlagRst) {
		return payload
	}
	if queued := fm.queued.Load(); int32(queued-next) > 0 {
		next = queued // it is in order behind what the batch has queued, and nobody has seen
	}
	room := int(fm.m.limit(fm.moving.Load())-receivedCost(ep))*wasteIn/wasteOf - segmentOverhead
	if ahead := int32(h.SequenceNumber() - next); ahead > 0 {
		// It waits for others, which must find room when they come.
		if room/2 >= payload {
			return payload
		}
		fm.m.dropped.Add(1)
		return 0
	}
	if fm.m.left() > 0 {
		room = max(room, int(receiveOffered-receivedCost(ep))*wasteIn/wasteOf-segmentOverhead)
	}
	if receiveQueued(ep) < receiveSteady {
		room = max(room, receiveSteady+int(next-h.SequenceNumber()))
	}
	if room < payload {
		if room < receiveSteady || !cutSegment(pkt, h, room) {
			fm.m.dropped.Add(1)
			return 0
		}
		fm.m.cut.Add(1)
		payload = room
	}
	fm.queued.Store(h.SequenceNumber() + uint32(payload))
	return payload
}

// cutSegment leaves the first n bytes of a segment's data, if its checksum is right.
func cutSegment(pkt *stack.PacketBuffer, h header.TCP, n int) bool {
	if !pkt.RXChecksumValidated {
		src, dst := pkt.Network().SourceAddress(), pkt.Network().DestinationAddress()
		if _, intact, ok := header.TCPValid(h, func() uint16 { return pkt.Data().Checksum() }, uint16(pkt.Data().Size()), src, dst, false); !ok || !intact {
			return false
		}
		pkt.RXChecksumValidated = true
	}
	pkt.Data().CapLength(n)
	// Neither the end of the stream nor that of a record is where it was.
	h.SetFlags(uint8(h.Flags() &^ (header.TCPFlagFin | header.TCPFlagPsh)))
	return true
}

// newTCPProtocol is the factory of the stack's TCP, whose queue is q.
func newTCPProtocol(q *tcpQueue) stack.TransportProtocolFactory {
	return func(s *stack.Stack) stack.TransportProtocol {
		p := tcp.NewProtocol(s)
		q.tcpProtocol, q.queue = p.(tcpProtocol), p.(segmentQueue)
		return q
	}
}

// settleMemory charges anew what ep holds after segments were processed.
func (fl *tcpFlow) settleMemory(ep *tcp.Endpoint) {
	if fl.local {
		return // see holdStream
	}
	fl.mem.tallyReceived(ep)
	if fl.mem.starved.Load() {
		fl.t.engine.put(&fl.downTask) // which tallies what is sent
		return
	}
	if fl.mem.down.held.Load() > flowMinimum && fl.down.mu.TryLock() {
		fl.mem.tallySent(ep)
		fl.unlockDown()
	}
}

// tallyAll charges all flows anew. What an endpoint's own goroutine in the stack processed is
// seen by nobody else until the flow moves again.
func (t *tcpForwarder) tallyAll() {
	for _, fl := range t.all() {
		fl.mu.Lock()
		ep, _ := fl.ep.(*tcp.Endpoint)
		fl.mu.Unlock()
		if ep != nil {
			fl.settleMemory(ep)
		}
	}
}

const (
	// streamBuffer is netstack's buffer of a connection to the resolver, each way; what it
	// takes in small answers is below streamMemory.
	streamBuffer = 8 << 10
	streamMemory = 256 << 10
)

// holdStream charges, once for all, what a connection to the resolver may hold: it is read and
// written by the resolver's goroutines, and there are few (dns.Limits.Streams).
func (fm *tcpMemory) holdStream(ep *tcp.Endpoint) {
	fm.up.set(streamMemory)
	opts := ep.SocketOptions()
	opts.SetReceiveBufferSize(streamBuffer, true)
	opts.SetSendBufferSize(streamBuffer, true)
}
