package packet

// Packets to the sandbox that no netstack endpoint sends.
//
// UDP and ICMP need no state in the stack: a datagram that comes back from a host socket is written
// as an IP packet whose source is the far side, and goes out by one cached route per family.
// netstack still does what it does well: it fragments packets larger than the link's MTU. Headers
// are written by hand into one pooled view with the payload after them: one copy, and no
// allocation.

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/forwarder/internal/onlink"
)

const (
	ProtoTCP = 6
)

const (
	ProtoICMP   = 1
	ProtoUDP    = 17
	ProtoICMPv6 = 58

	UDPHeaderLen  = header.UDPMinimumSize
	EchoHeaderLen = header.ICMPv4MinimumSize
	MaxIPv4Len    = 65535
	DefaultTTL    = 64

	// csumOffloadFrom is the payload size from which a checksum is left to the device. Below it,
	// computing one costs less than a guest that reads raw packets (a DHCP client, a capture) gains
	// from a finished one.
	csumOffloadFrom = 512
)

// Meta holds the IP header fields, other than addresses, that are preserved across the proxy.
type Meta struct {
	TTL, Tos uint8
}

// Emitter writes packets to the sandbox. Its methods may be called concurrently; they block only
// while the link does.
type Emitter struct {
	stack *stack.Stack
	MTU   int
	GSO   bool // the link completes checksums
	Uso   bool // the link segments UDP
	// guest and gateway, by family (0: IPv4, 1: IPv6), identify the cached route.
	guest, gateway [2]netip.Addr

	mu     sync.Mutex
	routes [2]atomic.Pointer[stack.Route] // written under mu, released by close

	ids atomic.Uint32 // identifications of IPv4 packets, which may get fragmented

	noRoute, failed *atomic.Uint64
}

// NewEmitter requires that the stack exists. close closes the Emitter.
func NewEmitter(s *stack.Stack, link stack.LinkEndpoint, mtu uint32, on *onlink.Addrs, st *count.Set) *Emitter {
	e := &Emitter{stack: s, MTU: int(mtu), noRoute: st.Counter("emit_no_route"), failed: st.Counter("emit_failed")}
	e.GSO = GSOOf(link) == stack.HostGSOSupported
	if u, ok := link.(interface{ USO() bool }); ok {
		e.Uso = u.USO()
	}
	for _, a := range on.Guest {
		if i := FamilyIndex(a); !e.guest[i].IsValid() {
			e.guest[i] = a
		}
	}
	for _, a := range on.Gateway {
		e.gateway[FamilyIndex(a)] = a
	}
	return e
}

// GSOOf returns the segmentation that a link supports.
func GSOOf(l stack.LinkEndpoint) stack.SupportedGSO {
	if g, ok := l.(stack.GSOEndpoint); ok {
		return g.SupportedGSO()
	}
	return stack.GSONotSupported
}

// FamilyIndex is 0 for IPv4 and 1 for IPv6.
func FamilyIndex(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

func (e *Emitter) route(family int) *stack.Route {
	if r := e.routes[family].Load(); r != nil {
		return r
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if r := e.routes[family].Load(); r != nil {
		return r
	}
	local, remote := e.gateway[family], e.guest[family]
	if !local.IsValid() || !remote.IsValid() {
		return nil
	}
	proto := header.IPv4ProtocolNumber
	if family == 1 {
		proto = header.IPv6ProtocolNumber
	}
	r, err := e.stack.FindRoute(NICID, StackAddr(local), StackAddr(remote), proto, false)
	if err != nil {
		return nil
	}
	e.routes[family].Store(r)
	return r
}

func (e *Emitter) Close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.routes {
		if r := e.routes[i].Swap(nil); r != nil {
			r.Release()
		}
	}
}

// IPHeaderLen is the length of the header that Begin writes.
func IPHeaderLen(dst netip.Addr) int {
	if dst.Is4() {
		return header.IPv4MinimumSize
	}
	return header.IPv6MinimumSize
}

// Begin makes a view with an IP header and size bytes of transport, and returns the view and those
// bytes for the caller to fill in. The two addresses must be of one family.
func Begin(src, dst netip.Addr, proto uint8, m Meta, size int) (*buffer.View, []byte) {
	hl := IPHeaderLen(dst)
	v := buffer.NewViewSize(hl + size)
	b := v.AsSlice()
	PutIPHeader(b, src, dst, proto, m, hl+size, 0, false)
	return v, b[hl:]
}

// PutIPHeader writes an IP header without options for a packet of total bytes. The
// IPv4 checksum is left zero.
func PutIPHeader(b []byte, src, dst netip.Addr, proto uint8, m Meta, total int, id uint16, df bool) {
	if dst.Is4() {
		b[0], b[1] = 0x45, m.Tos
		binary.BigEndian.PutUint16(b[2:], uint16(total))
		binary.BigEndian.PutUint16(b[4:], id)
		b[6], b[7] = 0, 0
		if df {
			b[6] = 0x40
		}
		b[8], b[9] = m.TTL, proto
		b[10], b[11] = 0, 0
		s, d := src.As4(), dst.As4()
		copy(b[12:], s[:])
		copy(b[16:], d[:])
		return
	}
	binary.BigEndian.PutUint32(b, 6<<28|uint32(m.Tos)<<20)
	binary.BigEndian.PutUint16(b[4:], uint16(total-header.IPv6MinimumSize))
	b[6], b[7] = proto, m.TTL
	s, d := src.As16(), dst.As16()
	copy(b[8:], s[:])
	copy(b[24:], d[:])
}

// PseudoSum is the unfolded part of a transport checksum that covers the addresses.
func PseudoSum(src, dst netip.Addr, proto uint8, size int) uint16 {
	return header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(proto), StackAddr(src), StackAddr(dst), uint16(size))
}

// emit puts a finished packet, made by Begin, on the link.
func (e *Emitter) emit(v *buffer.View, dst netip.Addr, gso stack.GSO, proto uint8) {
	r := e.route(FamilyIndex(dst))
	if r == nil {
		e.noRoute.Add(1)
		v.Release()
		return
	}
	if dst.Is4() {
		// netstack would draw one at random, at the price of an allocation and a lock.
		binary.BigEndian.PutUint16(v.AsSlice()[4:], uint16(max(e.ids.Add(1)&0xffff, 1)))
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(r.MaxHeaderLength()),
		Payload:            buffer.MakeWithView(v),
	})
	pkt.GSOOptions = gso
	pkt.TransportProtocolNumber = tcpip.TransportProtocolNumber(proto)
	if err := r.WriteHeaderIncludedPacket(pkt); err != nil {
		e.failed.Add(1)
	}
	pkt.DecRef()
}

// UDP sends one datagram to the sandbox. full asks for a finished checksum whatever the link
// offers.
func (e *Emitter) UDP(src, dst netip.AddrPort, m Meta, payload []byte, full bool) {
	size := UDPHeaderLen + len(payload)
	v, l4 := Begin(src.Addr(), dst.Addr(), ProtoUDP, m, size)
	copy(l4[UDPHeaderLen:], payload)
	PutUDPHeader(l4, src.Port(), dst.Port(), size)
	fits := IPHeaderLen(dst.Addr())+size <= e.MTU
	var gso stack.GSO
	if e.GSO && !full && fits && len(payload) >= csumOffloadFrom {
		gso = e.offload(src.Addr(), dst.Addr(), l4, 0)
	} else {
		FinishUDP(src.Addr(), dst.Addr(), l4)
	}
	e.emit(v, dst.Addr(), gso, ProtoUDP)
}

// UDPSegments sends payload as datagrams of segment bytes each, the last one possibly shorter. If
// the link can segment, they leave as one packet.
func (e *Emitter) UDPSegments(src, dst netip.AddrPort, m Meta, payload []byte, segment int) {
	hl := IPHeaderLen(dst.Addr()) + UDPHeaderLen
	if segment <= 0 || segment >= len(payload) {
		e.UDP(src, dst, m, payload, false)
		return
	}
	if e.GSO && e.Uso && hl+segment <= e.MTU && hl+len(payload) <= MaxIPv4Len {
		size := UDPHeaderLen + len(payload)
		v, l4 := Begin(src.Addr(), dst.Addr(), ProtoUDP, m, size)
		copy(l4[UDPHeaderLen:], payload)
		PutUDPHeader(l4, src.Port(), dst.Port(), size)
		e.emit(v, dst.Addr(), e.offload(src.Addr(), dst.Addr(), l4, segment), ProtoUDP)
		return
	}
	for len(payload) > segment {
		e.UDP(src, dst, m, payload[:segment], false)
		payload = payload[segment:]
	}
	e.UDP(src, dst, m, payload, false)
}

// offload leaves the checksum of l4 to the device: the field holds the sum over the pseudo header,
// as NEEDS_CSUM in the virtio-net header requires.
func (e *Emitter) offload(src, dst netip.Addr, l4 []byte, segment int) stack.GSO {
	binary.BigEndian.PutUint16(l4[6:], PseudoSum(src, dst, ProtoUDP, len(l4)))
	g := stack.GSO{
		Type:       stack.GSOTCPv4, // any type but none: netstack has none for UDP
		NeedsCsum:  true,
		CsumOffset: 6,
		MSS:        uint16(segment),
		L3HdrLen:   uint16(IPHeaderLen(dst)),
	}
	if !dst.Is4() {
		g.Type = stack.GSOTCPv6
	}
	return g
}

func PutUDPHeader(l4 []byte, src, dst uint16, size int) {
	binary.BigEndian.PutUint16(l4, src)
	binary.BigEndian.PutUint16(l4[2:], dst)
	binary.BigEndian.PutUint16(l4[4:], uint16(size))
	l4[6], l4[7] = 0, 0
}

func FinishUDP(src, dst netip.Addr, l4 []byte) {
	sum := ^checksum.Checksum(l4, PseudoSum(src, dst, ProtoUDP, len(l4)))
	if sum == 0 {
		sum = 0xffff // RFC 768: zero means that there is none
	}
	binary.BigEndian.PutUint16(l4[6:], sum)
}

// ICMP sends an ICMP or ICMPv6 message, by the family of dst, given in pieces. It fills in the
// checksum.
func (e *Emitter) ICMP(src, dst netip.Addr, m Meta, pieces ...[]byte) {
	proto := uint8(ProtoICMP)
	if !dst.Is4() {
		proto = ProtoICMPv6
	}
	size := 0
	for _, p := range pieces {
		size += len(p)
	}
	v, l4 := Begin(src, dst, proto, m, size)
	n := 0
	for _, p := range pieces {
		n += copy(l4[n:], p)
	}
	FinishICMP(src, dst, l4)
	e.emit(v, dst, stack.GSO{}, proto)
}

func FinishICMP(src, dst netip.Addr, l4 []byte) {
	l4[2], l4[3] = 0, 0
	initial := uint16(0)
	if !dst.Is4() {
		initial = PseudoSum(src, dst, ProtoICMPv6, len(l4))
	}
	binary.BigEndian.PutUint16(l4[2:], ^checksum.Checksum(l4, initial))
}
