package forwarder

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/inbound"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

func bothFamilies(t *testing.T, f func(t *testing.T, pod, far netip.Addr)) {
	t.Run("IPv4", func(t *testing.T) { f(t, guest4, client4) })
	t.Run("IPv6", func(t *testing.T) { f(t, guest6, client6) })
}

func TestInboundConnectionPassesAndIsTracked(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		w := newPodWire(t, allowAll, nil)
		client, server := at(far, 40000), at(pod, 80)
		w.connect(client, server)
		f := w.flow()
		if f.State != nat.Established || !f.Ingress || !f.Assured || f.Orig != nat.NewTuple(packet.ProtoTCP, client, server) || f.Rule != "ingress[0] published" {
			t.Errorf("the flow is %+v", f)
		}
		data := pattern(900)
		arrives(t, w.out, w.wire, dataSegment(client, server, header.TCPFlagAck|header.TCPFlagPsh, 1001, 5001, data))
		arrives(t, w.wire, w.out, dataSegment(server, client, header.TCPFlagAck, 5001, 1901, data))
		arrives(t, w.wire, w.out, segment(server, client, header.TCPFlagAck|header.TCPFlagFin, 5901, 1901))
		arrives(t, w.out, w.wire, segment(client, server, header.TCPFlagAck|header.TCPFlagFin, 1901, 5902))
		arrives(t, w.wire, w.out, segment(server, client, header.TCPFlagAck, 5902, 1902))
		if f := w.flow(); f.State != nat.TimeWait || f.OrigPackets != 4 || f.ReplyPackets != 4 ||
			f.OrigBytes != int64(4*(packet.IPHeaderLen(pod)+20)+900) {
			t.Errorf("the flow is %+v", f)
		}
	})
}

func TestInboundDatagramsAndEchoPass(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		w := newPodWire(t, allowAll, nil)
		client, server := at(far, 40000), at(pod, 5000)
		arrives(t, w.out, w.wire, udpPacket(client, server, []byte("question")))
		if f := w.flow(); f.SeenReply {
			t.Errorf("answered before it was: %+v", f)
		}
		arrives(t, w.wire, w.out, udpPacket(server, client, []byte("answer")))
		if f := w.flow(); !f.SeenReply || f.State != nat.Replied {
			t.Errorf("the flow is %+v", f)
		}
		arrives(t, w.out, w.wire, echoPacket(far, pod, 7, 1, []byte("ping")))
		arrives(t, w.wire, w.out, answerOf(echoPacket(pod, far, 7, 1, []byte("ping"))))
		w.wantFlows(2)
	})
}

// answerOf makes an echo reply of a request that goes the same way.
func answerOf(p ipPacket) ipPacket {
	if p.dst.Is4() {
		p.l4[0] = packet.EchoReply4
	} else {
		p.l4[0] = packet.EchoReply6
	}
	packet.FinishICMP(p.src, p.dst, p.l4)
	return p
}

func TestInboundToEveryAddressOfThePod(t *testing.T) {
	w := newPodWire(t, allowAll, nil)
	w.connect(at(client4, 1), at(guest4, 80))
	w.connect(at(client4, 1), at(also4, 80))
	w.wantFlows(2)
}

func TestInboundOtherProtocolsPass(t *testing.T) {
	w := newPodWire(t, allowAll, nil)
	sctp := make([]byte, 16)
	binary.BigEndian.PutUint16(sctp, 1000)
	binary.BigEndian.PutUint16(sctp[2:], 2000)
	answer := append([]byte{}, sctp...)
	binary.BigEndian.PutUint16(answer, 2000)
	binary.BigEndian.PutUint16(answer[2:], 1000)
	const esp = 50
	for _, p := range [][2]ipPacket{
		{{src: client4, dst: guest4, proto: inbound.ProtoSCTP, l4: sctp}, {src: guest4, dst: client4, proto: inbound.ProtoSCTP, l4: answer}},
		{{src: client4, dst: guest4, proto: esp, l4: pattern(40)}, {src: guest4, dst: client4, proto: esp, l4: pattern(50)}},
	} {
		// We cannot know their checksums.
		w.out.sendBytes(p[0].bytes(), 0)
		if pkt := w.ep.Read(); pkt == nil {
			t.Errorf("protocol %d did not arrive; %v", p[0].proto, w.counters())
		} else {
			pkt.DecRef()
		}
		w.sendBytes(p[1].bytes(), 0)
		if pkt := w.out.ep.Read(); pkt == nil {
			t.Errorf("the answer of protocol %d did not arrive; %v", p[0].proto, w.counters())
		} else {
			pkt.DecRef()
		}
	}
	w.wantFlows(2)
}

func TestInboundRefusals(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		client := at(far, 40000)
		syn := segment(client, at(pod, 81), header.TCPFlagSyn, 1000, 0)
		data := segment(client, at(pod, 81), header.TCPFlagAck, 1000, 77)
		datagram := udpPacket(client, at(pod, 81), []byte("x"))
		ping := echoPacket(far, pod, 1, 1, nil)
		t.Run("drop is silence", func(t *testing.T) {
			w := newPodWire(t, fmt.Sprintf(onlyHTTP, "drop"), nil)
			for _, p := range []ipPacket{syn, data, datagram, ping} {
				w.stays(w.out, p, "inbound_refused")
			}
			w.connect(client, at(pod, 80))
			w.wantFlows(1)
		})
		t.Run("reject is an answer", func(t *testing.T) {
			w := newPodWire(t, fmt.Sprintf(onlyHTTP, "reject"), nil)
			w.out.send(syn)
			p := w.out.recv()
			if h := header.TCP(p.l4); h.Flags() != header.TCPFlagRst|header.TCPFlagAck || h.AckNumber() != 1001 || h.SequenceNumber() != 0 ||
				p.src != pod || p.dst != far || h.SourcePort() != 81 || h.DestinationPort() != 40000 || p.ttl != 65 {
				t.Errorf("a SYN is answered by %v, ack %d, from %s", h.Flags(), h.AckNumber(), p.src)
			}
			w.out.send(data)
			if h := header.TCP(w.out.recv().l4); h.Flags() != header.TCPFlagRst || h.SequenceNumber() != 77 {
				t.Errorf("data is answered by %v, seq %d", h.Flags(), h.SequenceNumber())
			}
			w.out.send(segment(client, at(pod, 81), header.TCPFlagRst, 1, 0))
			w.out.silent("the answer to a reset")
			unreachable, prohibited := [2]uint8{3, 3}, [2]uint8{3, 13}
			if pod.Is6() {
				unreachable, prohibited = [2]uint8{1, 4}, [2]uint8{1, 1}
			}
			w.out.send(datagram)
			_, quoted := w.out.wantError("a datagram", unreachable[0], unreachable[1], pod)
			if want := datagram.bytes(); string(quoted) != string(want) {
				t.Errorf("it quotes %x, want %x", quoted, want)
			}
			w.out.send(ping)
			w.out.wantError("a ping", prohibited[0], prohibited[1], pod)
			w.silent("inside")
			w.wantFlows(0)
		})
	})
}

func TestInboundRefusalsAreLimitedInRate(t *testing.T) {
	w := newPodWire(t, fmt.Sprintf(onlyHTTP, "reject"), func(c *Config) {
		c.Now = newTestClock().now // which stands still
	})
	for i := range packet.ICMPErrorsBurst + 50 {
		w.out.send(segment(at(client4, uint16(i+1)), at(guest4, 81), header.TCPFlagSyn, 1, 0))
	}
	n := 0
	for ; ; n++ {
		if _, ok := w.out.tryRecv(time.Millisecond); !ok {
			break
		}
	}
	if s := w.f.Stats(); n != packet.ICMPErrorsBurst || s["inbound_rejected"] != packet.ICMPErrorsBurst || s["inbound_rejected_limited"] != 50 {
		t.Errorf("%d answers; counters: %v", n, w.counters())
	}
}

// What the sandbox sends takes the stack's way if it is not an answer.
func TestOnlyAnswersLeaveAsPackets(t *testing.T) {
	w := newPodWire(t, fmt.Sprintf(onlyHTTP, "reject"), nil)
	w.connect(at(client4, 40000), at(guest4, 80))
	for name, p := range map[string]ipPacket{
		"another port of the client":  segment(at(guest4, 80), at(client4, 40001), header.TCPFlagAck, 1, 1),
		"another client":              segment(at(guest4, 80), at(netip.MustParseAddr("192.0.2.78"), 40000), header.TCPFlagAck, 1, 1),
		"another port of the sandbox": segment(at(guest4, 81), at(client4, 40000), header.TCPFlagAck, 1, 1),
		"another address of it":       segment(at(also4, 80), at(client4, 40000), header.TCPFlagAck, 1, 1),
		"another protocol":            udpPacket(at(guest4, 80), at(client4, 40000), nil),
		"a forged source":             segment(at(netip.MustParseAddr("10.0.2.99"), 80), at(client4, 40000), header.TCPFlagAck, 1, 1),
		"a ping":                      echoPacket(guest4, client4, 1, 1, nil),
		"an answer to no ping":        answerOf(echoPacket(guest4, client4, 1, 1, nil)),
	} {
		w.send(p)
		if got, ok := w.out.tryRecv(2 * time.Millisecond); ok {
			t.Errorf("%s left as protocol %d to %s", name, got.proto, got.dst)
		}
	}
	for {
		if _, ok := w.tryRecv(10 * time.Millisecond); !ok {
			break // a matter for policy
		}
	}
	arrives(t, w.wire, w.out, segment(at(guest4, 80), at(client4, 40000), header.TCPFlagAck, 5001, 1001))
}

func TestInboundForgeriesAreDropped(t *testing.T) {
	w := newPodWire(t, allowAll, nil)
	pod := at(guest4, 80)
	syn := func(src, dst netip.AddrPort) ipPacket { return segment(src, dst, header.TCPFlagSyn, 1, 0) }
	for _, test := range []struct {
		name, reason string
		p            ipPacket
	}{
		{"to an address that is not the pod's", "inbound_foreign_destination", syn(at(client4, 1), at(client4, 2))},
		{"to our gateway", "inbound_foreign_destination", syn(at(client4, 1), at(gateway4, 80))},
		{"from the pod to itself", "inbound_martian_source", syn(pod, pod)},
		{"from the pod's other address", "inbound_martian_source", syn(at(also4, 9), pod)},
		{"from our gateway", "inbound_martian_source", syn(at(gateway4, 9), pod)},
		{"from the loopback", "inbound_martian_source", syn(at(netip.MustParseAddr("127.0.0.1"), 9), pod)},
		{"from a group", "inbound_martian_source", syn(at(netip.MustParseAddr("224.0.0.1"), 9), pod)},
		{"from nobody", "inbound_martian_source", syn(at(netip.MustParseAddr("0.0.0.0"), 9), pod)},
		{"from a 4-in-6 address", "inbound_martian_source", udp6Packet(netip.MustParseAddr("::ffff:192.0.2.1"))},
		{"no flags", "inbound_tcp_flags", segment(at(client4, 1), pod, 0, 1, 0)},
		{"SYN and FIN", "inbound_tcp_flags", segment(at(client4, 1), pod, header.TCPFlagSyn|header.TCPFlagFin, 1, 0)},
		{"SYN and RST", "inbound_tcp_flags", segment(at(client4, 1), pod, header.TCPFlagSyn|header.TCPFlagRst, 1, 0)},
		{"FIN alone", "inbound_tcp_flags", segment(at(client4, 1), pod, header.TCPFlagFin, 1, 0)},
		{"an answer to no ping", "inbound_icmp_type", answerOf(echoPacket(client4, guest4, 1, 1, nil))},
		{"a redirect", "inbound_icmp_type", ipPacket{src: client4, dst: guest4, proto: packet.ProtoICMP, l4: append([]byte{5, 1, 0, 0, 0, 0, 0, 0}, pattern(28)...)}},
		{"a router advertisement", "inbound_icmp_type", ipPacket{src: client6, dst: guest6, proto: packet.ProtoICMPv6, l4: append([]byte{134, 0, 0, 0}, pattern(12)...)}},
		{"ICMPv6 in IPv4", "inbound_protocol", ipPacket{src: client4, dst: guest4, proto: packet.ProtoICMPv6, l4: []byte{128, 0, 0, 0, 0, 0, 0, 0}}},
		{"half a TCP header", "inbound_short_packet", ipPacket{src: client4, dst: guest4, proto: packet.ProtoTCP, l4: pattern(12)}},
		{"options beyond the end", "inbound_length", func() ipPacket {
			p := syn(at(client4, 1), pod)
			p.l4[12] = 0xf0
			return p
		}()},
		{"half a UDP header", "inbound_short_packet", ipPacket{src: client4, dst: guest4, proto: packet.ProtoUDP, l4: pattern(7)}},
		{"an extension header without end", "inbound_headers", ipPacket{src: client6, dst: guest6, proto: 60, l4: []byte{17, 255, 0, 0, 0, 0, 0, 0, 0, 0}}},
		{"nothing but extension headers", "inbound_headers", ipPacket{src: client6, dst: guest6, proto: 60, l4: manyOptions(inbound.MaxExtHeaders + 1)}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w.t = t
			w.stays(w.out, test.p, test.reason)
			w.wantFlows(0)
		})
	}
}

func udp6Packet(src netip.Addr) ipPacket {
	p := udpPacket(at(client6, 1), at(guest6, 2), nil)
	p.src = src
	return p
}

// manyOptions returns a row of empty destination options headers.
func manyOptions(n int) []byte {
	var b []byte
	for range n {
		b = append(b, 60, 0, 1, 4, 0, 0, 0, 0)
	}
	return append(b, pattern(40)...)
}

func TestInboundExtensionHeadersAreFollowed(t *testing.T) {
	w := newPodWire(t, fmt.Sprintf(onlyHTTP, "drop"), nil)
	p := udpPacket(at(client6, 1), at(guest6, 80), []byte("data"))
	p.l4, p.proto = append([]byte{packet.ProtoUDP, 0, 1, 4, 0, 0, 0, 0}, p.l4...), 60
	w.out.sendBytes(p.bytes(), 0)
	pkt := w.ep.Read()
	if pkt == nil {
		t.Fatalf("it did not arrive; counters: %v", w.counters())
	}
	pkt.DecRef()
	if f := w.flow(); f.Orig != nat.NewTuple(packet.ProtoUDP, at(client6, 1), at(guest6, 80)) {
		t.Errorf("the flow is %v", f.Orig)
	}
}

// An open checksum and a segment's size reach the other link with the packet.
func TestInboundOffloadsAreKept(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		w := newPodWire(t, allowAll, nil)
		client, server := at(far, 40000), at(pod, 80)
		w.connect(client, server)
		gso := stack.GSO{NeedsCsum: true, CsumOffset: header.TCPChecksumOffset, L3HdrLen: uint16(packet.IPHeaderLen(pod)), MSS: 1400}
		for _, way := range []struct {
			from, to *wire
			p        ipPacket
		}{
			{w.out, w.wire, dataSegment(client, server, header.TCPFlagAck, 1001, 5001, pattern(30000))},
			{w.wire, w.out, dataSegment(server, client, header.TCPFlagAck, 5001, 1001, pattern(60000))},
		} {
			injectGSO(way.from.ep, way.p.bytes(), gso)
			pkt := way.to.ep.Read()
			if pkt == nil {
				t.Fatalf("it did not arrive; counters: %v", w.counters())
			}
			g := pkt.GSOOptions
			if g.Type == stack.GSONone || !g.NeedsCsum || g.MSS != 1400 || g.CsumOffset != gso.CsumOffset || g.L3HdrLen != gso.L3HdrLen {
				t.Errorf("it arrived with %+v", g)
			}
			if n := len(pkt.TransportHeader().Slice()); n != header.TCPMinimumSize {
				t.Errorf("its transport header is said to be %d bytes long", n)
			}
			if pkt.Size() != packet.IPHeaderLen(pod)+len(way.p.l4) {
				t.Errorf("it arrived with %d bytes", pkt.Size())
			}
			pkt.DecRef()
		}
	})
}

func TestInboundPaddingIsTakenOff(t *testing.T) {
	w := newPodWire(t, allowAll, nil)
	p := udpPacket(at(client4, 1), at(guest4, 2), []byte("x"))
	w.out.sendBytes(append(p.bytes(), make([]byte, 20)...), 0)
	pkt := w.ep.Read()
	if pkt == nil || pkt.Size() != header.IPv4MinimumSize+len(p.l4) {
		t.Fatalf("got %v; counters: %v", pkt, w.counters())
	}
	pkt.DecRef()
}

func TestHopLimitsArePutBack(t *testing.T) {
	w := newPodWire(t, allowAll, nil)
	for _, ttl := range []uint8{1, 63, 254, 255} {
		for _, p := range []ipPacket{udpPacket(at(client4, 1), at(guest4, 2), nil), udpPacket(at(client6, 1), at(guest6, 2), nil)} {
			for id := range uint16(512) { // the header sum takes many values meanwhile
				p.ttl, p.id, p.df = ttl, id*257, id%2 == 0
				w.out.send(p)
				want := ttl + 1
				if ttl == 255 {
					want = 255
				}
				if got := w.recv(); got.ttl != want {
					t.Fatalf("a hop limit of %d became %d, want %d", ttl, got.ttl, want)
				}
			}
		}
	}
}

func TestInboundBandwidthIsLimited(t *testing.T) {
	clock := newTestClock()
	const limits = "\n  limits: {ingressBandwidth: 8M, egressBandwidth: 8M}\n"
	w := newPodWire(t, allowAll[:len(allowAll)-1]+limits, func(c *Config) { c.Now = clock.now })
	client, server := at(client4, 1), at(guest4, 2)
	received := func(to *wire, wait time.Duration) (n int) {
		for {
			p, ok := to.tryRecv(wait)
			if !ok {
				return n
			}
			if p.l4[8] != byte(n) {
				t.Fatalf("packet %d comes in the place of %d", p.l4[8], n)
			}
			n++
		}
	}
	// Of packets of 1000 bytes, 66 pass by the bucket of 64 KiB, 131 wait in the queue of 128 KiB,
	// and the rest are dropped.
	for _, way := range []struct {
		from, to *wire
		src, dst netip.AddrPort
	}{{w.out, w.wire, client, server}, {w.wire, w.out, server, client}} {
		for i := range 200 {
			data := pattern(972)
			data[0] = byte(i)
			way.from.send(udpPacket(way.src, way.dst, data))
		}
	}
	if n := w.f.Stats()["inbound_bandwidth"]; n != 2*3 {
		t.Errorf("%d drops were counted", n)
	}
	for _, to := range []*wire{w.wire, w.out} {
		if n := received(to, 20*time.Millisecond); n != 66 {
			t.Errorf("%d packets passed at once", n)
		}
	}
	clock.advance(time.Second)
	n := 66
	testutil.Eventually(t, "what waited for its time has passed", func() bool {
		if p, ok := w.tryRecv(time.Millisecond); ok {
			if p.l4[8] != byte(n) {
				t.Fatalf("packet %d comes in the place of %d", p.l4[8], n)
			}
			n++
		}
		if n == 130 { // a second is worth no more than the bucket holds
			clock.advance(time.Second)
		}
		return n == 197
	})
	w.f.SetRules(compile(t, allowAll))
	testutil.Eventually(t, "without a limit nothing waits", func() bool {
		_, _ = w.out.tryRecv(time.Millisecond)
		return w.f.outside.Out.Waits.Load() == 0
	})
	arrives(t, w.out, w.wire, udpPacket(client, server, []byte("x")))
	if f := w.flow(); f.OrigPackets != 198 || f.ReplyPackets != 197 {
		t.Errorf("%d and %d packets were counted", f.OrigPackets, f.ReplyPackets)
	}
}
