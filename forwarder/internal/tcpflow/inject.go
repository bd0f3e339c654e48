package tcpflow

import (
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/packet"
)

// inject delivers to the stack a segment of the connection id without data, as if the sandbox
// had sent it with sequence number seq: what the stack offers no other way to ask for.
func (t *Forwarder) inject(id stack.TransportEndpointID, flags header.TCPFlags, seq uint32) {
	v4 := id.RemoteAddress.Len() == header.IPv4AddressSize
	hl := header.IPv6MinimumSize
	if v4 {
		hl = header.IPv4MinimumSize
	}
	v := buffer.NewViewSize(hl + header.TCPMinimumSize)
	b := v.AsSlice()
	packet.PutIPHeader(b, packet.NetipAddr(id.RemoteAddress), packet.NetipAddr(id.LocalAddress), uint8(header.TCPProtocolNumber), packet.Meta{TTL: packet.DefaultTTL}, len(b), 0, false)
	proto := header.IPv6ProtocolNumber
	if v4 {
		proto = header.IPv4ProtocolNumber
		h := header.IPv4(b)
		h.SetChecksum(^h.CalculateChecksum())
	}
	h := header.TCP(b[hl:])
	h.Encode(&header.TCPFields{SrcPort: id.RemotePort, DstPort: id.LocalPort, SeqNum: seq, DataOffset: header.TCPMinimumSize, Flags: flags})
	xsum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, id.RemoteAddress, id.LocalAddress, header.TCPMinimumSize)
	h.SetChecksum(^h.CalculateChecksum(xsum))
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(v)})
	pkt.PktType = tcpip.PacketHost
	t.NIC.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}
