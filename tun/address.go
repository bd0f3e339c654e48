package tun

import (
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// AddHeader implements stack.LinkEndpoint.
func (e *Endpoint) AddHeader(pkt *stack.PacketBuffer) {
	if e.filter.kind != TAP {
		return
	}
	to := e.destination(pkt)
	eth := header.Ethernet(pkt.LinkHeader().Push(ethernetHeaderLen))
	copy(eth[:6], to[:])
	copy(eth[6:12], e.filter.gateway[:])
	eth[12], eth[13] = byte(pkt.NetworkProtocolNumber>>8), byte(pkt.NetworkProtocolNumber)
}

// ParseHeader implements stack.LinkEndpoint.
func (e *Endpoint) ParseHeader(pkt *stack.PacketBuffer) bool {
	if e.filter.kind != TAP {
		return true
	}
	_, ok := pkt.LinkHeader().Consume(ethernetHeaderLen)
	return ok
}

// destination returns the hardware address that a packet goes to: the one that the stack gave (in
// an ARP reply, the asker's), the group's, or the container's.
func (e *Endpoint) destination(pkt *stack.PacketBuffer) mac {
	if a := pkt.EgressRoute.RemoteLinkAddress; len(a) == 6 {
		return mac([]byte(a))
	}
	switch ip := pkt.NetworkHeader().Slice(); pkt.NetworkProtocolNumber {
	case header.IPv4ProtocolNumber:
		if len(ip) >= header.IPv4MinimumSize {
			switch to := ip[16:20]; {
			case to[0]&0xf0 == 0xe0: // RFC 1112, section 6.4
				return mac{0x01, 0x00, 0x5e, to[1] & 0x7f, to[2], to[3]}
			case [4]byte(to) == [4]byte{255, 255, 255, 255}:
				return broadcastMAC
			}
		}
	case header.IPv6ProtocolNumber:
		if len(ip) >= header.IPv6MinimumSize && ip[24] == 0xff { // RFC 2464, section 7
			return mac{0x33, 0x33, ip[36], ip[37], ip[38], ip[39]}
		}
	}
	return macOf(e.guest.Load())
}
