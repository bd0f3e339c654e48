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
	o     *outside
	tuple nat.Tuple // from outside to the sandbox
	lease *nat.Lease
	query policy.Query

	mu  sync.Mutex
	tcp tcpTrack

	// Guarded by outside.mu.
	gone bool // not, or no longer, in the table
	slot int  // in outside.memory, or noSlot
}

func (o *outside) newFlow(tuple nat.Tuple, q policy.Query) *inboundFlow {
	return &inboundFlow{o: o, tuple: tuple, query: q, gone: true, slot: noSlot}
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

// admit charges the flow table for a flow and makes it findable.
func (o *outside) admit(fl *inboundFlow, v policy.Verdict) error {
	lease, err := o.f.table.Acquire(nat.Spec{
		Orig: fl.tuple, Rule: v.Rule(), Ingress: true, Forwarded: true,
		Budget: o.f.limited.of(v).budgetOf(), About: About{Verdict: v},
		Short: fl.tuple.Proto() == protoUDP && fl.tuple.Dst().Port() == dnsPort, Expire: fl.expire,
	})
	if err != nil {
		return err
	}
	fl.lease = lease
	if !o.install(fl) {
		lease.Release("stopped")
		return errFlowEnded
	}
	return nil
}

// begin judges the first packet of a flow and lets it in, or returns why not. A
// reason without a counter means that the packet was dealt with.
func (o *outside) begin(tuple nat.Tuple, pkt *stack.PacketBuffer, p *datum) (*inboundFlow, reason) {
	o.beginMu.Lock()
	defer o.beginMu.Unlock()
	if known := o.lookup(tuple); known != nil {
		return known, reason{} // another reader was faster
	}
	q := queryOf(tuple)
	rules := o.f.rules.Load()
	v := rules.Decide(q)
	if !v.Allowed() {
		o.refuse(v, q, pkt, p)
		return nil, reason{}
	}
	var flags header.TCPFlags
	if p.proto == protoTCP {
		switch flags = p.tcp.Flags() & tcpFlagsMask; {
		case flags == header.TCPFlagSyn|header.TCPFlagAck:
			return nil, o.n.tcpStray // nobody here asked
		case flags&header.TCPFlagRst != 0:
			// The end of a flow that is not known any more: the sandbox may want to know.
			o.forward(&o.sandbox, pkt, p)
			return nil, reason{}
		}
	}
	fl := o.newFlow(tuple, q)
	late := flags&header.TCPFlagFin != 0 // of a flow that is over: not to be taken for one that lives
	if late {
		fl.tcp.state = nat.LastAck
	}
	if o.admit(fl, v) != nil {
		return nil, o.n.flow
	}
	o.n.began.Add(1)
	if p.proto == protoTCP {
		if flags != header.TCPFlagSyn {
			o.n.pickedUp.Add(1)
		}
		if late {
			fl.lease.SetState(nat.LastAck)
			fl.remember(nat.LastAck)
		} else {
			fl.track(nat.Original, p)
		}
	}
	// Rules that were replaced meanwhile may have been applied to the table before the
	// flow was in it.
	if now := o.f.rules.Load(); now != rules && !fl.recheck(now) {
		return nil, o.n.refused
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
func (fl *inboundFlow) end(why string) {
	fl.remove()
	fl.lease.Release(why)
}

// cut ends a flow that both sides may think alive, and tells them.
func (fl *inboundFlow) cut(why string) {
	if fl.remove() {
		fl.reset()
	}
	fl.lease.Release(why)
}

// expire is the table's word that the flow is over.
func (fl *inboundFlow) expire(why string) {
	if fl.remove() && why != nat.ReasonTimeout && why != nat.ReasonEarlyDrop {
		fl.reset()
	}
}

// recheck reports whether the flow may go on, and cuts it otherwise.
func (fl *inboundFlow) recheck(r *policy.Rules) bool {
	if r.Decide(fl.query).Allowed() {
		return true
	}
	fl.cut("policy")
	return false
}

// recheck cuts the flows that r refuses.
func (o *outside) recheck(r *policy.Rules) {
	for _, fl := range o.list() {
		fl.recheck(r)
	}
}

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
