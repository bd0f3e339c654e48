package inbound

// ICMP errors of the inbound path. An error belongs to a flow if it quotes a packet of the flow
// that went the other way; nothing else in it is believed. It begins no flow, changes none, and
// keeps none alive.

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// errorFromOutside passes on an error about an answer of the sandbox.
func (o *Path) errorFromOutside(pkt *stack.PacketBuffer, p *datum) packet.Reason {
	quoted, ok := p.quoted(pkt)
	if !ok {
		return o.n.icmpQuote
	}
	// Quoted is the sandbox's packet: the sender of the error got it from the sandbox.
	if quoted.Src().Addr() != p.dst || o.Lookup(quoted.Reverse()) == nil {
		return o.n.icmpUnrelated
	}
	o.n.related.Add(1)
	o.forward(&o.Sandbox, pkt, p)
	return packet.Reason{}
}

// errorFromSandbox passes on an error about a packet from outside, only to the sender of that
// packet.
func (o *Path) errorFromSandbox(pkt *stack.PacketBuffer, p *datum) bool {
	quoted, ok := p.quoted(pkt)
	if !ok || quoted.Src().Addr() != p.dst || quoted.Dst().Addr() != p.src {
		return false
	}
	fl := o.Lookup(quoted)
	if fl == nil {
		return false
	}
	if !admit.AdmitBoth(fl.RuleUp(), &o.Gate.Bandwidth.Up, p.size, o.Gate.Now()) {
		o.n.bandwidth.Add(1)
		return true
	}
	o.n.related.Add(1)
	o.forward(&o.In0, pkt, p)
	return true
}

// quoted reads the tuple of the quoted packet, in that packet's direction. Later fragments have
// none.
func (p *datum) quoted(pkt *stack.PacketBuffer) (nat.Tuple, bool) {
	const icmpHeader = 8
	at := p.l4 + icmpHeader
	if !p.need(pkt, at+header.IPv4MinimumSize) {
		return nat.Tuple{}, false
	}
	var src, dst netip.Addr
	var proto uint8
	if b := p.head[at:]; p.v6 {
		if b[0]>>4 != 6 || !p.need(pkt, at+header.IPv6MinimumSize) {
			return nat.Tuple{}, false
		}
		b = p.head[at:]
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		proto, at = b[6], at+header.IPv6MinimumSize
		if proto == uint8(header.IPv6FragmentExtHdrIdentifier) {
			if !p.need(pkt, at+header.IPv6FragmentHeaderSize) || binary.BigEndian.Uint16(p.head[at+2:])&^7 != 0 {
				return nat.Tuple{}, false
			}
			proto, at = p.head[at], at+header.IPv6FragmentHeaderSize
		}
	} else {
		h := header.IPv4(b)
		hl := int(b[0]&15) * 4
		if b[0]>>4 != 4 || hl < header.IPv4MinimumSize || h.FragmentOffset() != 0 {
			return nat.Tuple{}, false
		}
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		proto, at = h.Protocol(), at+hl
	}
	var sport, dport uint16
	switch proto {
	case packet.ProtoTCP, packet.ProtoUDP, protoUDPLite, protoDCCP, ProtoSCTP:
		if !p.need(pkt, at+4) {
			return nat.Tuple{}, false
		}
		sport, dport = binary.BigEndian.Uint16(p.head[at:]), binary.BigEndian.Uint16(p.head[at+2:])
	case packet.ProtoICMP, packet.ProtoICMPv6:
		if !p.need(pkt, at+6) {
			return nat.Tuple{}, false
		}
		b := p.head[at:]
		if role := icmpRoleOf(p.v6, b[0]); role != icmpIsRequest && role != icmpIsReply {
			return nat.Tuple{}, false // no error is about an error
		}
		sport, dport = binary.BigEndian.Uint16(b[4:]), uint16(b[0])<<8|uint16(b[1])
	}
	return nat.NewTuple(proto, netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)), true
}
