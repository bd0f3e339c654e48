package tcpflow

// Handles a SYN on the ports of an existing flow.
//
// A sandbox may use a port again as soon as its own kernel lets it: right behind the reset that
// ended the connection before, or behind the last acknowledgement. The flow may not have ended yet,
// since the same batch may bring both. The stack would answer the SYN with a reset for the ending
// endpoint. So no SYN is queued at an endpoint, except one that repeats its handshake. The flow
// keeps the SYN, which goes to HandleTCP like any other once the flow has ended:
//
//	dialing                     the attempt before is over: the dial goes on for the new one
//	handshake not complete      what completes or resets it is on its way: the sandbox's kernel
//	                            answers every SYN/ACK
//	connection established      the sandbox's kernel is asked (RFC 5961 section 4), and
//	                            answers by a reset if it knows the connection no more
//	ending                      it ends by itself
//
// A flow keeps one SYN, the last one. One that was kept for longer than its sender takes to
// repeat it is forgotten.

import (
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/internal/packet"
)

// keptFor bounds how long a SYN is kept: its sender repeats it after a second (RFC 6298 section 2).
const keptFor = time.Second

// keptSYN is a SYN that waits for a flow on the same ports to end. Guarded by Forwarder.mu.
type keptSYN struct {
	pkt   *stack.PacketBuffer // nil: there is none
	since time.Time
	task  engine.Task
}

// isSYN reports whether flags ask for a connection.
func isSYN(flags header.TCPFlags) bool {
	return flags&(header.TCPFlagSyn|header.TCPFlagAck|header.TCPFlagRst) == header.TCPFlagSyn
}

// meetLocked handles a SYN with sequence number seq that arrived while fl exists. It reports
// whether fl must look at it. t.mu is held.
func (t *Forwarder) meetLocked(fl *Flow, seq uint32, pkt *stack.PacketBuffer) bool {
	now := t.Gate.Now()
	fl.lastSYN = now
	if seq == fl.Irs && !fl.ingress {
		return false // it is repeated
	}
	if fl.kept.pkt != nil {
		fl.kept.pkt.DecRef()
	}
	fl.kept.pkt, fl.kept.since = pkt.IncRef(), now
	if fl.kept.task.Run == nil {
		fl.kept.task.Run = fl.lookAgain
	}
	return true
}

// takeKeptLocked returns the SYN that meetLocked kept, or nil if there is none or it is too old.
func (t *Forwarder) takeKeptLocked(fl *Flow) *stack.PacketBuffer {
	syn := fl.kept.pkt
	fl.kept.pkt = nil
	if syn != nil && t.Gate.Now().Sub(fl.kept.since) > keptFor {
		syn.DecRef()
		return nil
	}
	return syn
}

// lookAgain makes the flow give way to the connection whose SYN it keeps. It is a task.
func (fl *Flow) lookAgain() {
	t := fl.T
	fl.Mu.Lock()
	ph, ep := fl.Phase, fl.Ep
	if ph == phaseDialing && fl.Syn != nil {
		t.Mu.Lock()
		if syn := t.takeKeptLocked(fl); syn != nil {
			fl.Syn.DecRef()
			fl.Syn, fl.Irs = syn, header.TCP(syn.TransportHeader().Slice()).SequenceNumber()
			fl.firstSYN = fl.lastSYN
		}
		t.Mu.Unlock()
	}
	fl.Mu.Unlock()
	if ph == phaseDialing || ph == PhaseClosed {
		return
	}
	if ep == nil {
		found := t.Stack.FindTransportEndpoint(packet.NetProto(packet.NetipAddr(fl.id.RemoteAddress)), tcp.ProtocolNumber, fl.id, packet.NICID)
		if found == nil {
			return
		}
		ep = found.(*tcp.Endpoint)
	}
	e := ep.(*tcp.Endpoint)
	t.Inline.Flush() // what came before the SYN
	if next, ok := netstack.ReceiveNext(e); ok && netstack.Connected(netstack.EndpointState(e)) {
		t.inject(fl.id, header.TCPFlagAck, next-1)
	}
}

// begin admits a SYN whose tuple is free by now.
func (t *Forwarder) begin(id stack.TransportEndpointID, syn *stack.PacketBuffer) {
	if !t.HandleTCP(id, syn) {
		t.queue.HandleUnknownDestinationPacket(id, syn)
	}
}

// asks reports whether a segment for ep is the SYN of another connection on the same ports; if so,
// it has handled it.
func (t *Forwarder) asks(fl *Flow, ep stack.TransportEndpoint, id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if !isSYN(h.Flags()) {
		return false
	}
	e, ok := ep.(*tcp.Endpoint)
	if !ok || fl == nil || netstack.EndpointState(e) == tcp.StateSynSent || h.SequenceNumber() == fl.Irs {
		return false
	}
	t.begin(id, pkt)
	return true
}
