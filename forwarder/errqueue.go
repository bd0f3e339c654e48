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
				s.translate(to, quoted, &c.err)
			}
		}
	}
}

// translate tells the sandbox of one error about a packet that was sent to to.
func (s *hostSocket) translate(to netip.AddrPort, quoted []byte, e *extendedErr) {
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
		fl = s.peer(to)
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
	s.d.n.errors.Add(1)
	s.d.f.dgram.errs.sendForm(icmpForm{e.typ, e.cod}, info, fl.requote(buf[:], quoted), src)
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

// requote writes the packet that the sandbox sent, as far as it is known: the IP header
// of the flow's last packet, the transport header with the sandbox's own ports or
// identifier, and behind it what the error quoted.
func (fl *dgramFlow) requote(buf, quoted []byte) []byte {
	a := fl.lastSent()
	proto := fl.tuple.Proto()
	hl := ipHeaderLen(fl.peer.Addr())
	if min := hl + udpHeaderLen; a.size < min {
		a.size = min
	}
	putIPHeader(buf, fl.guest.Addr(), fl.peer.Addr(), proto, a.meta, a.size, a.id, a.df)
	if fl.peer.Addr().Is4() {
		binary.BigEndian.PutUint16(buf[10:], ^checksum.Checksum(buf[:hl], 0))
	}
	l4 := buf[hl:]
	if proto == protoUDP {
		putUDPHeader(l4, fl.guest.Port(), fl.peer.Port(), a.size-hl)
		n := udpHeaderLen + copy(l4[udpHeaderLen:], quoted)
		if n == a.size-hl { // all of it is there to be summed
			finishUDP(fl.guest.Addr(), fl.peer.Addr(), l4[:n])
		}
		return buf[:hl+n]
	}
	n := copy(l4, quoted)
	if n < echoHeaderLen {
		// Too short to be an echo request: RFC 792 promises these eight bytes.
		clear(l4[n:echoHeaderLen])
		n = echoHeaderLen
	}
	rewriteEchoID(l4, fl.guest.Port())
	if proto == protoICMPv6 && n == a.size-hl {
		// Its checksum covers the source address, which was the host's.
		finishICMP(fl.guest.Addr(), fl.peer.Addr(), l4[:n])
	}
	return buf[:hl+n]
}

// rewriteEchoID replaces the identifier and corrects the checksum for it (RFC 1624).
func rewriteEchoID(l4 []byte, id uint16) {
	old := binary.BigEndian.Uint16(l4[4:])
	sum := uint32(^binary.BigEndian.Uint16(l4[2:])) + uint32(^old) + uint32(id)
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(l4[2:], ^uint16(sum))
	binary.BigEndian.PutUint16(l4[4:], id)
}
