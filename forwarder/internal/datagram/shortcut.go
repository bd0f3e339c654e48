package datagram

// UDP's shortcut past the stack.
//
// The stack has nothing to add to a whole UDP packet without IP options: none of its endpoints will
// take the packet, and finding that out costs it a lookup of a temporary address. Such a packet is
// parsed here and goes straight to the UDP forwarder. Any other packet (fragments, options,
// extension headers, lengths that do not add up) goes through the stack, which can handle it.

import (
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/packet"
)

// PassUDP reports whether pkt, whose data begin with the IP header and which the filter has let
// through, was a plain UDP packet and has been handled.
func (d *Forwarder) PassUDP(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) bool {
	hl, total := packet.PlainPacket(proto, pkt, uint8(header.UDPProtocolNumber), header.UDPMinimumSize)
	if total == 0 {
		return false
	}
	pkt.NetworkProtocolNumber = proto
	pkt.TransportProtocolNumber = header.UDPProtocolNumber
	if _, ok := pkt.NetworkHeader().Consume(hl); !ok {
		return false
	}
	if _, ok := pkt.TransportHeader().Consume(header.UDPMinimumSize); !ok {
		return false
	}
	pkt.Data().CapLength(total - hl - header.UDPMinimumSize)
	d.UDP.arrive(pkt)
	return true
}
