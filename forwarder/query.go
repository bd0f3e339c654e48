package forwarder

// What goes to port 53, judged by what it is. A flow of DNS is over when its questions are
// answered, and is forgotten soon if they are not: a resolver makes one for each question.
// Tunnels and games use that port too, where many datagrams answer one, and come late.

import (
	"golang.org/x/net/dns/dnsmessage"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// isQuery reports whether a datagram is a question of DNS, and one only.
func isQuery(b []byte) bool {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || h.Response || h.OpCode != 0 {
		return false
	}
	if q, err := p.Question(); err != nil || q.Class == 0 || q.Type == 0 {
		return false
	}
	_, err = p.Question()
	return err == dnsmessage.ErrSectionDone
}

// isAnswer reports whether a datagram is an answer of DNS; old servers leave the question out
// of an error (RFC 8906 section 3.1.4).
func isAnswer(b []byte) bool {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || !h.Response {
		return false
	}
	_, err = p.Question()
	return err == nil || err == dnsmessage.ErrSectionDone && h.RCode != dnsmessage.RCodeSuccess
}

// asks reports whether the packet's first datagram is a question.
func asks(pkt *stack.PacketBuffer) (is bool) {
	eachDatagram(pkt, func(b []byte) bool { is = isQuery(b); return false })
	return is
}

// outlasts notes that the flow is not of questions and answers alone.
func (fl *dgramFlow) outlasts() {
	if fl.short.Swap(false) {
		fl.lease.Outlast()
	}
}
