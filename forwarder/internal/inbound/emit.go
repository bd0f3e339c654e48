package inbound

// Sending on the inbound path: packets forwarded unchanged, and the resets and errors that are made
// here.

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/policy"
)

// outlet is a link to send on.
type outlet struct {
	link  stack.LinkEndpoint
	qdisc stack.QueueingDiscipline // nil: the link has none of its own
}

func NewOutlet(l stack.LinkEndpoint) outlet {
	out := outlet{link: l}
	if q, ok := l.(interface {
		QDisc() stack.QueueingDiscipline
	}); ok {
		out.qdisc = q.QDisc() // writes a packet without making a list of it
	}
	return out
}

// prepare turns a packet that came by the other link into one to write on this link. Its data begin
// with the IP header; they are shared, not copied.
func (out *outlet) prepare(pkt *stack.PacketBuffer, p *datum) *stack.PacketBuffer {
	data := pkt.Data()
	data.CapLength(p.size)
	next := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(out.link.MaxHeaderLength()),
		Payload:            data.ToBuffer(),
	})
	if gso := pkt.GSOOptions; gso.NeedsCsum {
		gso.Type = stack.GSOTCPv4 // any type but none: it only marks the packet as GSO
		if p.v6 {
			gso.Type = stack.GSOTCPv6
		}
		next.GSOOptions = gso
	}
	next.TransportProtocolNumber = tcpip.TransportProtocolNumber(p.proto)
	// The device reads the lengths of both headers, and the ports to choose a queue.
	if _, ok := next.NetworkHeader().Consume(p.l4); ok && p.frag != fragLater {
		l4 := headerLenOf(p.proto)
		if p.tcp != nil {
			l4 = len(p.tcp)
		}
		next.TransportHeader().Consume(l4)
	}
	out.address(next, p.v6)
	return next
}

// address adds the link's header to a packet.
func (out *outlet) address(pkt *stack.PacketBuffer, v6 bool) {
	pkt.NetworkProtocolNumber = header.IPv4ProtocolNumber
	if v6 {
		pkt.NetworkProtocolNumber = header.IPv6ProtocolNumber
	}
	out.link.AddHeader(pkt)
}

func (out *outlet) write(pkt *stack.PacketBuffer) bool {
	if out.qdisc != nil {
		return out.qdisc.WritePacket(pkt) == nil
	}
	var list stack.PacketBufferList
	list.PushBack(pkt)
	n, err := out.link.WritePackets(list)
	return err == nil && n == 1
}

// restoreHop restores the hop limit that forwarding by the uplink's kernel decremented. 255 cannot
// have been forwarded, and stays.
func restoreHop(p *datum) {
	if p.v6 {
		if p.head[7] < 255 {
			p.head[7]++
		}
		return
	}
	if p.head[8] == 255 {
		return
	}
	p.head[8]++
	// RFC 1624: the header's sum has grown by 0x0100, so its complement shrinks by it.
	sum := uint32(binary.BigEndian.Uint16(p.head[10:])) + 0xfeff
	binary.BigEndian.PutUint16(p.head[10:], uint16(sum+sum>>16))
}

// refuse records a refusal and answers as the verdict says.
func (o *Path) refuse(j admit.Judged, pkt *stack.PacketBuffer, p *datum) {
	o.n.refused.DropArrived(pkt)
	told := j.Verdict.Action() == policy.Reject
	o.Gate.Refuse(j, told)
	if !told {
		return
	}
	if p.tcp != nil {
		o.refuseTCP(p)
		return
	}
	kind := packet.ICMPAdminProhibited
	if p.proto == packet.ProtoUDP {
		kind = packet.ICMPPortUnreachable
	}
	o.sendError(kind, pkt, p)
}

// refuseTCP resets a connection request, as in RFC 9293 section 3.10.7.1.
func (o *Path) refuseTCP(p *datum) {
	flags := p.tcp.Flags()
	if flags&header.TCPFlagRst != 0 || !o.mayReply() {
		return
	}
	pod, far := netip.AddrPortFrom(p.dst, p.dport), netip.AddrPortFrom(p.src, p.sport)
	if flags&header.TCPFlagAck != 0 {
		o.sendTCP(&o.In0, pod, far, p.tcp.AckNumber(), 0, header.TCPFlagRst)
		return
	}
	end := p.tcp.SequenceNumber() + uint32(p.size-p.l4-len(p.tcp)) + 1 // the SYN
	o.sendTCP(&o.In0, pod, far, 0, end, header.TCPFlagRst|header.TCPFlagAck)
}

// mayReply bounds the packets that strangers can make us send.
func (o *Path) mayReply() bool {
	if !o.replies.Take(o.Gate.Now()) {
		o.n.limited.Add(1)
		return false
	}
	o.n.rejected.Add(1)
	return true
}

// sendError tells the outside that the sandbox's address refuses the packet.
func (o *Path) sendError(kind packet.ErrorKind, pkt *stack.PacketBuffer, p *datum) {
	form, limit, proto := packet.ICMPForms[kind][packet.FamilyIndex(p.dst)], packet.ICMPQuoteIPv4, uint8(packet.ProtoICMP)
	if p.v6 {
		limit, proto = packet.ICMPQuoteIPv6, packet.ProtoICMPv6
	}
	n := min(p.size, limit)
	if !p.need(pkt, n) {
		return
	}
	if _, ok := packet.ErrorRecipient(p.head[:n]); !ok || !o.mayReply() {
		return
	}
	v, l4 := packet.Begin(p.dst, p.src, proto, packet.Meta{TTL: madeTTL}, header.ICMPv4MinimumSize+n)
	l4[0], l4[1] = form.Typ, form.Code
	clear(l4[2:8])
	copy(l4[8:], p.head[:n])
	packet.FinishICMP(p.dst, p.src, l4)
	o.send(&o.In0, v, p.v6)
}

// madeTTL is the hop limit of packets made here, which lose one in the uplink.
const madeTTL = packet.DefaultTTL + 1

// sendReset sends to one side of a connection, in the other's name, the reset of
// sequence number seq, acknowledging ack.
func (o *Path) sendReset(to *outlet, from, dst netip.AddrPort, seq, ack uint32) {
	o.sendTCP(to, from, dst, seq, ack, header.TCPFlagRst|header.TCPFlagAck)
}

func (o *Path) sendTCP(to *outlet, from, dst netip.AddrPort, seq, ack uint32, flags header.TCPFlags) {
	v, l4 := packet.Begin(from.Addr(), dst.Addr(), packet.ProtoTCP, packet.Meta{TTL: madeTTL}, header.TCPMinimumSize)
	t := header.TCP(l4)
	t.Encode(&header.TCPFields{SrcPort: from.Port(), DstPort: dst.Port(), SeqNum: seq, AckNum: ack, DataOffset: header.TCPMinimumSize, Flags: flags})
	t.SetChecksum(^checksum.Checksum(l4, packet.PseudoSum(from.Addr(), dst.Addr(), packet.ProtoTCP, len(l4))))
	o.send(to, v, dst.Addr().Is6())
}

// send sends a packet made by begin.
func (o *Path) send(to *outlet, v *buffer.View, v6 bool) {
	if !v6 {
		h := header.IPv4(v.AsSlice())
		h.SetChecksum(^h.CalculateChecksum())
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(to.link.MaxHeaderLength()),
		Payload:            buffer.MakeWithView(v),
	})
	defer pkt.DecRef()
	to.address(pkt, v6)
	if !to.write(pkt) {
		o.n.writeFailed.Add(1)
	}
}
