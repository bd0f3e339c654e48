package forwarder

// Packets to the sandbox that no netstack endpoint sends.
//
// UDP and ICMP need no state in the stack: a datagram that comes back from a host
// socket is written as an IP packet whose source is the far side, and goes out by
// one cached route per family. netstack still does what it does well, which is to
// fragment what is larger than the link's MTU. Headers are written by hand into one
// pooled view with the payload behind them: one copy, nothing allocated.

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
)

const (
	protoICMP   = 1
	protoUDP    = 17
	protoICMPv6 = 58

	udpHeaderLen  = header.UDPMinimumSize
	echoHeaderLen = header.ICMPv4MinimumSize
	maxIPv4Len    = 65535
	defaultTTL    = 64

	// csumOffloadFrom is the payload from which a checksum is left to the device.
	// Below it summing costs less than a guest that reads raw packets (a DHCP client,
	// a capture) gains from seeing a finished one.
	csumOffloadFrom = 512
)

// ipMeta is what of an IP header is carried across, apart from addresses.
type ipMeta struct {
	ttl, tos uint8
}

// emitter writes packets to the sandbox. Its methods may be called at the same
// time; they block only while the link does.
type emitter struct {
	stack *stack.Stack
	mtu   int
	gso   bool // the link completes checksums
	uso   bool // the link segments UDP
	// guest and gateway, by family (0: IPv4, 1: IPv6), find the cached route.
	guest, gateway [2]netip.Addr

	mu     sync.Mutex
	routes [2]atomic.Pointer[stack.Route] // written under mu, released by close

	ids atomic.Uint32 // identifications of IPv4 packets, which may get fragmented

	noRoute, failed *atomic.Uint64
}

// newEmitter needs the stack to exist. It is closed by close.
func newEmitter(s *stack.Stack, link stack.LinkEndpoint, mtu uint32, on *addrs, st *stats) *emitter {
	e := &emitter{stack: s, mtu: int(mtu), noRoute: st.counter("emit_no_route"), failed: st.counter("emit_failed")}
	e.gso = gsoOf(link) == stack.HostGSOSupported
	if u, ok := link.(interface{ USO() bool }); ok {
		e.uso = u.USO()
	}
	for _, a := range on.guest {
		if i := familyIndex(a); !e.guest[i].IsValid() {
			e.guest[i] = a
		}
	}
	for _, a := range on.gateway {
		e.gateway[familyIndex(a)] = a
	}
	return e
}

// gsoOf is what segments a link takes.
func gsoOf(l stack.LinkEndpoint) stack.SupportedGSO {
	if g, ok := l.(stack.GSOEndpoint); ok {
		return g.SupportedGSO()
	}
	return stack.GSONotSupported
}

// familyIndex is 0 for IPv4 and 1 for IPv6.
func familyIndex(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

func (e *emitter) route(family int) *stack.Route {
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
	r, err := e.stack.FindRoute(nicID, tcpipAddr(local), tcpipAddr(remote), proto, false)
	if err != nil {
		return nil
	}
	e.routes[family].Store(r)
	return r
}

func (e *emitter) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.routes {
		if r := e.routes[i].Swap(nil); r != nil {
			r.Release()
		}
	}
}

// ipHeaderLen is the length of the headers that begin writes.
func ipHeaderLen(dst netip.Addr) int {
	if dst.Is4() {
		return header.IPv4MinimumSize
	}
	return header.IPv6MinimumSize
}

// begin makes a view of an IP header and size bytes of transport, and returns the
// latter to be filled in. The two addresses must be of one family.
func begin(src, dst netip.Addr, proto uint8, m ipMeta, size int) (*buffer.View, []byte) {
	hl := ipHeaderLen(dst)
	v := buffer.NewViewSize(hl + size)
	b := v.AsSlice()
	putIPHeader(b, src, dst, proto, m, hl+size, 0, false)
	return v, b[hl:]
}

// putIPHeader writes an IP header without options for a packet of total bytes. The
// IPv4 checksum is left zero.
func putIPHeader(b []byte, src, dst netip.Addr, proto uint8, m ipMeta, total int, id uint16, df bool) {
	if dst.Is4() {
		b[0], b[1] = 0x45, m.tos
		binary.BigEndian.PutUint16(b[2:], uint16(total))
		binary.BigEndian.PutUint16(b[4:], id)
		b[6], b[7] = 0, 0
		if df {
			b[6] = 0x40
		}
		b[8], b[9] = m.ttl, proto
		b[10], b[11] = 0, 0
		s, d := src.As4(), dst.As4()
		copy(b[12:], s[:])
		copy(b[16:], d[:])
		return
	}
	binary.BigEndian.PutUint32(b, 6<<28|uint32(m.tos)<<20)
	binary.BigEndian.PutUint16(b[4:], uint16(total-header.IPv6MinimumSize))
	b[6], b[7] = proto, m.ttl
	s, d := src.As16(), dst.As16()
	copy(b[8:], s[:])
	copy(b[24:], d[:])
}

// pseudoSum is the unfolded part of a transport checksum that covers the addresses.
func pseudoSum(src, dst netip.Addr, proto uint8, size int) uint16 {
	return header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(proto), tcpipAddr(src), tcpipAddr(dst), uint16(size))
}

// emit puts a finished packet, made by begin, on the link.
func (e *emitter) emit(v *buffer.View, dst netip.Addr, gso stack.GSO, proto uint8) {
	r := e.route(familyIndex(dst))
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

// udp sends one datagram to the sandbox. full asks for a finished checksum whatever
// the link offers.
func (e *emitter) udp(src, dst netip.AddrPort, m ipMeta, payload []byte, full bool) {
	size := udpHeaderLen + len(payload)
	v, l4 := begin(src.Addr(), dst.Addr(), protoUDP, m, size)
	copy(l4[udpHeaderLen:], payload)
	putUDPHeader(l4, src.Port(), dst.Port(), size)
	fits := ipHeaderLen(dst.Addr())+size <= e.mtu
	var gso stack.GSO
	if e.gso && !full && fits && len(payload) >= csumOffloadFrom {
		gso = e.offload(src.Addr(), dst.Addr(), l4, 0)
	} else {
		finishUDP(src.Addr(), dst.Addr(), l4)
	}
	e.emit(v, dst.Addr(), gso, protoUDP)
}

// udpSegments sends payload as datagrams of segment bytes each, the last one maybe
// shorter; as one packet if the link can cut it.
func (e *emitter) udpSegments(src, dst netip.AddrPort, m ipMeta, payload []byte, segment int) {
	hl := ipHeaderLen(dst.Addr()) + udpHeaderLen
	if segment <= 0 || segment >= len(payload) {
		e.udp(src, dst, m, payload, false)
		return
	}
	if e.gso && e.uso && hl+segment <= e.mtu && hl+len(payload) <= maxIPv4Len {
		size := udpHeaderLen + len(payload)
		v, l4 := begin(src.Addr(), dst.Addr(), protoUDP, m, size)
		copy(l4[udpHeaderLen:], payload)
		putUDPHeader(l4, src.Port(), dst.Port(), size)
		e.emit(v, dst.Addr(), e.offload(src.Addr(), dst.Addr(), l4, segment), protoUDP)
		return
	}
	for len(payload) > segment {
		e.udp(src, dst, m, payload[:segment], false)
		payload = payload[segment:]
	}
	e.udp(src, dst, m, payload, false)
}

// offload leaves the checksum of l4 to the device: the field holds the sum over the
// pseudo header, as the virtio-net header's NEEDS_CSUM wants it.
func (e *emitter) offload(src, dst netip.Addr, l4 []byte, segment int) stack.GSO {
	binary.BigEndian.PutUint16(l4[6:], pseudoSum(src, dst, protoUDP, len(l4)))
	g := stack.GSO{
		Type:       stack.GSOTCPv4, // any type but none: netstack has none for UDP
		NeedsCsum:  true,
		CsumOffset: 6,
		MSS:        uint16(segment),
		L3HdrLen:   uint16(ipHeaderLen(dst)),
	}
	if !dst.Is4() {
		g.Type = stack.GSOTCPv6
	}
	return g
}

func putUDPHeader(l4 []byte, src, dst uint16, size int) {
	binary.BigEndian.PutUint16(l4, src)
	binary.BigEndian.PutUint16(l4[2:], dst)
	binary.BigEndian.PutUint16(l4[4:], uint16(size))
	l4[6], l4[7] = 0, 0
}

func finishUDP(src, dst netip.Addr, l4 []byte) {
	sum := ^checksum.Checksum(l4, pseudoSum(src, dst, protoUDP, len(l4)))
	if sum == 0 {
		sum = 0xffff // RFC 768: zero means that there is none
	}
	binary.BigEndian.PutUint16(l4[6:], sum)
}

// icmp sends an ICMP or ICMPv6 message, by the family of dst, given in pieces. Its
// checksum is filled in.
func (e *emitter) icmp(src, dst netip.Addr, m ipMeta, pieces ...[]byte) {
	proto := uint8(protoICMP)
	if !dst.Is4() {
		proto = protoICMPv6
	}
	size := 0
	for _, p := range pieces {
		size += len(p)
	}
	v, l4 := begin(src, dst, proto, m, size)
	n := 0
	for _, p := range pieces {
		n += copy(l4[n:], p)
	}
	finishICMP(src, dst, l4)
	e.emit(v, dst, stack.GSO{}, proto)
}

func finishICMP(src, dst netip.Addr, l4 []byte) {
	l4[2], l4[3] = 0, 0
	initial := uint16(0)
	if !dst.Is4() {
		initial = pseudoSum(src, dst, protoICMPv6, len(l4))
	}
	binary.BigEndian.PutUint16(l4[2:], ^checksum.Checksum(l4, initial))
}

// netipAddr converts the stack's address, unmapped: this is the edge at which a
// 4-in-6 form ends.
func netipAddr(a tcpip.Address) netip.Addr {
	if a.Len() == header.IPv4AddressSize {
		return netip.AddrFrom4(a.As4())
	}
	return netip.AddrFrom16(a.As16()).Unmap()
}

// tcpipAddr converts an unmapped address to the stack's form.
func tcpipAddr(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}
