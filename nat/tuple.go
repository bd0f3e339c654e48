package nat

import (
	"fmt"
	"net/netip"
)

// IP protocol numbers that the table knows by name. All others have the generic timeout and no
// states, as in the kernel.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

const (
	familyIPv4 = 4
	familyIPv6 = 6
)

// Tuple names one direction of a flow. It is comparable and its addresses are always unmapped, so
// an IPv4 flow has one name. It holds no pointer, unlike netip.Addr with its zone: the garbage
// collector need not scan a table of tens of thousands, and a map key hashes as one run of memory.
//
// The zero Tuple names nothing.
type Tuple struct {
	src, dst     [16]byte
	sport, dport uint16
	proto        uint8
	family       uint8
}

// NewTuple returns the tuple of a packet from src to dst. Addresses are unmapped and lose their
// zone. For ICMP and ICMPv6 echo the source port is the echo identifier and the destination port is
// type<<8 | code, as in nf_conntrack's keys.
func NewTuple(proto uint8, src, dst netip.AddrPort) Tuple {
	s, d := src.Addr().Unmap(), dst.Addr().Unmap()
	t := Tuple{src: s.As16(), dst: d.As16(), sport: src.Port(), dport: dst.Port(), proto: proto, family: familyIPv6}
	if s.Is4() && d.Is4() {
		t.family = familyIPv4
	}
	return t
}

// Proto returns the IP protocol number.
func (t Tuple) Proto() uint8 { return t.proto }

// Src returns the source; the port of an ICMP tuple is the echo identifier.
func (t Tuple) Src() netip.AddrPort { return netip.AddrPortFrom(t.addr(t.src), t.sport) }

// Dst returns the destination; the port of an ICMP tuple is type<<8 | code.
func (t Tuple) Dst() netip.AddrPort { return netip.AddrPortFrom(t.addr(t.dst), t.dport) }

func (t Tuple) addr(b [16]byte) netip.Addr {
	switch t.family {
	case familyIPv4:
		return netip.AddrFrom16(b).Unmap()
	case familyIPv6:
		return netip.AddrFrom16(b)
	}
	return netip.Addr{}
}

// Reverse returns the tuple of the answer, with the ends swapped. For ICMP the addresses are
// swapped, the identifier stays, and the type becomes its answer (echo request ↔ echo reply and the
// other pairs of nf_conntrack_proto_icmp.c's invmap).
func (t Tuple) Reverse() Tuple {
	t.src, t.dst = t.dst, t.src
	if t.isICMP() {
		t.dport = uint16(icmpAnswer(t.proto, uint8(t.dport>>8)))<<8 | t.dport&0xff
		return t
	}
	t.sport, t.dport = t.dport, t.sport
	return t
}

func (t Tuple) isICMP() bool { return t.proto == protoICMP || t.proto == protoICMPv6 }

func icmpAnswer(proto, typ uint8) uint8 {
	if proto == protoICMPv6 {
		switch typ {
		case 128, 139: // echo request, node information query
			return typ + 1
		case 129, 140:
			return typ - 1
		}
		return typ
	}
	switch typ {
	case 0:
		return 8
	case 8:
		return 0
	case 13, 15, 17: // timestamp, information, address mask
		return typ + 1
	case 14, 16, 18:
		return typ - 1
	}
	return typ
}

// String returns a readable form: "tcp 10.0.2.100:4000 > 192.0.2.1:80".
func (t Tuple) String() string {
	switch {
	case t.family == 0:
		return "none"
	case t.isICMP():
		return fmt.Sprintf("%s %v > %v type %d code %d id %d", protoName(t.proto), t.addr(t.src), t.addr(t.dst), t.dport>>8, t.dport&0xff, t.sport)
	}
	return fmt.Sprintf("%s %v > %v", protoName(t.proto), t.Src(), t.Dst())
}

// protoName returns conntrack(8)'s name of a protocol.
func protoName(p uint8) string {
	switch p {
	case protoICMP:
		return "icmp"
	case protoTCP:
		return "tcp"
	case protoUDP:
		return "udp"
	case protoICMPv6:
		return "icmpv6"
	}
	return "unknown"
}
