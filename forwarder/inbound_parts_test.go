package forwarder

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/forwarder/internal/inbound"
	"sluice.dev/sluice/forwarder/internal/packet"
)

// icmpError returns an error about a packet, from any sender. It quotes the shortest part that is
// allowed, or everything if all is set.
func icmpError(from, to netip.Addr, typ, code uint8, about ipPacket, all bool) ipPacket {
	quoted := about.bytes()
	if n := packet.IPHeaderLen(about.dst) + 8; !all && n < len(quoted) {
		quoted = quoted[:n]
	}
	p := ipPacket{src: from, dst: to, proto: packet.ProtoICMP, l4: append([]byte{typ, code, 0, 0, 0, 0, 0, 0}, quoted...)}
	if to.Is6() {
		p.proto = packet.ProtoICMPv6
	}
	packet.FinishICMP(from, to, p.l4)
	return p
}

func TestInboundICMPErrorsFollowTheirFlows(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		w := newPodWire(t, allowAll, nil)
		client, server, router := at(far, 40000), at(pod, 80), netip.MustParseAddr("198.51.100.1")
		tooBig, unreachable, exceeded := [2]uint8{3, 4}, [2]uint8{3, 3}, [2]uint8{11, 0}
		if pod.Is6() {
			router = netip.MustParseAddr("2001:db8:1::1")
			tooBig, unreachable, exceeded = [2]uint8{2, 0}, [2]uint8{1, 4}, [2]uint8{3, 0}
		}
		w.connect(client, server)
		arrives(t, w.out, w.wire, udpPacket(client, server, []byte("x")))
		arrives(t, w.out, w.wire, echoPacket(far, pod, 9, 1, nil))

		answer := dataSegment(server, client, header.TCPFlagAck, 5001, 1001, pattern(1400))
		for _, all := range []bool{false, true} {
			arrives(t, w.out, w.wire, icmpError(router, pod, tooBig[0], tooBig[1], answer, all))
		}
		arrives(t, w.out, w.wire, icmpError(router, pod, exceeded[0], exceeded[1], answerOf(echoPacket(pod, far, 9, 1, nil)), true))
		arrives(t, w.wire, w.out, icmpError(pod, far, unreachable[0], unreachable[1], udpPacket(client, server, []byte("x")), true))
		if n := w.f.Stats()["inbound_icmp_related"]; n != 4 {
			t.Errorf("%d errors were related", n)
		}

		for name, p := range map[string]ipPacket{
			"about a packet the pod never sent": icmpError(router, pod, tooBig[0], tooBig[1], segment(server, at(far, 40001), header.TCPFlagAck, 1, 1), true),
			"about the client's own packet":     icmpError(router, pod, tooBig[0], tooBig[1], segment(client, server, header.TCPFlagAck, 1, 1), true),
		} {
			t.Run(name, func(t *testing.T) {
				w.t = t
				w.stays(w.out, p, "inbound_icmp_unrelated")
			})
		}
		w.t = t
		short := icmpError(router, pod, tooBig[0], tooBig[1], answer, false)
		short.l4 = short.l4[:20]
		packet.FinishICMP(short.src, short.dst, short.l4)
		w.stays(w.out, short, "inbound_icmp_quote")
		inError := icmpError(router, pod, tooBig[0], tooBig[1], icmpError(pod, far, unreachable[0], unreachable[1], answer, false), true)
		w.stays(w.out, inError, "inbound_icmp_quote")

		for name, p := range map[string]ipPacket{
			"an error of the sandbox to a third party": icmpError(pod, router, unreachable[0], unreachable[1], udpPacket(client, server, []byte("x")), true),
			"about what nobody sent":                   icmpError(pod, far, unreachable[0], unreachable[1], udpPacket(at(far, 1), server, []byte("x")), true),
			"in another's name":                        icmpError(router, far, unreachable[0], unreachable[1], udpPacket(client, server, []byte("x")), true),
			"about its own packet":                     icmpError(pod, far, unreachable[0], unreachable[1], udpPacket(server, client, []byte("x")), true),
		} {
			w.send(p)
			if _, ok := w.out.tryRecv(2 * time.Millisecond); ok {
				t.Errorf("%s left", name)
			}
		}
	})
}

func TestInboundFragmentsFollowTheFirst(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		w := newPodWire(t, strings.Replace(onlyHTTP, "%s", "drop", 1), nil)
		client, server := at(far, 40000), at(pod, 80)
		for _, way := range []struct {
			from, to *wire
			p        ipPacket
		}{
			{w.out, w.wire, udpPacket(client, server, pattern(4000))},
			{w.wire, w.out, udpPacket(server, client, pattern(5000))},
		} {
			way.p.id = 77
			way.from.sendFragments(way.p, 1400)
			if got := way.to.recv(); got.src != way.p.src || string(got.l4) != string(way.p.l4) {
				t.Errorf("%d bytes arrived from %s", len(got.l4), got.src)
			}
		}
		if f := w.flow(); f.OrigPackets != 3 || f.ReplyPackets != 4 {
			t.Errorf("%d and %d packets were counted", f.OrigPackets, f.ReplyPackets)
		}
		denied := udpPacket(client, at(pod, 81), pattern(4000))
		denied.id = 78
		w.out.sendFragments(denied, 1400)
		w.silent("fragments of a packet that is denied")
		if s := w.f.Stats(); s["inbound_refused"] != 1 || s["inbound_fragment"] != 2 {
			t.Errorf("counters: %v", w.counters())
		}
	})
}

// fragment4 returns one IPv4 fragment.
func fragment4(p ipPacket, off int, more bool) []byte {
	b := p.bytes()
	h := header.IPv4(b)
	flags := uint8(0)
	if more {
		flags = header.IPv4FlagMoreFragments
	}
	h.SetFlagsFragmentOffset(flags, uint16(off))
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	return b
}

func TestHostileFragments(t *testing.T) {
	clock := newTestClock()
	w := newPodWire(t, allowAll, func(c *Config) { c.Now = clock.now })
	w.connect(at(client4, 40000), at(guest4, 80))
	data := dataSegment(at(client4, 40000), at(guest4, 80), header.TCPFlagAck, 1001, 5001, pattern(100))
	part := func(id uint16, l4 []byte) ipPacket {
		p := data
		p.id, p.l4 = id, l4
		return p
	}
	drop := func(what string, b []byte, reason string) {
		t.Helper()
		before := w.f.Stats()[reason]
		w.out.sendBytes(b, 0)
		if pkt := w.ep.Read(); pkt != nil {
			t.Errorf("%s arrived", what)
			pkt.DecRef()
		}
		if n := w.f.Stats()[reason] - before; n != 1 {
			t.Errorf("%s: %s was counted %d times; counters: %v", what, reason, n, w.counters())
		}
	}
	pass := func(what string, b []byte) {
		t.Helper()
		w.out.sendBytes(b, 0)
		pkt := w.ep.Read()
		if pkt == nil {
			t.Fatalf("%s did not arrive; counters: %v", what, w.counters())
		}
		pkt.DecRef()
	}
	drop("half of a TCP header", fragment4(part(1, data.l4[:16]), 0, true), "inbound_fragment_short")
	drop("what would follow it", fragment4(part(1, data.l4[16:]), 16, false), "inbound_fragment")
	pass("a first fragment", fragment4(part(2, data.l4[:48]), 0, true))
	drop("a fragment over the TCP header", fragment4(part(2, data.l4[8:]), 8, false), "inbound_fragment")
	pass("an honest one", fragment4(part(2, data.l4[48:]), 48, false))
	drop("one of another packet", fragment4(part(3, data.l4[48:]), 48, false), "inbound_fragment")
	clock.advance(inbound.FragTimeout + time.Second)
	drop("one that comes too late", fragment4(part(2, data.l4[48:]), 48, false), "inbound_fragment")

	pass("another first fragment", fragment4(part(4, data.l4[:48]), 0, true))
	w.sendBytes(fragment4(part(4, data.l4[48:]), 48, false), 0)
	w.out.silent("what the sandbox says in the client's name")
	for id := range 3 * inbound.MaxFragmented {
		pass("one of many first fragments", fragment4(part(uint16(id), data.l4[:48]), 0, true))
	}
	f := &w.f.outside.Frags
	if len(f.Entries) != inbound.MaxFragmented || len(f.Ring) != inbound.MaxFragmented {
		t.Errorf("%d packets are remembered, %d in the ring", len(f.Entries), len(f.Ring))
	}
	pass("the rest of the newest", fragment4(part(3*inbound.MaxFragmented-1, data.l4[48:]), 48, false))
	drop("the rest of one of the oldest", fragment4(part(3*inbound.MaxFragmented-1-inbound.MaxFragmented, data.l4[48:]), 48, false), "inbound_fragment")
}

func TestPodsAskForNeighbours(t *testing.T) {
	w := newPodWire(t, allowAll, nil)
	mac := [6]byte{2, 0, 0, 0, 0, 2}
	for _, test := range []struct {
		name           string
		sender, target string
		answered       bool
	}{
		{"a neighbour on the pod's prefix", "10.0.2.100", "10.0.2.7", true},
		{"the gateway", "10.0.2.100", "10.0.2.2", true},
		{"anything", "10.0.2.101", "8.8.8.8", true},
		{"its own address", "10.0.2.100", "10.0.2.100", false},
		{"its other address", "10.0.2.100", "10.0.2.101", false},
		{"a probe for its own address", "0.0.0.0", "10.0.2.100", false},
		{"a probe for another", "0.0.0.0", "10.0.2.102", false},
		{"a group", "10.0.2.100", "224.0.0.1", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := make([]byte, header.ARPSize)
			h := header.ARP(b)
			h.SetIPv4OverEthernet()
			h.SetOp(header.ARPRequest)
			sender, target := netip.MustParseAddr(test.sender).As4(), netip.MustParseAddr(test.target).As4()
			copy(h.HardwareAddressSender(), "\x02\x00\x00\x00\x00\x01")
			copy(h.ProtocolAddressSender(), sender[:])
			copy(h.ProtocolAddressTarget(), target[:])
			w.injectARP(b)
			pkt := w.ep.Read()
			if (pkt != nil) != test.answered {
				t.Fatalf("answered: %v", pkt != nil)
			}
			if pkt == nil {
				return
			}
			defer pkt.DecRef()
			r := header.ARP(pkt.ToView().AsSlice())
			if !r.IsValid() || r.Op() != header.ARPReply || [6]byte(r.HardwareAddressSender()) != mac || [4]byte(r.ProtocolAddressSender()) != target ||
				[4]byte(r.ProtocolAddressTarget()) != sender || pkt.NetworkProtocolNumber != header.ARPProtocolNumber {
				t.Errorf("answered by % x", []byte(r))
			}
		})
	}
	local := netip.MustParseAddr("fe80::1234")
	for _, test := range []struct {
		name        string
		src, target netip.Addr
		hop         uint8
		answered    bool
	}{
		{"a neighbour on the pod's prefix", guest6, netip.MustParseAddr("fd00::7"), 255, true},
		{"the gateway, from the pod's link-local address", local, gateway6, 255, true},
		{"another link-local address", local, netip.MustParseAddr("fe80::9"), 255, true},
		{"its own address", local, guest6, 255, false},
		{"duplicate address detection", netip.IPv6Unspecified(), netip.MustParseAddr("fd00::7"), 255, false},
		{"duplicate address detection of a link-local address", netip.IPv6Unspecified(), local, 255, false},
		{"from beyond the link", guest6, netip.MustParseAddr("fd00::7"), 64, false},
	} {
		t.Run("IPv6: "+test.name, func(t *testing.T) {
			w.send(solicitation(test.src, test.target, test.hop))
			p, ok := w.tryRecv(2 * time.Millisecond)
			if ok != test.answered {
				t.Fatalf("answered: %v", ok)
			}
			if !ok {
				return
			}
			m := header.ICMPv6(p.l4)
			na := header.NDPNeighborAdvert(m.MessageBody())
			option := m[header.ICMPv6NeighborAdvertMinimumSize:]
			if m.Type() != header.ICMPv6NeighborAdvert || p.src != test.target || p.dst != test.src || p.ttl != 255 || !na.SolicitedFlag() ||
				packet.NetipAddr(na.TargetAddress()) != test.target || na.RouterFlag() != (test.target == gateway6) ||
				len(option) != 8 || option[0] != 2 || [6]byte(option[2:]) != mac {
				t.Errorf("answered by % x from %s", p.l4, p.src)
			}
		})
	}
}

// solicitation returns a neighbour solicitation, sent to the group of its target.
func solicitation(src, target netip.Addr, hop uint8) ipPacket {
	dst := packet.NetipAddr(header.SolicitedNodeAddr(packet.StackAddr(target)))
	b := make([]byte, header.ICMPv6NeighborSolicitMinimumSize)
	b[0] = uint8(header.ICMPv6NeighborSolicit)
	header.NDPNeighborSolicit(header.ICMPv6(b).MessageBody()).SetTargetAddress(packet.StackAddr(target))
	packet.FinishICMP(src, dst, b)
	return ipPacket{src: src, dst: dst, proto: packet.ProtoICMPv6, ttl: hop, l4: b}
}
