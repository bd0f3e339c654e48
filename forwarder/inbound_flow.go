package forwarder

// Flows of the inbound path: how they begin, and how they end.
//
// A flow lives exactly as long as its nat.Lease. It ends by its timeout, by early
// drop, by a byte budget, by a policy that no longer allows it, or because its tuple
// is used anew. Only where we end what both sides think alive are they told, by
// resets.

import (
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice/nat"
	"sluice/policy"
)

// inboundFlow is one flow from outside.
type inboundFlow struct {
	pass
	o     *outside
	tuple nat.Tuple // from outside to the sandbox

	mu  sync.Mutex
	tcp tcpTrack

	// Guarded by outside.mu.
	gone bool // not, or no longer, in the table
	slot int  // in outside.memory, or noSlot
}

func (o *outside) newFlow(tuple nat.Tuple) *inboundFlow {
	return &inboundFlow{o: o, tuple: tuple, gone: true, slot: noSlot}
}

// queryOf is what policy is asked about a flow.
func queryOf(tuple nat.Tuple) policy.Query {
	q := policy.Query{Ingress: true, Proto: tuple.Proto(), Src: tuple.Src(), Dst: tuple.Dst()}
	if q.Proto == protoICMP || q.Proto == protoICMPv6 {
		q.ICMPType, q.ICMPCode = uint8(q.Dst.Port()>>8), uint8(q.Dst.Port())
		q.Dst = netip.AddrPortFrom(q.Dst.Addr(), 0)
	}
	return q
}

// admit charges the flow table for a flow and makes it findable. short: it asks a DNS server.
func (o *outside) admit(fl *inboundFlow, j judged, short bool) error {
	err := o.gate.enter(&fl.pass, fl, j, entry{orig: fl.tuple, forwarded: true, short: short})
	if err != nil {
		return err
	}
	if !o.install(fl) {
		fl.release(nat.ReasonStopped)
		return errFlowEnded
	}
	return nil
}

// begin judges the first packet of a flow and lets it in, or returns why not. A
// reason without a counter means that the packet was dealt with. A flow is never
// picked up in mid-stream: those of the worker before are in its memory, and any other
// segment belongs to what is over, or to a connection of our own socket's.
func (o *outside) begin(tuple nat.Tuple, pkt *stack.PacketBuffer, p *datum) (*inboundFlow, reason) {
	o.beginMu.Lock()
	defer o.beginMu.Unlock()
	if known := o.lookup(tuple); known != nil {
		return known, reason{} // another reader was faster
	}
	// Asked also where policy refuses: a stream that goes on rests on.
	rests := o.gate.tombs.rests(tuple) || o.asks != nil && o.asks(tuple.Src())
	j := o.gate.decide(queryOf(tuple))
	if !j.mayBegin() {
		o.refuse(j, pkt, p)
		return nil, reason{}
	}
	if p.proto == protoTCP {
		switch flags := p.tcp.Flags() & tcpFlagsMask; {
		case flags&header.TCPFlagRst != 0:
			// The end of a flow that is not known any more: the sandbox may want to know.
			o.forward(&o.sandbox, pkt, p)
			return nil, reason{}
		case flags != header.TCPFlagSyn:
			o.refuseTCP(p)
			return nil, o.n.tcpStray
		case o.gate.table.Lookup(tuple.Reverse()) != nil:
			rests = true // the sandbox has a connection by these two ports, and it is not this one
		}
	}
	if rests {
		if p.proto == protoUDP {
			o.sendError(icmpPortUnreachable, pkt, p) // as the host of a closed socket does
		}
		return nil, o.n.rests
	}
	fl := o.newFlow(tuple)
	if err := o.admit(fl, j, p.asks(pkt)); err != nil {
		o.gate.noteLimit(nil, j, err)
		return nil, o.n.flow
	}
	o.n.began.Add(1)
	if p.proto == protoTCP {
		fl.track(nat.Original, p)
	}
	return fl, reason{}
}

// install makes a flow findable, unless it has ended or nothing may begin any more.
func (o *outside) install(fl *inboundFlow) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || fl.lease.Ended() {
		return false
	}
	fl.gone = false
	fl.slot = o.memory.note(fl.tuple, nat.SynSent)
	o.flows[fl.tuple] = fl
	o.count.Store(int32(len(o.flows)))
	return true
}

// remove makes a flow unfindable; it says whether it was findable.
func (fl *inboundFlow) remove() bool {
	o := fl.o
	o.mu.Lock()
	defer o.mu.Unlock()
	if fl.gone {
		return false
	}
	fl.gone = true
	if !o.closed { // what ends with the worker only is for the next one to know
		o.memory.forget(fl.slot)
	}
	delete(o.flows, fl.tuple)
	o.count.Store(int32(len(o.flows)))
	return true
}

// end ends a flow in silence.
func (fl *inboundFlow) end(why nat.Reason) {
	fl.remove()
	fl.lease.Release(why)
}

// halt implements admitted: packets of a flow that cannot be found are judged as a new
// one's are.
func (fl *inboundFlow) halt() { fl.remove() }

// abort implements admitted. Both sides may think the flow alive, and are told.
func (fl *inboundFlow) abort(why nat.Reason) {
	if fl.remove() || fl.revoked.Load() {
		fl.reset()
	}
	fl.release(why)
}

// expire implements admitted.
func (fl *inboundFlow) expire(why nat.Reason) {
	if fl.remove() && why != nat.ReasonTimeout && why != nat.ReasonEarlyDrop {
		fl.reset()
	}
}

// underWay implements admitted.
func (fl *inboundFlow) underWay(policy.Query) []policy.Query { return nil }

// reset sends both sides of a TCP connection the reset that they believe: with the
// number that each has asked for last. A side that has acknowledged nothing yet
// will hear of it when it asks again.
func (fl *inboundFlow) reset() {
	if fl.tuple.Proto() != protoTCP {
		return
	}
	fl.mu.Lock()
	t := fl.tcp
	fl.mu.Unlock()
	if t.state == nat.TimeWait || t.state == nat.Close {
		return
	}
	far, pod := fl.tuple.Src(), fl.tuple.Dst()
	if t.acked[nat.Reply] {
		fl.o.sendReset(&fl.o.sandbox, far, pod, t.ack[nat.Reply], t.ack[nat.Original])
	}
	if t.acked[nat.Original] {
		fl.o.sendReset(&fl.o.in0, pod, far, t.ack[nat.Original], t.ack[nat.Reply])
	}
}
