package packet

// Reading headers of packets that have been through the stack.

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	EchoRequest4, EchoReply4 = uint8(header.ICMPv4Echo), uint8(header.ICMPv4EchoReply)
	EchoRequest6, EchoReply6 = uint8(header.ICMPv6EchoRequest), uint8(header.ICMPv6EchoReply)
)

// Arrival holds the fields read from a packet's IP header.
type Arrival struct {
	Src, Dst netip.Addr
	Meta     Meta
	ID       uint16
	Df       bool
	Size     int    // of the IP packet
	Wire     uint16 // the sequence number with which an echo request leaves (datagram/echo_book.go)
}

// ArrivalOf reads the headers of a packet that has been through the stack.
func ArrivalOf(pkt *stack.PacketBuffer) (a Arrival, ok bool) {
	nh := pkt.NetworkHeader().Slice()
	a.Size = len(nh) + len(pkt.TransportHeader().Slice()) + pkt.Data().Size()
	switch {
	case pkt.NetworkProtocolNumber == header.IPv4ProtocolNumber && len(nh) >= header.IPv4MinimumSize:
		a.Src, a.Dst = netip.AddrFrom4([4]byte(nh[12:16])), netip.AddrFrom4([4]byte(nh[16:20]))
		a.Meta = Meta{TTL: nh[8], Tos: nh[1]}
		a.ID = binary.BigEndian.Uint16(nh[4:])
		a.Df = nh[6]&0x40 != 0
	case pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber && len(nh) >= header.IPv6MinimumSize:
		a.Src, a.Dst = netip.AddrFrom16([16]byte(nh[8:24])), netip.AddrFrom16([16]byte(nh[24:40]))
		a.Meta = Meta{TTL: nh[7], Tos: nh[0]<<4 | nh[1]>>4}
		// Only the source fragments: a packet that came whole must leave whole.
		a.Df = nh[6] != uint8(header.IPv6FragmentHeader)
	default:
		return a, false
	}
	return a, true
}

// SourceRouted reports whether an IPv4 packet asks to be routed through routers other than ours
// (RFC 791 section 3.1): policy judged its current address, not theirs.
func SourceRouted(h header.IPv4, pkt *stack.PacketBuffer) bool {
	const end, nop, looseRoute, strictRoute = 0, 1, 131, 137
	b, ok := pkt.Data().PullUp(int(h.HeaderLength()))
	if !ok || len(b) <= header.IPv4MinimumSize {
		return false // the stack judges headers that are cut short
	}
	for opts := b[header.IPv4MinimumSize:]; len(opts) > 1; {
		switch opts[0] {
		case end:
			return false
		case looseRoute, strictRoute:
			return true
		case nop:
			opts = opts[1:]
		default:
			opts = opts[min(max(int(opts[1]), 2), len(opts)):]
		}
	}
	return false
}

// PlainPacket returns the lengths of the IP header and of the packet, or 0 and 0 for
// one that is not plain.
func PlainPacket(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer, transport uint8, least int) (hl, total int) {
	size := pkt.Data().Size()
	if proto == header.IPv4ProtocolNumber {
		b, ok := pkt.Data().PullUp(header.IPv4MinimumSize)
		if !ok || b[0] != 0x45 {
			return 0, 0
		}
		h := header.IPv4(b)
		if h.Protocol() != transport || h.More() || h.FragmentOffset() != 0 ||
			!pkt.RXChecksumValidated && !h.IsChecksumValid() {
			return 0, 0
		}
		hl, total = header.IPv4MinimumSize, int(h.TotalLength())
	} else {
		b, ok := pkt.Data().PullUp(header.IPv6MinimumSize)
		if !ok {
			return 0, 0
		}
		h := header.IPv6(b)
		if h.NextHeader() != transport {
			return 0, 0
		}
		hl, total = header.IPv6MinimumSize, header.IPv6MinimumSize+int(h.PayloadLength())
	}
	if total > size || total < hl+least {
		return 0, 0
	}
	return hl, total
}
