package link

// The inbound filter sits between the device and the stack. It sees every packet from the sandbox,
// before the stack keeps any state for it, and lets through only packets that the stack and the
// forwarders are meant to handle: those from the sandbox's own address, to unicast destinations, in
// protocols that are handled here, and the few link-local conversations (ARP, neighbour and router
// discovery, DHCP) that a guest needs. Everything else ends here, with a counted reason. So a
// sandbox can neither forge a source nor make the stack hold addresses, groups or fragments on
// behalf of one.
//
// The filter judges form only. Policy decides which flows may go where.

import (
	"fmt"
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/datagram"
	"sluice.dev/sluice/forwarder/internal/inbound"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
)

// dhcpHandler answers guests that configure themselves: DHCPHandler of the forwarder.
type dhcpHandler interface {
	HandleV4(payload []byte) (reply []byte, broadcast bool, to netip.AddrPort)
	HandleV6(payload []byte, from netip.Addr) (reply []byte)
	RouterAdvertisement() []byte
}

// Guard is the device as the stack sees it.
type Guard struct {
	stack.LinkEndpoint
	Onlink   *onlink.Addrs
	Emit     *packet.Emitter
	Errs     *packet.Errors
	Drops    *packet.Drops
	Memory   *admit.Memory
	TCP      *tcpflow.Forwarder
	Dgram    *datagram.Forwarder
	Outside  *inbound.Path // nil: there is none
	DHCP     dhcpHandler   // nil: guests are configured from outside
	OnlyHost bool          // the sandbox's neighbours are all behind us

	network atomic.Pointer[[2]stack.NetworkEndpoint] // of the NIC, by family; nil until it is set up
}

// Open finds the NIC's endpoints in the stack. From then on packets are delivered to them.
func (l *Guard) Open(s *stack.Stack) error {
	var eps [2]stack.NetworkEndpoint
	for i, proto := range []tcpip.NetworkProtocolNumber{header.IPv4ProtocolNumber, header.IPv6ProtocolNumber} {
		ep, err := s.GetNetworkEndpoint(packet.NICID, proto)
		if err != nil {
			return fmt.Errorf("finding the stack's network endpoint: %s", err)
		}
		eps[i] = ep
	}
	l.network.Store(&eps)
	return nil
}

// GSOMaxSize and SupportedGSO pass on what the device offers. The stack asks for them by type
// assertion, which embedding an interface would hide.
func (l *Guard) GSOMaxSize() uint32 {
	if g, ok := l.LinkEndpoint.(stack.GSOEndpoint); ok {
		return g.GSOMaxSize()
	}
	return 0
}

func (l *Guard) SupportedGSO() stack.SupportedGSO {
	if g, ok := l.LinkEndpoint.(stack.GSOEndpoint); ok {
		return g.SupportedGSO()
	}
	return stack.GSONotSupported
}

// Attach puts the filter in front of the stack's dispatcher.
func (l *Guard) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.LinkEndpoint.Attach(nil)
		return
	}
	l.TCP.NIC = d
	l.LinkEndpoint.Attach(&filter{NetworkDispatcher: d, l: l, n: newFilterReasons(l.Drops)})
}

type filterReasons struct {
	short, version, spoofed, martian, sourceRoute, multicast, broadcast, arp, neighbour, ethertype packet.Reason
}

func newFilterReasons(d *packet.Drops) filterReasons {
	r := d.Reason
	return filterReasons{
		short:       r("drop_short_packet"),
		version:     r("drop_ip_version"),
		spoofed:     r("drop_spoofed_source"),
		martian:     r("drop_martian_destination"),
		sourceRoute: r("drop_source_route"),
		multicast:   r("drop_multicast"),
		broadcast:   r("drop_broadcast"),
		arp:         r("drop_arp"),
		neighbour:   r("drop_neighbour_discovery"),
		ethertype:   r("drop_ethertype"),
	}
}

// filter is a stack.NetworkDispatcher that passes on the packets that it lets through.
type filter struct {
	stack.NetworkDispatcher
	l *Guard
	n filterReasons
}

// DeliverNetworkPacket is called by the device's reader for each packet.
func (t *filter) DeliverNetworkPacket(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if t.l.Outside != nil && t.l.Outside.Answer(pkt) {
		return
	}
	var why packet.Reason
	switch proto {
	case header.IPv4ProtocolNumber:
		why = t.judge4(pkt)
	case header.IPv6ProtocolNumber:
		why = t.judge6(pkt)
	case header.ARPProtocolNumber:
		why = t.judgeARP(pkt)
	default:
		why = t.n.ethertype
	}
	switch why {
	case packet.Reason{}:
		t.deliver(proto, pkt)
	case handled:
	default:
		why.DropArrived(pkt)
	}
}

// KeepsRXChecksumValidated tells the device whether its word on each packet's checksum is respected
// (tun.ChecksumKeeper). It is, as soon as the stack is set up.
func (t *filter) KeepsRXChecksumValidated() bool { return t.l.network.Load() != nil }

// deliver bypasses the stack's NIC, which would replace the packet's RXChecksumValidated by one
// flag for the whole link.
func (t *filter) deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	eps := t.l.network.Load()
	switch {
	case eps == nil:
	case proto != header.ARPProtocolNumber && (t.l.Dgram.PassUDP(proto, pkt) || t.l.TCP.PassTCP(proto, pkt) || t.l.Dgram.PassRefusal(proto, pkt)):
		return
	case proto == header.IPv4ProtocolNumber, proto == header.IPv6ProtocolNumber:
		// It may wait for other fragments.
		if netstack.Wasteful(pkt) {
			pkt = t.l.Memory.Compact(pkt)
			defer pkt.DecRef()
		}
		ep := eps[0]
		if proto == header.IPv6ProtocolNumber {
			ep = eps[1]
		}
		ep.HandlePacket(pkt)
		return
	}
	t.NetworkDispatcher.DeliverNetworkPacket(proto, pkt)
}

// handled is the verdict on a packet that was answered here: neither passed on nor dropped.
var handled = packet.Reason{Name: "handled"}

func (t *filter) judge4(pkt *stack.PacketBuffer) packet.Reason {
	b, ok := pkt.Data().PullUp(header.IPv4MinimumSize)
	if !ok {
		return t.n.short
	}
	h := header.IPv4(b)
	if b[0]>>4 != 4 {
		return t.n.version
	}
	src, dst := netip.AddrFrom4(h.SourceAddress().As4()), netip.AddrFrom4(h.DestinationAddress().As4())
	proto := h.Protocol()
	if dst.As4() == [4]byte{255, 255, 255, 255} || t.l.Onlink.IsSubnetBroadcast(dst) {
		if proto == uint8(header.UDPProtocolNumber) && t.l.answerDHCPv4(src, pkt) {
			return handled
		}
		return t.n.broadcast
	}
	if !t.l.Onlink.IsGuest(src) {
		if proto == uint8(header.UDPProtocolNumber) && src.IsUnspecified() && t.l.answerDHCPv4(src, pkt) {
			return handled
		}
		return t.n.spoofed
	}
	switch {
	case dst.IsMulticast():
		return t.n.multicast
	case dst.IsUnspecified(), dst.IsLoopback(), t.l.Onlink.IsGuest(dst):
		return t.n.martian
	case packet.SourceRouted(h, pkt):
		return t.n.sourceRoute
	}
	switch proto {
	case uint8(header.TCPProtocolNumber):
	case uint8(header.UDPProtocolNumber):
		if t.l.Onlink.IsOwn(dst) && t.l.answerDHCPv4(src, pkt) {
			return handled
		}
	case uint8(header.ICMPv4ProtocolNumber):
	default:
		t.l.Errs.RejectProtocol(pkt)
		return handled
	}
	return packet.Reason{}
}

func (t *filter) judge6(pkt *stack.PacketBuffer) packet.Reason {
	b, ok := pkt.Data().PullUp(header.IPv6MinimumSize)
	if !ok {
		return t.n.short
	}
	h := header.IPv6(b)
	if b[0]>>4 != 6 {
		return t.n.version
	}
	src, dst := netip.AddrFrom16(h.SourceAddress().As16()), netip.AddrFrom16(h.DestinationAddress().As16())
	local := src.IsLinkLocalUnicast() || src.IsUnspecified()
	if h.NextHeader() == uint8(header.ICMPv6ProtocolNumber) && (dst.IsMulticast() || local || t.l.Onlink.IsOwn(dst)) {
		return t.judgeDiscovery(pkt, src, dst)
	}
	if h.NextHeader() == uint8(header.UDPProtocolNumber) && local && t.l.answerDHCPv6(src, pkt) {
		return handled
	}
	switch {
	case dst.IsMulticast():
		return t.n.multicast
	case !t.l.Onlink.IsGuest(src):
		return t.n.spoofed
	case dst.IsUnspecified(), dst.IsLoopback(), dst.Is4In6(), t.l.Onlink.IsGuest(dst):
		return t.n.martian
	case dst.IsLinkLocalUnicast() && !t.l.Onlink.IsOwn(dst):
		return t.n.martian
	}
	switch h.NextHeader() {
	case uint8(header.TCPProtocolNumber), uint8(header.UDPProtocolNumber), uint8(header.ICMPv6ProtocolNumber),
		uint8(header.IPv6HopByHopOptionsExtHdrIdentifier), uint8(header.IPv6FragmentExtHdrIdentifier),
		uint8(header.IPv6DestinationOptionsExtHdrIdentifier), uint8(header.IPv6NoNextHeaderIdentifier):
		return packet.Reason{}
	case uint8(header.IPv6RoutingExtHdrIdentifier):
		return t.n.sourceRoute
	}
	t.l.Errs.RejectProtocol(pkt)
	return handled
}

// judgeDiscovery lets neighbour discovery reach the stack only if it is about our addresses, and
// answers router solicitations.
func (t *filter) judgeDiscovery(pkt *stack.PacketBuffer, src, dst netip.Addr) packet.Reason {
	const nsTarget = header.IPv6MinimumSize + header.ICMPv6NeighborSolicitMinimumSize
	b, ok := pkt.Data().PullUp(header.IPv6MinimumSize + header.ICMPv6HeaderSize)
	if !ok {
		return t.n.short
	}
	switch header.ICMPv6Type(b[header.IPv6MinimumSize]) {
	case header.ICMPv6NeighborSolicit:
		b, ok := pkt.Data().PullUp(nsTarget)
		if !ok {
			return t.n.short
		}
		target := netip.AddrFrom16([16]byte(b[nsTarget-header.IPv6AddressSize : nsTarget]))
		if t.l.OnlyHost {
			return t.judgeSolicitation(pkt, src, target)
		}
		if !t.l.Onlink.IsOwn(target) {
			return t.n.neighbour
		}
		return packet.Reason{}
	case header.ICMPv6NeighborAdvert:
		return t.n.neighbour
	case header.ICMPv6RouterSolicit:
		if t.l.answerRouterSolicit(src) {
			return handled
		}
		return t.n.neighbour
	}
	switch {
	case dst.IsMulticast():
		return t.n.multicast
	case !t.l.Onlink.IsGuest(src) && !(src.IsLinkLocalUnicast() && t.l.Onlink.IsOwn(dst)):
		return t.n.spoofed
	}
	return packet.Reason{}
}

// judgeSolicitation answers neighbour solicitations where all neighbours are behind us. It makes
// the checks that the stack would have made (RFC 4861 section 7.1.1).
func (t *filter) judgeSolicitation(pkt *stack.PacketBuffer, src, target netip.Addr) packet.Reason {
	b, ok := pkt.Data().PullUp(pkt.Data().Size())
	if !ok {
		return t.n.short
	}
	h := header.IPv6(b)
	size := header.IPv6MinimumSize + int(h.PayloadLength())
	if size > len(b) || h.HopLimit() != header.NDPHopLimit {
		return t.n.neighbour
	}
	m := header.ICMPv6(b[header.IPv6MinimumSize:size])
	sum := header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: m, Src: h.SourceAddress(), Dst: h.DestinationAddress()})
	if len(m) < header.ICMPv6NeighborSolicitMinimumSize || m.Code() != 0 || m.Checksum() != sum ||
		!t.l.answerSolicitation(src, target, header.NDPNeighborSolicit(m.MessageBody())) {
		return t.n.neighbour
	}
	return handled
}

func (t *filter) judgeARP(pkt *stack.PacketBuffer) packet.Reason {
	b, ok := pkt.Data().PullUp(header.ARPSize)
	if !ok {
		return t.n.short
	}
	h := header.ARP(b)
	if t.l.OnlyHost {
		if h.IsValid() && t.l.answerARP(h) {
			return handled
		}
		return t.n.arp
	}
	if !h.IsValid() || !t.l.Onlink.IsOwn(netip.AddrFrom4([4]byte(h.ProtocolAddressTarget()))) {
		return t.n.arp
	}
	return packet.Reason{}
}
