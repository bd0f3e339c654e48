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

	gone bool // not, or no longer, in the table; guarded by outside.mu
}

// begin judges the first packet of a flow and lets it in, or returns why not. A
// reason without a counter means that the packet was dealt with.
func (o *outside) begin(tuple nat.Tuple, pkt *stack.PacketBuffer, p *datum) (*inboundFlow, reason) {
	o.beginMu.Lock()
	defer o.beginMu.Unlock()
	if known := o.lookup(tuple); known != nil {
		return known, reason{} // another reader was faster
	}
	q := policy.Query{Ingress: true, Proto: p.proto, Src: tuple.Src(), Dst: tuple.Dst()}
	if p.icmp != icmpIsNot {
		q.ICMPType, q.ICMPCode = uint8(p.dport>>8), uint8(p.dport)
		q.Dst = netip.AddrPortFrom(p.dst, 0)
	}
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
	fl := &inboundFlow{o: o, tuple: tuple, query: q, gone: true}
	lease, err := o.f.table.Acquire(nat.Spec{
		Orig: tuple, Rule: v.Rule(), Ingress: true, Forwarded: true,
		Short: p.proto == protoUDP && p.dport == dnsPort, Expire: fl.expire,
	})
	if err != nil {
		return nil, o.n.flow
	}
	fl.lease = lease
	if !o.install(fl) {
		lease.Release("stopped")
		return nil, o.n.flow
	}
	o.n.began.Add(1)
	if p.proto == protoTCP {
		if flags != header.TCPFlagSyn {
			o.n.pickedUp.Add(1)
		}
		if flags&header.TCPFlagFin != 0 {
			// Late, of a flow that is over: not to be taken for one that lives.
			fl.tcp.state = nat.LastAck
			lease.SetState(nat.LastAck)
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
