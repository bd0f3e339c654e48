package forwarder

import (
	"net/netip"
	"slices"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// FuzzInbound sends arbitrary bytes to either link of a pod, as they are and with the headers' sums
// mended. The pod lets one port be reached and reaches nothing itself. Nothing may panic. Packets
// that come out inside must be for the pod, those that come out outside must be from it, and only
// flows to that port may begin.
func FuzzInbound(f *testing.F) {
	const one = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: fuzz}
spec:
  defaultAction: reject
  ingress:
  - {name: one, action: allow, ports: [{protocol: TCP, port: 80}, {protocol: UDP, port: 80}]}
`
	const maxFlows = 64
	w := newPodWire(f, one, func(c *Config) { c.Table = nat.NewTable(nat.Config{Limits: nat.Limits{Max: maxFlows}}) })
	client, server := at(client4, 40000), at(guest4, 80)
	w.connect(client, server)
	w.connect(at(client6, 40000), at(guest6, 80))
	tooBig := segment(server, client, header.TCPFlagAck, 1, 1)
	for _, seed := range []ipPacket{
		segment(client, server, header.TCPFlagSyn, 1, 0),
		dataSegment(client, server, header.TCPFlagAck|header.TCPFlagFin, 1001, 5001, []byte("data")),
		segment(client, at(guest4, 81), header.TCPFlagSyn, 1, 0),
		udpPacket(client, server, []byte("data")),
		udpPacket(at(client6, 1), at(guest6, 80), []byte("data")),
		echoPacket(client4, guest4, 1, 1, nil),
		icmpError(client4, guest4, 3, 4, tooBig, true),
		icmpError(client6, guest6, 2, 0, segment(at(guest6, 80), at(client6, 40000), header.TCPFlagAck, 1, 1), true),
		{src: client6, dst: guest6, proto: 44, l4: []byte{17, 0, 0, 1, 0, 0, 0, 9, 1, 2, 0, 80, 0, 9, 0, 0, 1}},
		{src: client6, dst: guest6, proto: 0, l4: []byte{6, 0, 1, 4, 0, 0, 0, 0}},
	} {
		f.Add(seed.bytes(), true, true)
		seed.src, seed.dst = seed.dst, seed.src
		f.Add(seed.bytes(), true, false)
	}
	f.Add(fragment4(udpPacket(client, server, pattern(64)), 0, true), true, true)
	f.Add(fragment4(udpPacket(client, server, pattern(64)), 32, false), true, true)
	f.Add([]byte{0x45}, false, true)
	f.Add([]byte{0x60, 0, 0, 0}, false, false)

	f.Fuzz(func(t *testing.T, b []byte, mend, fromOutside bool) {
		if len(b) == 0 || len(b) > 65535 {
			return
		}
		b = slices.Clone(b)
		if mend {
			mendInbound(b, fromOutside)
		}
		proto := header.IPv4ProtocolNumber
		if b[0]>>4 == 6 {
			proto = header.IPv6ProtocolNumber
		}
		from, to := w.out, w.wire
		if !fromOutside {
			from, to = w.wire, w.out
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
		from.ep.InjectInbound(proto, pkt)
		pkt.DecRef()
		for _, side := range []*wire{to, from} {
			for out := side.ep.Read(); out != nil; out = side.ep.Read() {
				checkSide(t, out, side == w.wire, mend)
				out.DecRef()
			}
		}
		for _, l := range w.table.Leases() {
			if to := l.Orig().Dst(); to.Port() != 80 || !w.f.onlink.IsGuest(to.Addr()) {
				t.Errorf("there is a flow %v", l.Orig())
			}
		}
		if n, m := w.table.Len(), int(w.f.outside.Count.Load()); n > maxFlows || m > maxFlows {
			t.Errorf("%d flows, %d inbound ones", n, m)
		}
	})
}

// mendInbound gives a packet the pod's address and valid sums.
func mendInbound(b []byte, fromOutside bool) {
	switch {
	case b[0]>>4 == 4 && len(b) >= header.IPv4MinimumSize:
		at, a := 12, guest4.As4()
		if fromOutside {
			at = 16
		}
		copy(b[at:], a[:])
		h := header.IPv4(b)
		h.SetTotalLength(uint16(len(b)))
		if int(b[0]&15)*4 <= len(b) && b[0]&15 >= 5 {
			h.SetChecksum(0)
			h.SetChecksum(^h.CalculateChecksum())
		}
	case b[0]>>4 == 6 && len(b) >= header.IPv6MinimumSize:
		at, a := 8, guest6.As16()
		if fromOutside {
			at = 24
		}
		copy(b[at:], a[:])
		header.IPv6(b).SetPayloadLength(uint16(len(b) - header.IPv6MinimumSize))
	}
}

// checkSide checks that a packet came out on the right side. (The device drops IPv4 packets whose
// header sum is wrong; no sum may become wrong here.)
func checkSide(t *testing.T, pkt *stack.PacketBuffer, inside, mended bool) {
	t.Helper()
	v := pkt.ToView()
	defer v.Release()
	b := v.AsSlice()
	var src, dst netip.Addr
	switch {
	case pkt.NetworkProtocolNumber == header.ARPProtocolNumber:
		return
	case len(b) >= header.IPv4MinimumSize && b[0]>>4 == 4:
		h := header.IPv4(b)
		src, dst = packet.NetipAddr(h.SourceAddress()), packet.NetipAddr(h.DestinationAddress())
		if mended && !h.IsChecksumValid() || int(h.TotalLength()) != len(b) {
			t.Errorf("an IPv4 header came out with length %d of %d, sum valid: %v", h.TotalLength(), len(b), h.IsChecksumValid())
		}
	case len(b) >= header.IPv6MinimumSize && b[0]>>4 == 6:
		h := header.IPv6(b)
		src, dst = packet.NetipAddr(h.SourceAddress()), packet.NetipAddr(h.DestinationAddress())
	default:
		t.Fatalf("what came out is no packet: % x", b)
	}
	own := dst
	if !inside {
		own = src
	}
	// Neighbours also ask and answer with their link-local addresses.
	if !slices.Contains([]bool{slices.Contains([]string{guest4.String(), also4.String(), guest6.String()}, own.String()), inside && own.IsLinkLocalUnicast()}, true) {
		t.Errorf("a packet from %s to %s came out, inside: %v", src, dst, inside)
	}
}
