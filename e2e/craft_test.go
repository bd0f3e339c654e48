package e2e

// Packets made by hand, as a sandbox sends that ignores its kernel's rules.

import (
	"encoding/base64"
	"encoding/binary"
	"net/netip"
)

const (
	protoHopByHop, protoICMP, protoTCP, protoUDP, protoICMPv6 = 0, 1, 6, 17, 58

	tcpFIN, tcpSYN, tcpPSH, tcpACK = 1, 2, 8, 16

	moreFragments = 0x2000
)

// ipPacket is an IP packet to be built. A zero source means the guest's own.
type ipPacket struct {
	src, dst string
	proto    int
	options  []byte // IPv4, a multiple of four
	frag     int    // flags and offset of a fragment, in IPv4 form; IPv6 gets a fragment header
	fragment bool
	exts     []byte // IPv6: extension headers, the first one's type in ext
	ext      int
	payload  []byte
}

func (p ipPacket) bytes() []byte {
	dst := netip.MustParseAddr(p.dst)
	src := netip.MustParseAddr(guest4)
	if dst.Is6() {
		src = netip.MustParseAddr(guest6)
	}
	if p.src != "" {
		src = netip.MustParseAddr(p.src)
	}
	if dst.Is4() {
		b := make([]byte, 20, 60)
		b[0] = 0x40 | byte(5+len(p.options)/4)
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(p.options)+len(p.payload)))
		binary.BigEndian.PutUint16(b[4:], 0x1234)
		binary.BigEndian.PutUint16(b[6:], uint16(p.frag))
		b[8], b[9] = 64, byte(p.proto)
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
		b = append(b, p.options...)
		binary.BigEndian.PutUint16(b[10:], ^sum(b, 0))
		return append(b, p.payload...)
	}
	next, exts := p.proto, p.exts
	if p.exts != nil {
		next = p.ext
	}
	if p.fragment {
		h := make([]byte, 8)
		h[0] = byte(p.proto)
		binary.BigEndian.PutUint16(h[2:], uint16(p.frag&0x1fff)<<3)
		if p.frag&moreFragments != 0 {
			h[3] |= 1
		}
		binary.BigEndian.PutUint32(h[4:], 0x1234)
		next, exts = 44, h
	}
	b := make([]byte, 40)
	b[0] = 0x60
	binary.BigEndian.PutUint16(b[4:], uint16(len(exts)+len(p.payload)))
	b[6], b[7] = byte(next), 64
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	return append(append(b, exts...), p.payload...)
}

func (p ipPacket) base64() string { return base64.StdEncoding.EncodeToString(p.bytes()) }

// sum returns the Internet checksum before inversion.
func sum(b []byte, start uint32) uint16 {
	for len(b) > 1 {
		start += uint32(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		start += uint32(b[0]) << 8
	}
	for start > 0xffff {
		start = start>>16 + start&0xffff
	}
	return uint16(start)
}

// pseudo returns the sum of the pseudo header that p's transport covers.
func (p ipPacket) pseudo(n int) uint32 {
	dst := netip.MustParseAddr(p.dst)
	src := netip.MustParseAddr(guest4)
	if dst.Is6() {
		src = netip.MustParseAddr(guest6)
	}
	if p.src != "" {
		src = netip.MustParseAddr(p.src)
	}
	return uint32(sum(src.AsSlice(), 0)) + uint32(sum(dst.AsSlice(), 0)) + uint32(p.proto) + uint32(n)
}

// tcp completes p with a segment.
func (p ipPacket) tcp(sport, dport, flags int, data string) ipPacket {
	p.proto = protoTCP
	b := make([]byte, 20, 20+len(data))
	binary.BigEndian.PutUint16(b, uint16(sport))
	binary.BigEndian.PutUint16(b[2:], uint16(dport))
	binary.BigEndian.PutUint32(b[4:], 1000)
	b[12], b[13] = 5<<4, byte(flags)
	binary.BigEndian.PutUint16(b[14:], 64000)
	b = append(b, data...)
	binary.BigEndian.PutUint16(b[16:], ^sum(b, p.pseudo(len(b))))
	p.payload = b
	return p
}

// udp completes p with a datagram.
func (p ipPacket) udp(sport, dport int, data string) ipPacket {
	p.proto = protoUDP
	b := make([]byte, 8, 8+len(data))
	binary.BigEndian.PutUint16(b, uint16(sport))
	binary.BigEndian.PutUint16(b[2:], uint16(dport))
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(data)))
	b = append(b, data...)
	binary.BigEndian.PutUint16(b[6:], ^sum(b, p.pseudo(len(b))))
	p.payload = b
	return p
}

// echo completes p with an echo request.
func (p ipPacket) echo(data string) ipPacket {
	if netip.MustParseAddr(p.dst).Is6() {
		return p.icmp(128, data)
	}
	return p.icmp(8, data)
}

// icmp completes p with a message of the given type.
func (p ipPacket) icmp(kind byte, data string) ipPacket {
	b := append([]byte{kind, 0, 0, 0, 0x77, 0x77, 0, 1}, data...)
	p.proto = protoICMP
	start := uint32(0)
	if netip.MustParseAddr(p.dst).Is6() {
		p.proto = protoICMPv6
		start = p.pseudo(len(b))
	}
	binary.BigEndian.PutUint16(b[2:], ^sum(b, start))
	p.payload = b
	return p
}

// cut splits p's payload at n, a multiple of eight, and returns both fragments. The caller may
// replace and move the second one's payload.
func (p ipPacket) cut(n int) (first, second ipPacket) {
	first, second = p, p
	first.fragment, second.fragment = true, true
	first.frag, second.frag = moreFragments, n/8
	first.payload, second.payload = p.payload[:n], p.payload[n:]
	return first, second
}
