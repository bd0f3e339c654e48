package inbound

// Flows of the inbound path: how they begin, and how they end.
//
// A flow lives exactly as long as its nat.Lease. It ends by its timeout, by early drop, by a byte
// budget, by a policy that no longer allows it, or because its tuple is used anew. Only if we end a
// flow that both sides think alive are they told, by resets.

import (
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// inboundFlow is one flow from outside.
type inboundFlow struct {
	admit.Pass
	o     *Path
	tuple nat.Tuple // from outside to the sandbox

	mu  sync.Mutex
	tcp tcpTrack

	// Guarded by outside.mu.
	gone bool // not, or no longer, in the table
	slot int  // in outside.memory, or noSlot
}

func (o *Path) newFlow(tuple nat.Tuple) *inboundFlow {
	return &inboundFlow{o: o, tuple: tuple, gone: true, slot: noSlot}
}

// queryOf returns the policy query of a flow.
func queryOf(tuple nat.Tuple) policy.Query {
	q := policy.Query{Ingress: true, Proto: tuple.Proto(), Src: tuple.Src(), Dst: tuple.Dst()}
	if q.Proto == packet.ProtoICMP || q.Proto == packet.ProtoICMPv6 {
		q.ICMPType, q.ICMPCode = uint8(q.Dst.Port()>>8), uint8(q.Dst.Port())
		q.Dst = netip.AddrPortFrom(q.Dst.Addr(), 0)
	}
	return q
}

// admit charges the flow table for a flow and makes it findable. short means that it asks a DNS
// server.
func (o *Path) admit(fl *inboundFlow, j admit.Judged, short bool) error {
	err := o.Gate.Enter(&fl.Pass, fl, j, admit.Entry{Orig: fl.tuple, Forwarded: true, Short: short})
	if err != nil {
		return err
	}
	if !o.install(fl) {
		fl.Release(nat.ReasonStopped)
		return admit.ErrFlowEnded
	}
	return nil
}

// begin judges the first packet of a flow and admits it, or returns why not. A reason without a
// counter means that the packet is done with. A flow is never picked up in mid-stream: flows of the
// previous worker are in its memory, and any other segment belongs to an ended flow, or to a
// connection of our own sockets.
func (o *Path) begin(tuple nat.Tuple, pkt *stack.PacketBuffer, p *datum) (*inboundFlow, packet.Reason) {
	o.beginMu.Lock()
	defer o.beginMu.Unlock()
	if known := o.Lookup(tuple); known != nil {
		return known, packet.Reason{} // another reader was faster
	}
	// Also asked if policy refuses: a continuing stream keeps resting.
	rests := o.Gate.Tombs.Rests(tuple) || o.Asks != nil && o.Asks(tuple.Src())
	j := o.Gate.Decide(queryOf(tuple))
	if !j.MayBegin() {
		o.refuse(j, pkt, p)
		return nil, packet.Reason{}
	}
	if p.proto == packet.ProtoTCP {
		switch flags := p.tcp.Flags() & tcpFlagsMask; {
		case flags&header.TCPFlagRst != 0:
			// The end of a flow that is no longer known: the sandbox may want to know.
			o.forward(&o.Sandbox, pkt, p)
			return nil, packet.Reason{}
		case flags != header.TCPFlagSyn:
			o.refuseTCP(p)
			return nil, o.n.tcpStray
		case o.Gate.Table.Lookup(tuple.Reverse()) != nil:
			rests = true // the sandbox has another connection on these two ports
		}
	}
	if rests {
		if p.proto == packet.ProtoUDP {
			o.sendError(packet.ICMPPortUnreachable, pkt, p) // as a host does for a closed socket
		}
		return nil, o.n.rests
	}
	fl := o.newFlow(tuple)
	if err := o.admit(fl, j, p.asks(pkt)); err != nil {
		o.Gate.NoteLimit(nil, j, err)
		return nil, o.n.flow
	}
	o.n.began.Add(1)
	if p.proto == packet.ProtoTCP {
		fl.track(nat.Original, p)
	}
	return fl, packet.Reason{}
}

// install makes a flow findable, unless it has ended or no flow may begin any more.
func (o *Path) install(fl *inboundFlow) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || fl.Lease.Ended() {
		return false
	}
	fl.gone = false
	fl.slot = o.Memory.Note(fl.tuple, nat.SynSent)
	o.flows[fl.tuple] = fl
	o.Count.Store(int32(len(o.flows)))
	return true
}

// remove makes a flow unfindable and reports whether it was findable.
func (fl *inboundFlow) remove() bool {
	o := fl.o
	o.mu.Lock()
	defer o.mu.Unlock()
	if fl.gone {
		return false
	}
	fl.gone = true
	if !o.closed { // a flow that ends only with the worker is left to its successor
		o.Memory.forget(fl.slot)
	}
	delete(o.flows, fl.tuple)
	o.Count.Store(int32(len(o.flows)))
	return true
}

// end ends a flow silently.
func (fl *inboundFlow) end(why nat.Reason) {
	fl.remove()
	fl.Lease.Release(why)
}

// Halt implements admitted. Packets of an unfindable flow are judged like a new one's.
func (fl *inboundFlow) Halt() { fl.remove() }

// Abort implements admitted. Both sides may think the flow alive, so they are told.
func (fl *inboundFlow) Abort(why nat.Reason) {
	if fl.remove() || fl.Revoked.Load() {
		fl.reset()
	}
	fl.Release(why)
}

// Expire implements admitted.
func (fl *inboundFlow) Expire(why nat.Reason) {
	if fl.remove() && why != nat.ReasonTimeout && why != nat.ReasonEarlyDrop {
		fl.reset()
	}
}

// UnderWay implements admitted.
func (fl *inboundFlow) UnderWay(policy.Query) []policy.Query { return nil }

// reset sends both sides of a TCP connection the reset that they believe: with the
// number that each has asked for last. A side that has acknowledged nothing yet
// will hear of it when it asks again.
func (fl *inboundFlow) reset() {
	if fl.tuple.Proto() != packet.ProtoTCP {
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
		fl.o.sendReset(&fl.o.Sandbox, far, pod, t.ack[nat.Reply], t.ack[nat.Original])
	}
	if t.acked[nat.Original] {
		fl.o.sendReset(&fl.o.In0, pod, far, t.ack[nat.Original], t.ack[nat.Reply])
	}
}
