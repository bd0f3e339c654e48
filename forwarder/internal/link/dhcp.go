package link

// Messages that the forwarder itself sends on the link, and packet readers that several forwarders
// need.

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
)

const (
	dhcp4ServerPort = 67
	dhcp4ClientPort = 68
	dhcp6ServerPort = 547
	dhcp6ClientPort = 546
)

// udpPayload returns the payload of an unfragmented UDP packet to port whose data begin with the IP
// header.
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

// answerDHCPv4 reports whether pkt was a DHCP message, which it answers if there is an answer.
func (l *Guard) answerDHCPv4(_ netip.Addr, pkt *stack.PacketBuffer) bool {
	if l.DHCP == nil {
		return false
	}
	payload := udpPayload(pkt, dhcp4ServerPort)
	if payload == nil {
		return false
	}
	gw := l.Onlink.GatewayOf(true)
	reply, broadcast, to := l.DHCP.HandleV4(payload)
	if len(reply) == 0 || !gw.IsValid() {
		return true
	}
	if broadcast || !to.IsValid() {
		to = netip.AddrPortFrom(onlink.IPv4Broadcast, dhcp4ClientPort)
	}
	l.Emit.UDP(netip.AddrPortFrom(gw, dhcp4ServerPort), to, packet.Meta{TTL: packet.DefaultTTL}, reply, true)
	return true
}

// answerDHCPv6 is the same for DHCPv6, whose clients use link-local addresses.
func (l *Guard) answerDHCPv6(src netip.Addr, pkt *stack.PacketBuffer) bool {
	if l.DHCP == nil || !src.IsLinkLocalUnicast() {
		return false
	}
	payload := udpPayload(pkt, dhcp6ServerPort)
	if payload == nil {
		return false
	}
	if reply := l.DHCP.HandleV6(payload, src); len(reply) > 0 {
		l.Emit.UDP(netip.AddrPortFrom(l.Onlink.LinkLocal, dhcp6ServerPort), netip.AddrPortFrom(src, dhcp6ClientPort),
			packet.Meta{TTL: packet.DefaultTTL}, reply, true)
	}
	return true
}

// answerRouterSolicit sends a router advertisement to the asker or, if it has no address yet, to
// all nodes (RFC 4861 section 6.2.6).
func (l *Guard) answerRouterSolicit(src netip.Addr) bool {
	if l.DHCP == nil || !l.Onlink.GatewayOf(false).IsValid() {
		return false
	}
	to := src
	if src.IsUnspecified() {
		to = onlink.AllNodes
	}
	// RFC 4861 section 6.1.2: receivers require a hop limit of 255.
	l.Emit.ICMP(l.Onlink.LinkLocal, to, packet.Meta{TTL: 255}, l.DHCP.RouterAdvertisement())
	return true
}
