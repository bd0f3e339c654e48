package forwarder

// Reading headers of packets that have been through the stack.

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// arrival is what is read of a packet's IP header.
type arrival struct {
	src, dst netip.Addr
	meta     ipMeta
	id       uint16
	df       bool
	size     int    // of the IP packet
	wire     uint16 // the sequence number that an echo request leaves with (icmp_book.go)
}

// arrivalOf reads the headers of a packet that has been through the stack.
func arrivalOf(pkt *stack.PacketBuffer) (a arrival, ok bool) {
	nh := pkt.NetworkHeader().Slice()
	a.size = len(nh) + len(pkt.TransportHeader().Slice()) + pkt.Data().Size()
	switch {
	case pkt.NetworkProtocolNumber == header.IPv4ProtocolNumber && len(nh) >= header.IPv4MinimumSize:
		a.src, a.dst = netip.AddrFrom4([4]byte(nh[12:16])), netip.AddrFrom4([4]byte(nh[16:20]))
		a.meta = ipMeta{ttl: nh[8], tos: nh[1]}
		a.id = binary.BigEndian.Uint16(nh[4:])
		a.df = nh[6]&0x40 != 0
	case pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber && len(nh) >= header.IPv6MinimumSize:
		a.src, a.dst = netip.AddrFrom16([16]byte(nh[8:24])), netip.AddrFrom16([16]byte(nh[24:40]))
		a.meta = ipMeta{ttl: nh[7], tos: nh[0]<<4 | nh[1]>>4}
		// Only the source fragments: a packet that came whole must leave whole.
		a.df = nh[6] != uint8(header.IPv6FragmentHeader)
	default:
		return a, false
	}
	return a, true
}

// sourceRouted reports whether an IPv4 packet asks to go by other routers than ours
// (RFC 791 section 3.1): what was judged is the address it has now, not those.
func sourceRouted(h header.IPv4, pkt *stack.PacketBuffer) bool {
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
