package datagram

// A published UDP port whose server listens on the sandbox's other family.
//
// Without Sluice a client that asks for localhost is refused by ICMP on one address and tries the
// next. A published port cannot refuse: the host's kernel accepts every datagram. So if the sandbox
// answers one with "port unreachable", the flow moves to the same port of the sandbox's other
// family, and the refused datagram follows if the error quotes all of it. Later flows of the port
// begin at the family that the last one moved to.
//
// A flow moves once, and only before the sandbox has answered on it. If the other family refuses it
// too, it ends, so each datagram from a client causes at most two inside.

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// PassRefusal reports whether pkt, whose data begin with the IP header, was an ICMP error by which
// the sandbox refused a datagram from a published port's client, and has been handled.
func (d *Forwarder) PassRefusal(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) bool {
	transport, refusal := uint8(packet.ProtoICMP), packet.ICMPForms[packet.ICMPPortUnreachable][0]
	if proto == header.IPv6ProtocolNumber {
		transport, refusal = packet.ProtoICMPv6, packet.ICMPForms[packet.ICMPPortUnreachable][1]
	}
	hl, total := packet.PlainPacket(proto, pkt, transport, packet.EchoHeaderLen)
	if total == 0 {
		return false
	}
	b, ok := pkt.Data().PullUp(total)
	if !ok || b[hl] != refusal.Typ || b[hl+1] != refusal.Code {
		return false
	}
	tuple, payload, ok := refused(b[hl+packet.EchoHeaderLen:], transport == packet.ProtoICMP)
	if !ok {
		return false
	}
	fl := d.UDP.Lookup(tuple)
	if fl == nil || !fl.ingress || fl.Sent.Load() != 0 {
		return false
	}
	fl.Sock.port.refused(fl, payload)
	return true
}

// refused reads an ICMP error's quote of a datagram to the sandbox. It returns the tuple that the
// sandbox's answer would have, and the payload, or nil if it is not all there.
func refused(quote []byte, v4 bool) (t nat.Tuple, payload []byte, ok bool) {
	hl := header.IPv6MinimumSize
	if v4 {
		hl = header.IPv4MinimumSize
	}
	if len(quote) < hl+header.UDPMinimumSize {
		return t, nil, false
	}
	var src, dst netip.Addr
	if v4 {
		// Our datagrams have no options.
		if quote[0] != 0x45 || quote[9] != packet.ProtoUDP || binary.BigEndian.Uint16(quote[6:])&0x1fff != 0 {
			return t, nil, false
		}
		src, dst = netip.AddrFrom4([4]byte(quote[12:16])), netip.AddrFrom4([4]byte(quote[16:20]))
	} else {
		if quote[6] != packet.ProtoUDP {
			return t, nil, false
		}
		src, dst = netip.AddrFrom16([16]byte(quote[8:24])), netip.AddrFrom16([16]byte(quote[24:40]))
	}
	u := header.UDP(quote[hl:])
	t = nat.NewTuple(packet.ProtoUDP, netip.AddrPortFrom(dst, u.DestinationPort()), netip.AddrPortFrom(src, u.SourcePort()))
	if n := int(u.Length()); n >= header.UDPMinimumSize && n <= len(u) {
		payload = u[header.UDPMinimumSize:n]
	}
	return t, payload, true
}

// refused handles a flow that the sandbox refused before it answered anything on it.
func (p *publishedUDP) refused(fl *Flow, payload []byte) {
	other, ok := p.otherThan(fl.Guest)
	if !ok {
		return // it stays, so that a client that goes on sending makes no more flows
	}
	p.u.openMu.Lock()
	fl.end(nat.ReasonRefusedBySandbox)
	p.first.CompareAndSwap(p.index(fl.Guest), p.index(other))
	var moved *Flow
	if !fl.moved {
		moved = p.begin(fl.Target, fl.local, other, true)
	}
	p.u.openMu.Unlock()
	if moved == nil || payload == nil {
		return
	}
	size := packet.IPHeaderLen(moved.Guest.Addr()) + packet.UDPHeaderLen + len(payload)
	if !moved.admitDown(size) {
		return
	}
	moved.Lease.Account(moved.inDir(), 1, int64(size))
	p.u.Emit.UDPSegments(moved.Peer, moved.Guest, packet.Meta{TTL: packet.DefaultTTL}, payload, 0)
}

// index is the index of one of the port's inside addresses.
func (p *publishedUDP) index(guest netip.AddrPort) uint32 {
	if guest == p.guests[1] {
		return 1
	}
	return 0
}

// otherThan returns the port's other inside address, or false if there is none.
func (p *publishedUDP) otherThan(guest netip.AddrPort) (netip.AddrPort, bool) {
	o := p.guests[1-p.index(guest)]
	return o, o.IsValid()
}
