package forwarder

// ICMP errors that came back to the host.
//
// The kernel matches an ICMP error with the socket that sent the packet and puts it
// on the socket's error queue with its type, code, origin, and what it quoted of the
// packet (ip(7), IP_RECVERR). From there it is told to the sandbox as it would have
// arrived had the sandbox sent the packet itself: from the same router, quoting
// the sandbox's addresses and ports instead of the host's. Errors about packets to
// an address that is no peer (any more) are dropped: they could be forged, and
// the sandbox has no use for them.

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// drainErrors reads the error queue of s.
func (s *hostSocket) drainErrors() {
	b := rxPool.Get().(*rxBatch)
	defer rxPool.Put(b)
	for range errRounds {
		n, errno := b.receive(s, unix.MSG_ERRQUEUE)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return
		}
		for i := range n {
			to, quoted, c := b.message(i)
			if c.hasErr {
				s.translate(to, quoted, &c)
			}
		}
	}
}

// translate tells the sandbox of one error, c.err, about a packet that was sent to to.
func (s *hostSocket) translate(to netip.AddrPort, quoted []byte, c *control) {
	e := &c.err
	switch e.origin {
	case unix.SO_EE_ORIGIN_LOCAL:
		// The refusal to send is dealt with by the sender, who has the packet.
		if e.errno == unix.EMSGSIZE {
			s.localMTU.Store(e.info)
		}
		return
	case unix.SO_EE_ORIGIN_ICMP, unix.SO_EE_ORIGIN_ICMP6:
	default:
		return
	}
	var fl *dgramFlow
	if s.proto == protoUDP {
		fl = s.peer(to, c.local)
	} else {
		fl = s.echoPeer(to.Addr(), quoted)
	}
	if fl == nil {
		s.d.n.strayErrors.Add(1)
		return
	}
	info, ok := errorInfo(e)
	if !ok {
		s.d.n.strayErrors.Add(1)
		return
	}
	src := e.offender
	if src == fl.target.Addr() || src.IsLoopback() {
		src = fl.peer.Addr() // the gateway, where that stands for the host
	}
	var buf [icmpQuoteIPv6]byte
	var orig []byte
	if s.proto == protoUDP {
		orig = fl.requote(buf[:], quoted)
	} else if sent := s.d.all.echo.book.answered(fl, quoted); sent != nil {
		orig = sent.quote(buf[:])
	} else {
		return
	}
	s.d.n.errors.Add(1)
	s.d.errs.sendForm(icmpForm{typ: e.typ, code: e.cod}, info, orig, src)
}

// errorInfo is the last word of the ICMP header, or false for a type that is no error.
func errorInfo(e *extendedErr) (uint32, bool) {
	if e.origin == unix.SO_EE_ORIGIN_ICMP6 {
		switch header.ICMPv6Type(e.typ) {
		case header.ICMPv6DstUnreachable, header.ICMPv6TimeExceeded:
			return 0, true
		case header.ICMPv6PacketTooBig, header.ICMPv6ParamProblem:
			return e.info, true
		}
		return 0, false
	}
	switch header.ICMPv4Type(e.typ) {
	case header.ICMPv4DstUnreachable:
		if header.ICMPv4Code(e.cod) == header.ICMPv4FragmentationNeeded {
			return e.info & 0xffff, true
		}
		return 0, true
	case header.ICMPv4TimeExceeded:
		return 0, true
	case header.ICMPv4ParamProblem:
		return e.info << 24, true
	}
	return 0, false
}

// requote writes the datagram that the sandbox sent, as far as it is known: the IP header
// of the flow's last packet, the UDP header with the sandbox's own ports, and behind it
// what the error quoted.
func (fl *dgramFlow) requote(buf, quoted []byte) []byte {
	a := fl.lastSent()
	hl := ipHeaderLen(fl.peer.Addr())
	a.size = max(a.size, hl+udpHeaderLen)
	l4 := fl.quoteHeader(buf, a)
	putUDPHeader(l4, fl.guest.Port(), fl.peer.Port(), a.size-hl)
	n := udpHeaderLen + copy(l4[udpHeaderLen:], quoted)
	if n == a.size-hl { // all of it is there to be summed
		finishUDP(fl.guest.Addr(), fl.peer.Addr(), l4[:n])
	}
	return buf[:hl+n]
}

// quote writes the request as the sandbox sent it, as far as buf goes, whatever the error
// quoted of what left.
func (s *echoSent) quote(buf []byte) []byte {
	l4 := s.key.flow.quoteHeader(buf, s.a)
	n := copy(l4, s.msg)
	return buf[:len(buf)-len(l4)+n]
}

// quoteHeader writes the IP header of a packet of the sandbox, and returns what is left of buf.
func (fl *dgramFlow) quoteHeader(buf []byte, a arrival) []byte {
	hl := ipHeaderLen(fl.peer.Addr())
	putIPHeader(buf, fl.guest.Addr(), fl.peer.Addr(), fl.tuple.Proto(), a.meta, a.size, a.id, a.df)
	if fl.peer.Addr().Is4() {
		binary.BigEndian.PutUint16(buf[10:], ^checksum.Checksum(buf[:hl], 0))
	}
	return buf[hl:]
}
