package link

// Neighbours of a sandbox whose only neighbour is us.
//
// A pod keeps the prefix of its network's main plugin, so to its kernel the other pods of the node
// are on link, and it asks for their hardware addresses. All of them are behind us: every request
// is answered with our own address, except one for the sandbox's own addresses, where an answer
// would look like a conflict (RFC 5227, RFC 4862 section 5.4.3). The stack, which knows only its
// own addresses, is not asked.

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
)

// answerARP answers a request for any address but the sandbox's. It reports whether the packet was
// such a request.
func (l *Guard) answerARP(h header.ARP) bool {
	sender, target := netip.AddrFrom4([4]byte(h.ProtocolAddressSender())), netip.AddrFrom4([4]byte(h.ProtocolAddressTarget()))
	// A probe (RFC 5227) has no sender address: it asks whether its target is taken. No address
	// here can collide with it except the sandbox's own.
	if h.Op() != header.ARPRequest || sender.IsUnspecified() || sender == target || l.Onlink.IsGuest(target) ||
		target.IsUnspecified() || target.IsMulticast() || target == onlink.IPv4Broadcast {
		return false
	}
	to := tcpip.LinkAddress(h.HardwareAddressSender())
	v := buffer.NewViewSize(header.ARPSize)
	reply := header.ARP(v.AsSlice())
	reply.SetIPv4OverEthernet()
	reply.SetOp(header.ARPReply)
	copy(reply.HardwareAddressSender(), l.LinkAddress())
	copy(reply.ProtocolAddressSender(), h.ProtocolAddressTarget())
	copy(reply.HardwareAddressTarget(), to)
	copy(reply.ProtocolAddressTarget(), h.ProtocolAddressSender())
	l.sendFrame(v, header.ARPProtocolNumber, to)
	return true
}

// answerSolicitation answers a neighbour solicitation, whose options follow the target, for any
// address but the sandbox's. It reports whether we were to answer it.
func (l *Guard) answerSolicitation(src, target netip.Addr, ns header.NDPNeighborSolicit) bool {
	if src.IsUnspecified() || target.IsMulticast() || target.IsUnspecified() || l.Onlink.IsGuest(target) || src == target {
		return false // without a source it is duplicate address detection
	}
	var to tcpip.LinkAddress
	if it, err := ns.Options().Iter(true); err == nil {
		for {
			o, done, err := it.Next()
			if err != nil || done {
				break
			}
			if a, ok := o.(header.NDPSourceLinkLayerAddressOption); ok {
				to = a.EthernetAddress()
			}
		}
	}
	own := header.NDPTargetLinkLayerAddressOption(l.LinkAddress())
	options := header.NDPOptionsSerializer{own}
	size := header.ICMPv6NeighborAdvertMinimumSize + options.Length()
	v, l4 := packet.Begin(target, src, packet.ProtoICMPv6, packet.Meta{TTL: header.NDPHopLimit}, size)
	l4[0] = uint8(header.ICMPv6NeighborAdvert)
	na := header.NDPNeighborAdvert(header.ICMPv6(l4).MessageBody())
	na.SetTargetAddress(packet.StackAddr(target))
	na.SetSolicitedFlag(true)
	na.SetOverrideFlag(true)
	na.SetRouterFlag(l.Onlink.IsOwn(target))
	na.Options().Serialize(options)
	packet.FinishICMP(target, src, l4)
	l.sendFrame(v, header.IPv6ProtocolNumber, to)
	return true
}

// sendFrame sends to a neighbour a packet that belongs to no flow; to may be empty.
func (l *Guard) sendFrame(v *buffer.View, proto tcpip.NetworkProtocolNumber, to tcpip.LinkAddress) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(l.MaxHeaderLength()),
		Payload:            buffer.MakeWithView(v),
	})
	defer pkt.DecRef()
	pkt.NetworkProtocolNumber = proto
	pkt.EgressRoute.RemoteLinkAddress = to
	l.AddHeader(pkt)
	var list stack.PacketBufferList
	list.PushBack(pkt)
	_, _ = l.WritePackets(list) // a link that is gone ends the forwarder anyway
}
