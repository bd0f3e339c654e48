package forwarder

// A SYN by the ports of a flow that there is.
//
// A sandbox may use a port again as soon as its own kernel lets it: right behind the reset that
// ended the connection before, or behind the last acknowledgement. The flow may not have come
// that far, as the same batch brings both. The stack would answer the SYN for the endpoint
// that ends, by a reset; so no SYN is queued at an endpoint, but for the handshake that it repeats.
// The flow keeps it, and when the flow has ended it comes to handleTCP like any other:
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
)

// keptFor bounds how long a SYN is kept: its sender repeats it after a second (RFC 6298 section 2).
const keptFor = time.Second

// keptSYN is a SYN that waits for a flow of the same ports to end. Guarded by tcpForwarder.mu.
type keptSYN struct {
	pkt   *stack.PacketBuffer // nil: there is none
	since time.Time
	task  task
}

// isSYN reports whether flags ask for a connection.
func isSYN(flags header.TCPFlags) bool {
	return flags&(header.TCPFlagSyn|header.TCPFlagAck|header.TCPFlagRst) == header.TCPFlagSyn
}

// meetLocked takes the SYN of sequence number seq, which came while there is fl. It reports
// whether fl is to look at it. t.mu is held.
func (t *tcpForwarder) meetLocked(fl *tcpFlow, seq uint32, pkt *stack.PacketBuffer) bool {
	now := t.gate.now()
	fl.lastSYN = now
	if seq == fl.irs && !fl.ingress {
		return false // it is repeated
	}
	if fl.kept.pkt != nil {
		fl.kept.pkt.DecRef()
	}
	fl.kept.pkt, fl.kept.since = pkt.IncRef(), now
	if fl.kept.task.run == nil {
		fl.kept.task.run = fl.lookAgain
	}
	return true
}

// takeKeptLocked takes what meetLocked kept, unless it is too old; nil if there is nothing.
func (t *tcpForwarder) takeKeptLocked(fl *tcpFlow) *stack.PacketBuffer {
	syn := fl.kept.pkt
	fl.kept.pkt = nil
	if syn != nil && t.gate.now().Sub(fl.kept.since) > keptFor {
		syn.DecRef()
		return nil
	}
	return syn
}

// lookAgain has the flow make way for the connection whose SYN it keeps. It is a task.
func (fl *tcpFlow) lookAgain() {
	t := fl.t
	fl.mu.Lock()
	ph, ep := fl.phase, fl.ep
	if ph == phaseDialing && fl.syn != nil {
		t.mu.Lock()
		if syn := t.takeKeptLocked(fl); syn != nil {
			fl.syn.DecRef()
			fl.syn, fl.irs = syn, header.TCP(syn.TransportHeader().Slice()).SequenceNumber()
			fl.firstSYN = fl.lastSYN
		}
		t.mu.Unlock()
	}
	fl.mu.Unlock()
	if ph == phaseDialing || ph == phaseClosed {
		return
	}
	if ep == nil {
		found := t.stack.FindTransportEndpoint(netProto(netipAddr(fl.id.RemoteAddress)), tcp.ProtocolNumber, fl.id, nicID)
		if found == nil {
			return
		}
		ep = found.(*tcp.Endpoint)
	}
	e := ep.(*tcp.Endpoint)
	t.inline.flush() // what came before the SYN
	if next, ok := receiveNext(e); ok && connected(endpointState(e)) {
		t.inject(fl.id, header.TCPFlagAck, next-1)
	}
}

// begin lets in a SYN whose tuple is free by now.
func (t *tcpForwarder) begin(id stack.TransportEndpointID, syn *stack.PacketBuffer) {
	if !t.handleTCP(id, syn) {
		t.queue.HandleUnknownDestinationPacket(id, syn)
	}
}

// asks reports whether a segment for ep is a SYN of another connection by the same ports, and
// has dealt with it then.
func (t *tcpForwarder) asks(fl *tcpFlow, ep stack.TransportEndpoint, id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if !isSYN(h.Flags()) {
		return false
	}
	e, ok := ep.(*tcp.Endpoint)
	if !ok || fl == nil || endpointState(e) == tcp.StateSynSent || h.SequenceNumber() == fl.irs {
		return false
	}
	t.begin(id, pkt)
	return true
}
