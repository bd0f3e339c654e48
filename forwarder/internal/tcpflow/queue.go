package tcpflow

import (
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/netstack"
)

// Queue queues segments at the stack's endpoints, within the memory budget. It stands in
// the place of the stack's own queue in front of every endpoint.
type Queue struct {
	tcpProtocol
	queue netstack.SegmentQueue // the same
	t     *Forwarder
}

// tcpProtocol is what the stack wants of its TCP.
type tcpProtocol interface {
	stack.TransportProtocol
	stack.SendBufSizeProto
}

// QueuePacket implements the stack's queue, for segments that come by its own way: those that
// were in fragments, or have options.
func (q *Queue) QueuePacket(ep stack.TransportEndpoint, id stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	q.t.Mu.Lock()
	fl := q.t.Flows[id]
	q.t.Mu.Unlock()
	if q.t.asks(fl, ep, id, pkt) {
		return
	}
	q.put(fl, ep, id, pkt)
}

// put queues a segment of fl's, or what there is room for of it.
func (q *Queue) put(fl *Flow, ep stack.TransportEndpoint, id stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	if payload := pkt.Data().Size(); payload > 0 {
		if e, ok := ep.(*tcp.Endpoint); ok && fl != nil && fl.mem.M.Pressed.Load() {
			if payload = fl.mem.MayReceive(e, pkt); payload == 0 {
				return
			}
		}
		if netstack.Wasteful(pkt) {
			pkt = q.t.Gate.Memory.Compact(pkt)
			defer pkt.DecRef()
		}
	}
	q.queue.QueuePacket(ep, id, pkt)
}

// NewProtocol is the factory of the stack's TCP, whose queue is q.
func NewProtocol(q *Queue) stack.TransportProtocolFactory {
	return func(s *stack.Stack) stack.TransportProtocol {
		p := tcp.NewProtocol(s)
		q.tcpProtocol, q.queue = p.(tcpProtocol), p.(netstack.SegmentQueue)
		return q
	}
}

// settleMemory updates the charge for ep after segments were processed.
func (fl *Flow) settleMemory(ep *tcp.Endpoint) {
	if fl.local {
		return // see HoldStream
	}
	fl.mem.TallyReceived(ep)
	if fl.mem.Starved.Load() {
		fl.T.Engine.Put(&fl.DownTask) // which tallies what is sent
		return
	}
	if fl.mem.Down.Held.Load() > admit.FlowMinimum && fl.Down.Mu.TryLock() {
		fl.mem.TallySent(ep)
		fl.UnlockDown()
	}
}

// TallyAll updates the charges of all flows. Segments that an endpoint's own goroutine in the stack
// processes are otherwise not counted until the flow moves again.
func (t *Forwarder) TallyAll() {
	for _, fl := range t.All() {
		fl.Mu.Lock()
		ep, _ := fl.Ep.(*tcp.Endpoint)
		fl.Mu.Unlock()
		if ep != nil {
			fl.settleMemory(ep)
		}
	}
}
