package inbound

// Reading packets of the inbound path.
//
// Each header is read once, after its length was checked; offsets count from the
// first byte of the IP header. Only headers are looked at, and they are pulled
// together as far as they are needed: nearly always they are in one piece already.

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

const (
	protoDCCP = 33

	ProtoSCTP = 132

	protoUDPLite = 136

	// MaxExtHeaders bounds the IPv6 extension headers that are followed, and maxHeaders their
	// bytes, IP header included. No honest packet has more.
	MaxExtHeaders = 8

	maxHeaders = 512
)

// fragKind is which part of its packet a fragment is.
type fragKind uint8

const (
	fragNone  fragKind = iota // the whole packet
	fragFirst                 // its beginning, with the transport header
	fragLater
)

// icmpRole is the role of an ICMP message in flow tracking.
type icmpRole uint8

const (
	icmpIsNot icmpRole = iota
	icmpIsRequest
	icmpIsReply
	icmpIsError
)

// datum holds the fields read from one packet.
type datum struct {
	head     []byte // contiguous from the IP header on, at least as far as was read
	src, dst netip.Addr
	proto    uint8
	frag     fragKind
	icmp     icmpRole
	v6       bool
	routed   bool // it carries a route of its own: source routing, or a routing header
	l4       int  // where the transport header begins
	size     int  // of the packet, by its IP header

	fragID  uint32
	fragOff int

	// Of the transport header. For ICMP queries sport is the identifier and dport
	// type<<8 | code, as nat.Tuple has them; protocols without ports have 0.
	sport, dport uint16
	tcp          header.TCP // whole header with options
}

// tuple returns the tuple of the packet's direction.
func (p *datum) tuple() nat.Tuple {
	return nat.NewTuple(p.proto, netip.AddrPortFrom(p.src, p.sport), netip.AddrPortFrom(p.dst, p.dport))
}

// need makes at least n bytes of the packet contiguous.
func (p *datum) need(pkt *stack.PacketBuffer, n int) bool {
	if n <= len(p.head) {
		return true
	}
	if n > p.size {
		return false
	}
	b, ok := pkt.Data().PullUp(n)
	if ok {
		p.head = b
	}
	return ok
}

// parse reads the IP headers.
func (o *Path) parse(pkt *stack.PacketBuffer, p *datum) packet.Reason {
	p.size = pkt.Data().Size()
	if !p.need(pkt, header.IPv4MinimumSize) {
		return o.n.short
	}
	switch p.head[0] >> 4 {
	case 4:
		return o.parse4(pkt, p)
	case 6:
		return o.parse6(pkt, p)
	}
	return o.n.version
}

func (o *Path) parse4(pkt *stack.PacketBuffer, p *datum) packet.Reason {
	h := header.IPv4(p.head)
	p.l4 = int(h[0]&15) * 4
	total := int(h.TotalLength())
	if p.l4 < header.IPv4MinimumSize || total < p.l4 || total > p.size || !p.need(pkt, p.l4) {
		return o.n.length
	}
	p.size = total
	h = header.IPv4(p.head)
	p.src, p.dst = netip.AddrFrom4([4]byte(h[12:16])), netip.AddrFrom4([4]byte(h[16:20]))
	p.proto = h.Protocol()
	p.routed = packet.SourceRouted(h, pkt)
	p.setFragment(int(h.FragmentOffset()), h.More(), uint32(h.ID()))
	return packet.Reason{}
}

func (o *Path) parse6(pkt *stack.PacketBuffer, p *datum) packet.Reason {
	if !p.need(pkt, header.IPv6MinimumSize) {
		return o.n.short
	}
	h := header.IPv6(p.head)
	total := header.IPv6MinimumSize + int(h.PayloadLength())
	if total > p.size {
		return o.n.length
	}
	p.v6, p.size = true, total
	p.src, p.dst = netip.AddrFrom16([16]byte(h[8:24])), netip.AddrFrom16([16]byte(h[24:40]))
	if p.src.Is4In6() || p.dst.Is4In6() {
		return o.n.martian // such addresses never appear on the wire (RFC 4291 section 2.5.5.2)
	}
	p.proto, p.l4 = h.NextHeader(), header.IPv6MinimumSize
	for range MaxExtHeaders {
		switch header.IPv6ExtensionHeaderIdentifier(p.proto) {
		case header.IPv6HopByHopOptionsExtHdrIdentifier, header.IPv6RoutingExtHdrIdentifier, header.IPv6DestinationOptionsExtHdrIdentifier:
			if !p.need(pkt, p.l4+8) {
				return o.n.short
			}
			p.routed = p.routed || p.proto == uint8(header.IPv6RoutingExtHdrIdentifier)
			p.proto, p.l4 = p.head[p.l4], p.l4+8+8*int(p.head[p.l4+1])
		case header.IPv6FragmentExtHdrIdentifier:
			if p.frag != fragNone || !p.need(pkt, p.l4+header.IPv6FragmentHeaderSize) {
				return o.n.headers
			}
			b := p.head[p.l4:]
			word := binary.BigEndian.Uint16(b[2:])
			p.proto, p.l4 = b[0], p.l4+header.IPv6FragmentHeaderSize
			p.setFragment(int(word&^7), word&1 != 0, binary.BigEndian.Uint32(b[4:]))
			if p.frag == fragLater {
				return packet.Reason{} // what follows is the middle of something
			}
		default:
			return packet.Reason{}
		}
		if p.l4 > min(maxHeaders, p.size) {
			return o.n.headers
		}
	}
	return o.n.headers
}

func (p *datum) setFragment(off int, more bool, id uint32) {
	switch {
	case off != 0:
		p.frag = fragLater
	case more:
		p.frag = fragFirst
	default:
		return // an atomic fragment is a whole packet (RFC 6946)
	}
	p.fragOff, p.fragID = off, id
}

// parseTransport reads the fields that identify a flow. The first fragment of a packet must have
// the whole transport header; otherwise the next fragment could overwrite the port that a rule
// judged (RFC 1858).
func (o *Path) parseTransport(pkt *stack.PacketBuffer, p *datum) packet.Reason {
	least := headerLenOf(p.proto)
	if !p.need(pkt, p.l4+least) {
		if p.frag == fragFirst {
			return o.n.fragmentShort
		}
		return o.n.short
	}
	b := p.head[p.l4:]
	switch p.proto {
	case packet.ProtoTCP:
		hl := int(b[header.TCPDataOffset]>>4) * 4
		if hl < header.TCPMinimumSize || !p.need(pkt, p.l4+hl) {
			return o.n.length
		}
		p.tcp = header.TCP(p.head[p.l4 : p.l4+hl])
		if !sane(p.tcp.Flags()) {
			return o.n.tcpFlags
		}
		p.sport, p.dport = p.tcp.SourcePort(), p.tcp.DestinationPort()
	case packet.ProtoUDP, protoUDPLite, protoDCCP, ProtoSCTP:
		p.sport, p.dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	case packet.ProtoICMP, packet.ProtoICMPv6:
		if p.v6 != (p.proto == packet.ProtoICMPv6) {
			return o.n.protocol
		}
		if p.icmp = icmpRoleOf(p.v6, b[0]); p.icmp == icmpIsNot {
			return o.n.icmpType
		}
		if p.icmp != icmpIsError {
			p.sport, p.dport = binary.BigEndian.Uint16(b[4:]), uint16(b[0])<<8|uint16(b[1])
		}
	}
	return packet.Reason{}
}

// headerLenOf returns the minimum size of a transport header, which a first fragment must contain.
func headerLenOf(proto uint8) int {
	switch proto {
	case packet.ProtoTCP:
		return header.TCPMinimumSize
	case packet.ProtoUDP, protoUDPLite, packet.ProtoICMP, packet.ProtoICMPv6:
		return 8
	case protoDCCP, ProtoSCTP:
		return 12
	}
	return 0
}

// icmpRoleOf classifies the tracked types: nf_conntrack's, without the obsolete ones (information,
// address mask, node information). Neighbour and router discovery and redirects belong to the link.
func icmpRoleOf(v6 bool, typ uint8) icmpRole {
	if v6 {
		switch typ {
		case 1, 2, 3, 4:
			return icmpIsError
		case packet.EchoRequest6:
			return icmpIsRequest
		case packet.EchoReply6:
			return icmpIsReply
		}
		return icmpIsNot
	}
	switch typ {
	case 3, 11, 12:
		return icmpIsError
	case packet.EchoRequest4, 13:
		return icmpIsRequest
	case packet.EchoReply4, 14:
		return icmpIsReply
	}
	return icmpIsNot
}

// asks reports whether the packet is a question to a DNS server.
func (p *datum) asks(pkt *stack.PacketBuffer) bool {
	at := p.l4 + packet.UDPHeaderLen
	return p.proto == packet.ProtoUDP && p.dport == onlink.DNSPort && p.size >= at && p.need(pkt, p.size) && packet.IsQuery(p.head[at:p.size])
}
