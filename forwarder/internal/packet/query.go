package packet

import (
	"golang.org/x/net/dns/dnsmessage"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// IsQuery reports whether a datagram is exactly one DNS question.
func IsQuery(b []byte) bool {
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

// IsAnswer reports whether a datagram is a DNS answer. Old servers leave the question out of an
// error (RFC 8906 section 3.1.4).
func IsAnswer(b []byte) bool {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || !h.Response {
		return false
	}
	_, err = p.Question()
	return err == nil || err == dnsmessage.ErrSectionDone && h.RCode != dnsmessage.RCodeSuccess
}

// Asks reports whether the packet's first datagram is a question.
func Asks(pkt *stack.PacketBuffer) (is bool) {
	EachDatagram(pkt, func(b []byte) bool { is = IsQuery(b); return false })
	return is
}

// EachDatagram yields the datagrams of a packet until yield returns false.
func EachDatagram(pkt *stack.PacketBuffer, yield func([]byte) bool) {
	data, _ := pkt.Data().PullUp(pkt.Data().Size())
	size := len(data)
	if mss := int(pkt.GSOOptions.MSS); mss > 0 {
		size = mss
	}
	for len(data) > 0 {
		n := min(size, len(data))
		if !yield(data[:n]) {
			return
		}
		data = data[n:]
	}
}
