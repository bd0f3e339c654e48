package tcpflow

// TCP's way past the stack's goroutines.
//
// In the stack a segment goes from the device's reader to a goroutine that processes it, and from
// there to one that moves the bytes on: two hand-overs between threads, each more expensive than
// the work itself. Here the reader does all of it. Segments of established flows are queued at
// their endpoints while the batch is read; at its end each endpoint concerned is processed, and
// what its waiter asks for is done, on the same goroutine:
//
//	read ─► queue at ep … read ─► queue at ep ─► end of batch ─► HandleConnected ─► pumps
//
// The stack leaves the processing of an endpoint that a user holds to that user. The reader
// therefore takes the endpoint as a user does when it queues the first segment (the mark stays when
// the lock is let go), and gives it back properly at the end, which wakes the stack's own goroutine
// if anything is left. Another goroutine that takes the endpoint meanwhile takes over the mark, and
// processing continues as in the stack.

import (
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// inlineTCP is the flows whose endpoints have segments queued in this batch.
type inlineTCP struct {
	batched bool // the link says when a batch ends

	mu    sync.Mutex
	flows []batched
	spare []batched
}

type batched struct {
	fl *Flow
	ep *tcp.Endpoint
}

// PassTCP reports whether pkt, which starts with the IP header and has passed the filter, was a
// plain segment of an established flow. If so, it has handled pkt.
func (t *Forwarder) PassTCP(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) bool {
	in := &t.Inline
	if !in.batched {
		return false
	}
	hl, total := packet.PlainPacket(proto, pkt, uint8(header.TCPProtocolNumber), header.TCPMinimumSize)
	if total == 0 {
		return false
	}
	b, ok := pkt.Data().PullUp(hl + header.TCPMinimumSize)
	if !ok {
		return false
	}
	h := header.TCP(b[hl:])
	thl := int(h.DataOffset())
	if thl < header.TCPMinimumSize || hl+thl > total || isSYN(h.Flags()) {
		return false
	}
	id := stack.TransportEndpointID{LocalPort: h.DestinationPort(), RemotePort: h.SourcePort()}
	if proto == header.IPv4ProtocolNumber {
		id.LocalAddress, id.RemoteAddress = header.IPv4(b).DestinationAddress(), header.IPv4(b).SourceAddress()
	} else {
		id.LocalAddress, id.RemoteAddress = header.IPv6(b).DestinationAddress(), header.IPv6(b).SourceAddress()
	}
	t.Mu.Lock()
	fl := t.Flows[id]
	t.Mu.Unlock()
	if fl == nil {
		return false
	}
	var ep *tcp.Endpoint
	if fl.Live.Load() {
		ep = fl.Ep.(*tcp.Endpoint) // set before live
	} else if ep, _ = t.Stack.FindTransportEndpoint(proto, header.TCPProtocolNumber, id, packet.NICID).(*tcp.Endpoint); ep == nil {
		return false
	}
	if state := netstack.EndpointState(ep); state != tcp.StateSynRecv && !netstack.Connected(state) {
		return false
	}
	pkt.NetworkProtocolNumber = proto
	pkt.TransportProtocolNumber = header.TCPProtocolNumber
	if _, ok := pkt.NetworkHeader().Consume(hl); !ok {
		return false
	}
	if _, ok := pkt.TransportHeader().Consume(thl); !ok {
		return false
	}
	pkt.Data().CapLength(total - hl - thl)
	in.enter(fl, ep)
	t.queue.put(fl, ep, id, pkt)
	return true
}

// enter records that fl has segments in this batch.
func (in *inlineTCP) enter(fl *Flow, ep *tcp.Endpoint) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if fl.inBatch || !ep.TryLock() {
		return
	}
	ep.ResumeWork()
	ep.LockUser()
	ep.ResumeWork()
	fl.inBatch = true
	in.flows = append(in.flows, batched{fl, ep})
}

// Flush processes the queued batch. Each of several readers may Flush what another has queued.
func (in *inlineTCP) Flush() {
	in.mu.Lock()
	if len(in.flows) == 0 {
		in.mu.Unlock()
		return
	}
	flows := in.flows
	in.flows, in.spare = in.spare, nil
	for _, b := range flows {
		b.fl.inBatch = false
	}
	in.mu.Unlock()
	for _, b := range flows {
		b.process()
	}
	clear(flows)
	in.mu.Lock()
	in.spare = flows[:0]
	in.mu.Unlock()
}

// process has the stack take in what is queued, and moves on what came of it.
func (b batched) process() {
	b.fl.inlined.Store(true)
	shaking := netstack.EndpointState(b.ep) == tcp.StateSynRecv
	if shaking {
		netstack.HandleConnecting(b.ep)
	}
	netstack.HandleConnected(b.ep) // does nothing if it is not
	b.ep.LockUser()
	b.ep.UnlockUser()
	b.fl.inlined.Store(false)
	b.fl.runWanted(true)
	b.fl.settleMemory(b.ep)
	if !shaking {
		return
	}
	switch netstack.EndpointState(b.ep) {
	case tcp.StateSynRecv:
	case tcp.StateError, tcp.StateClose:
		if b.fl.inHandshake() { // else somebody has accepted it meanwhile
			b.fl.Abort(nat.ReasonHandshakeFailed)
		}
	default:
		b.fl.T.Acceptor.accept()
	}
}

// Work that was asked for while the reader is about to do it.
const (
	wantUp uint32 = 1 << iota
	wantDown
)

// want leaves work to the reader if it is in process, and reports whether it did.
func (fl *Flow) want(what uint32) bool {
	if !fl.inlined.Load() {
		return false
	}
	fl.wanted.Or(what)
	if !fl.inlined.Load() {
		// It may have looked already.
		fl.runWanted(false)
	}
	return true
}

func (fl *Flow) runWanted(here bool) {
	if fl.wanted.Load() == 0 {
		return
	}
	what := fl.wanted.Swap(0)
	if what&wantUp != 0 {
		if here {
			fl.pumpUp()
		} else {
			fl.T.Engine.Put(&fl.UpTask)
		}
	}
	if what&wantDown != 0 {
		if here {
			fl.pumpDown()
		} else {
			fl.T.Engine.Put(&fl.DownTask)
		}
	}
}

var _ netstack.SegmentQueue = (*Queue)(nil)
