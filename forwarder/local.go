package forwarder

// What the forwarder itself says on the link, and small readings of packets that
// several forwarders need.

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	dhcp4ServerPort = 67
	dhcp4ClientPort = 68
	dhcp6ServerPort = 547
	dhcp6ClientPort = 546
	// quoteMax is how much of a packet is kept to be quoted in an ICMP error, or
	// shown in a capture beside the reason it was dropped for.
	quoteMax = 1280
)

var (
	allNodes      = netip.MustParseAddr("ff02::1")
	ipv4Broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
)

// noteDrop tells the capture, if there is one, of a packet that ends here. Data
// of pkt begin with the IP header.
func (f *Forwarder) noteDrop(reason string, pkt *stack.PacketBuffer) {
	if b, ok := pkt.Data().PullUp(min(pkt.Data().Size(), quoteMax)); ok {
		f.drop(reason, b)
	}
}

// noteRefusal does so for a packet that has been through the stack.
func (f *Forwarder) noteRefusal(reason string, pkt *stack.PacketBuffer) {
	var buf [quoteMax]byte
	f.drop(reason, quote(pkt, buf[:]))
}

// originalPacket copies what an ICMP error about pkt quotes.
func originalPacket(pkt *stack.PacketBuffer) []byte {
	n := len(pkt.NetworkHeader().Slice()) + len(pkt.TransportHeader().Slice())
	return quote(pkt, make([]byte, min(n, quoteMax)))
}

// udpPayload returns what follows the UDP header of an unfragmented packet whose
// data begin with the IP header, if it goes to port.
func udpPayload(pkt *stack.PacketBuffer, port uint16) []byte {
	b, ok := pkt.Data().PullUp(pkt.Data().Size())
	if !ok {
		return nil
	}
	var hl int
	switch b[0] >> 4 {
	case 4:
		h := header.IPv4(b)
		if hl = int(h.HeaderLength()); h.More() || h.FragmentOffset() != 0 || int(h.TotalLength()) > len(b) {
			return nil
		}
		b = b[:h.TotalLength()]
	case 6:
		h := header.IPv6(b)
		if hl = header.IPv6MinimumSize; hl+int(h.PayloadLength()) > len(b) {
			return nil
		}
		b = b[:hl+int(h.PayloadLength())]
	}
	if len(b) < hl+header.UDPMinimumSize || binary.BigEndian.Uint16(b[hl+2:]) != port {
		return nil
	}
	return b[hl+header.UDPMinimumSize:]
}

// answerDHCPv4 tells whether pkt was a DHCP message; it is answered if anybody does.
func (f *Forwarder) answerDHCPv4(_ netip.Addr, pkt *stack.PacketBuffer) bool {
	if f.cfg.DHCPHandler == nil {
		return false
	}
	payload := udpPayload(pkt, dhcp4ServerPort)
	if payload == nil {
		return false
	}
	gw := f.gatewayOf(true)
	reply, broadcast, to := f.cfg.DHCPHandler.HandleV4(payload)
	if len(reply) == 0 || !gw.IsValid() {
		return true
	}
	if broadcast || !to.IsValid() {
		to = netip.AddrPortFrom(ipv4Broadcast, dhcp4ClientPort)
	}
	f.dgram.emit.udp(netip.AddrPortFrom(gw, dhcp4ServerPort), to, ipMeta{ttl: defaultTTL}, reply, true)
	return true
}

// answerDHCPv6 is the same for DHCPv6, whose clients use link-local addresses.
func (f *Forwarder) answerDHCPv6(src netip.Addr, pkt *stack.PacketBuffer) bool {
	if f.cfg.DHCPHandler == nil || !src.IsLinkLocalUnicast() {
		return false
	}
	payload := udpPayload(pkt, dhcp6ServerPort)
	if payload == nil {
		return false
	}
	if reply := f.cfg.DHCPHandler.HandleV6(payload, src); len(reply) > 0 {
		f.dgram.emit.udp(netip.AddrPortFrom(f.linkLocal, dhcp6ServerPort), netip.AddrPortFrom(src, dhcp6ClientPort),
			ipMeta{ttl: defaultTTL}, reply, true)
	}
	return true
}

// answerRouterSolicit sends a router advertisement, to the asker or, when it has
// no address yet, to all nodes (RFC 4861 section 6.2.6).
func (f *Forwarder) answerRouterSolicit(src netip.Addr) bool {
	if f.cfg.DHCPHandler == nil || !f.gatewayOf(false).IsValid() {
		return false
	}
	to := src
	if src.IsUnspecified() {
		to = allNodes
	}
	// RFC 4861 section 6.1.2: receivers insist on a hop limit of 255.
	f.dgram.emit.icmp(f.linkLocal, to, ipMeta{ttl: 255}, f.cfg.DHCPHandler.RouterAdvertisement())
	return true
}

// gatewayOf returns our address of a family on the link, if there is one.
func (f *Forwarder) gatewayOf(v4 bool) netip.Addr {
	for _, g := range f.cfg.Gateway {
		if g.Is4() == v4 {
			return g
		}
	}
	return netip.Addr{}
}

// inject delivers to the stack a segment of the connection id without data, as if the sandbox
// had sent it with sequence number seq: what the stack offers no other way to ask for.
func (f *Forwarder) inject(id stack.TransportEndpointID, flags header.TCPFlags, seq uint32) {
	v4 := id.RemoteAddress.Len() == header.IPv4AddressSize
	hl := header.IPv6MinimumSize
	if v4 {
		hl = header.IPv4MinimumSize
	}
	v := buffer.NewViewSize(hl + header.TCPMinimumSize)
	b := v.AsSlice()
	putIPHeader(b, netipAddr(id.RemoteAddress), netipAddr(id.LocalAddress), uint8(header.TCPProtocolNumber), ipMeta{ttl: defaultTTL}, len(b), 0, false)
	proto := header.IPv6ProtocolNumber
	if v4 {
		proto = header.IPv4ProtocolNumber
		h := header.IPv4(b)
		h.SetChecksum(^h.CalculateChecksum())
	}
	t := header.TCP(b[hl:])
	t.Encode(&header.TCPFields{SrcPort: id.RemotePort, DstPort: id.LocalPort, SeqNum: seq, DataOffset: header.TCPMinimumSize, Flags: flags})
	xsum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, id.RemoteAddress, id.LocalAddress, header.TCPMinimumSize)
	t.SetChecksum(^t.CalculateChecksum(xsum))
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(v)})
	pkt.PktType = tcpip.PacketHost
	f.inbound.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}
