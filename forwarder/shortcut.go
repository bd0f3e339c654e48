package forwarder

// UDP's way past the stack.
//
// The stack has nothing to add to a whole UDP packet without IP options: no
// endpoint of its own will have it, and finding that out costs it a lookup of a
// temporary address. Such a packet is parsed here and goes straight to the UDP
// forwarder. Whatever is not plain (fragments, options, extension headers,
// lengths that do not add up) takes the stack's way, which knows what to do.

import (
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// passUDP tells whether pkt, whose data begin with the IP header and which the
// filter has let through, was a plain UDP packet, and is dealt with.
func (d *datagrams) passUDP(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) bool {
	hl, total := plainPacket(proto, pkt, uint8(header.UDPProtocolNumber), header.UDPMinimumSize)
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
	d.udp.arrive(pkt)
	return true
}

// plainPacket returns the lengths of the IP header and of the packet, or 0 and 0 for
// one that is not plain.
func plainPacket(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer, transport uint8, least int) (hl, total int) {
	size := pkt.Data().Size()
	if proto == header.IPv4ProtocolNumber {
		b, ok := pkt.Data().PullUp(header.IPv4MinimumSize)
		if !ok || b[0] != 0x45 {
			return 0, 0
		}
		h := header.IPv4(b)
		if h.Protocol() != transport || h.More() || h.FragmentOffset() != 0 ||
			!pkt.RXChecksumValidated && !h.IsChecksumValid() {
			return 0, 0
		}
		hl, total = header.IPv4MinimumSize, int(h.TotalLength())
	} else {
		b, ok := pkt.Data().PullUp(header.IPv6MinimumSize)
		if !ok {
			return 0, 0
		}
		h := header.IPv6(b)
		if h.NextHeader() != transport {
			return 0, 0
		}
		hl, total = header.IPv6MinimumSize, header.IPv6MinimumSize+int(h.PayloadLength())
	}
	if total > size || total < hl+least {
		return 0, 0
	}
	return hl, total
}
