package forwarder

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/internal/testutil"
)

// segment returns a TCP segment without data.
func segment(src, dst netip.AddrPort, flags header.TCPFlags, seq, ack uint32) ipPacket {
	l4 := make([]byte, header.TCPMinimumSize)
	h := header.TCP(l4)
	h.Encode(&header.TCPFields{
		SrcPort: src.Port(), DstPort: dst.Port(), SeqNum: seq, AckNum: ack,
		DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535,
	})
	h.SetChecksum(^checksum.Checksum(l4, packet.PseudoSum(src.Addr(), dst.Addr(), packet.ProtoTCP, len(l4))))
	return ipPacket{src: src.Addr(), dst: dst.Addr(), proto: packet.ProtoTCP, l4: l4}
}

// listenHost accepts and holds connections on the host's loopback, and returns the port.
func listenHost(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = c.Read(make([]byte, 1)); c.Close() }()
		}
	}()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// recvTCP returns the next TCP segment with one of the flags, for port.
func (w *wire) recvTCP(port uint16, flags header.TCPFlags) header.TCP {
	w.t.Helper()
	for {
		p := w.recv()
		if p.proto != packet.ProtoTCP {
			continue
		}
		if h := header.TCP(p.l4); h.DestinationPort() == port && h.Flags()&flags != 0 {
			return h
		}
	}
}

func TestTCPHandshakesThatAreResetHoldNothing(t *testing.T) {
	w := newWire(t, allowAll, nil)
	dst := netip.AddrPortFrom(gateway4, listenHost(t))
	for i := range 3000 {
		src := netip.AddrPortFrom(guest4, uint16(10000+i%3000))
		w.send(segment(src, dst, header.TCPFlagSyn, 1000, 0))
		sa := w.recvTCP(src.Port(), header.TCPFlagSyn)
		w.send(segment(src, dst, header.TCPFlagRst, sa.AckNumber(), 0))
	}
	src := netip.AddrPortFrom(guest4, 50000)
	w.send(segment(src, dst, header.TCPFlagSyn, 1, 0))
	if h := w.recvTCP(50000, header.TCPFlagSyn); !h.Flags().Contains(header.TCPFlagAck) {
		t.Fatalf("the next SYN was answered with %v", h.Flags())
	}
	testutil.Eventually(t, "only the last flow is left", func() bool { return w.f.gate.Table.Len() == 1 })
}

func TestTCPHandshakesNobodyCompletesAreBounded(t *testing.T) {
	w := newWire(t, allowAll, nil)
	dst := netip.AddrPortFrom(gateway4, listenHost(t))
	const extra = 50
	for i := range tcpflow.MaxHandshakes + extra {
		src := netip.AddrPortFrom(guest4, uint16(10000+i))
		w.send(segment(src, dst, header.TCPFlagSyn, 1000, 0))
		w.recvTCP(src.Port(), header.TCPFlagSyn)
	}
	testutil.Eventually(t, "the oldest are evicted", func() bool {
		return w.f.Stats()["tcp_handshake_evicted"] == extra && w.f.gate.Table.Len() == tcpflow.MaxHandshakes
	})
}

func TestTCPHandshakeTimesOut(t *testing.T) {
	clock := newTestClock()
	w := newWire(t, allowAll, func(c *Config) { c.Now = clock.now })
	src, dst := netip.AddrPortFrom(guest4, 10000), netip.AddrPortFrom(gateway4, listenHost(t))
	w.send(segment(src, dst, header.TCPFlagSyn, 1000, 0))
	w.recvTCP(src.Port(), header.TCPFlagSyn)
	clock.advance(tcpflow.HandshakeTimeout + time.Second)
	testutil.Eventually(t, "the half-open flow is gone", func() bool {
		return w.f.Stats()["tcp_handshake_timeout"] == 1 && w.f.gate.Table.Len() == 0
	})
}

func TestTCPAResetDuringTheDialCancelsIt(t *testing.T) {
	ns := inNetns(t)
	routerNetns(t)
	ns.run(t, "silent", func(t *testing.T) {
		w := newWire(t, allowAll, nil)
		// No host answers at this address: the dial hangs until one side gives up.
		src, dst := netip.AddrPortFrom(guest4, 10000), netip.AddrPortFrom(netip.MustParseAddr("192.0.2.77"), 80)
		w.send(segment(src, dst, header.TCPFlagSyn, 1000, 0))
		testutil.Eventually(t, "the dial has begun", func() bool { return w.f.dialer.Sockets.Load() == 1 })
		w.send(segment(src, dst, header.TCPFlagRst, 1001, 0))
		testutil.Eventually(t, "the dial is cancelled", func() bool {
			return w.f.Stats()["tcp_dial_cancelled"] == 1 && w.f.dialer.Sockets.Load() == 0 && w.f.gate.Table.Len() == 0
		})
	})
}

func TestTCPADialEndsWhenTheSandboxStopsAsking(t *testing.T) {
	ns := inNetns(t)
	routerNetns(t)
	ns.run(t, "silent", func(t *testing.T) {
		clock := newTestClock()
		w := newWire(t, allowAll, func(c *Config) { c.Now = clock.now })
		syn := segment(netip.AddrPortFrom(guest4, 10000), netip.AddrPortFrom(netip.MustParseAddr("192.0.2.77"), 80), header.TCPFlagSyn, 1000, 0)
		w.send(syn)
		testutil.Eventually(t, "the dial has begun", func() bool { return w.f.dialer.Sockets.Load() == 1 })
		for _, gap := range []int{1, 2, 4, 8} { // as a patient sender repeats it
			clock.advance(time.Duration(gap) * time.Second)
			w.send(syn)
			if w.f.tcp.ExpireDials(clock.now()); w.f.dialer.Sockets.Load() != 1 {
				t.Fatalf("the dial ended %v s after its last SYN", gap)
			}
		}
		clock.advance(15*time.Second + tcpflow.SynSlack + time.Second)
		testutil.Eventually(t, "the dial has ended", func() bool {
			return w.f.dialer.Sockets.Load() == 0 && w.f.gate.Table.Len() == 0 && w.f.Stats()["tcp_dial_cancelled"] == 1
		})
	})
}

func TestTCPWithAWrongChecksumOpensNothing(t *testing.T) {
	w := newWire(t, allowAll, nil)
	p := segment(netip.AddrPortFrom(guest4, 10000), netip.AddrPortFrom(gateway4, listenHost(t)), header.TCPFlagSyn, 1, 0)
	p.l4[16] ^= 0xff
	w.send(p)
	w.silent("a SYN with a wrong checksum")
	if n := w.f.gate.Table.Len(); n != 0 {
		t.Errorf("%d flows", n)
	}
}

func TestTCPStraySegmentsAreReset(t *testing.T) {
	w := newWire(t, allowAll, nil)
	src, dst := netip.AddrPortFrom(guest4, 10000), netip.AddrPortFrom(far4, 80)
	w.send(segment(src, dst, header.TCPFlagAck, 77, 88))
	if h := w.recvTCP(10000, header.TCPFlagRst); h.SequenceNumber() != 88 {
		t.Errorf("the reset has sequence number %d, want the ACK's 88", h.SequenceNumber())
	}
}

func TestTCPOverATablesLimitIsDroppedAndCounted(t *testing.T) {
	w := newWire(t, allowAll+"  limits: {flows: 1}\n", nil)
	dst := netip.AddrPortFrom(gateway4, listenHost(t))
	first := netip.AddrPortFrom(guest4, 10000)
	w.send(segment(first, dst, header.TCPFlagSyn, 1000, 0))
	sa := w.recvTCP(first.Port(), header.TCPFlagSyn)
	w.send(segment(first, dst, header.TCPFlagAck, 1001, sa.SequenceNumber()+1))
	testutil.Eventually(t, "the first flow is established", func() bool {
		l := w.f.gate.Table.List()
		return len(l) == 1 && l[0].State.String() == "ESTABLISHED"
	})
	w.send(segment(netip.AddrPortFrom(guest4, 10001), dst, header.TCPFlagSyn, 1000, 0))
	testutil.Eventually(t, "the second is counted", func() bool { return w.f.Stats()["tcp_refused_by_limit"] == 1 })
}

func TestTheFilterLetsOnlyTheSandboxsOwnTrafficIn(t *testing.T) {
	other4, other6 := netip.MustParseAddr("10.0.2.101"), netip.MustParseAddr("fd00::101")
	p := func(src, dst string, proto uint8) ipPacket {
		return ipPacket{src: netip.MustParseAddr(src), dst: netip.MustParseAddr(dst), proto: proto, l4: make([]byte, 20)}
	}
	for _, row := range []struct {
		what   string
		p      ipPacket
		reason string
	}{
		{"a forged IPv4 source", p(other4.String(), "192.0.2.1", packet.ProtoUDP), "drop_spoofed_source"},
		{"a forged IPv6 source", p(other6.String(), "2001:db8::1", packet.ProtoUDP), "drop_spoofed_source"},
		{"the gateway's own address as source", p("10.0.2.2", "192.0.2.1", packet.ProtoUDP), "drop_spoofed_source"},
		{"loopback as source", p("127.0.0.1", "192.0.2.1", packet.ProtoUDP), "drop_spoofed_source"},
		{"a 4-in-6 source", p("::ffff:10.0.2.100", "2001:db8::1", packet.ProtoUDP), "drop_spoofed_source"},
		{"IPv4 multicast", p("10.0.2.100", "224.0.0.251", packet.ProtoUDP), "drop_multicast"},
		{"IPv6 multicast", p("fd00::100", "ff02::fb", packet.ProtoUDP), "drop_multicast"},
		{"the limited broadcast", p("10.0.2.100", "255.255.255.255", packet.ProtoUDP), "drop_broadcast"},
		{"the subnet's broadcast", p("10.0.2.100", "10.0.2.255", packet.ProtoUDP), "drop_broadcast"},
		{"the unspecified address", p("10.0.2.100", "0.0.0.0", packet.ProtoUDP), "drop_martian_destination"},
		{"the sandbox itself", p("10.0.2.100", "10.0.2.100", packet.ProtoUDP), "drop_martian_destination"},
		{"a 4-in-6 destination", p("fd00::100", "::ffff:192.0.2.1", packet.ProtoUDP), "drop_martian_destination"},
		{"a foreign link-local", p("fd00::100", "fe80::1234", packet.ProtoUDP), "drop_martian_destination"},
		{"IPv4 loopback", p("10.0.2.100", "127.1.2.3", packet.ProtoUDP), "drop_martian_destination"},
		{"IPv6 loopback", p("fd00::100", "::1", packet.ProtoUDP), "drop_martian_destination"},
		{"GRE over IPv4", p("10.0.2.100", "192.0.2.1", 47), "ip_protocol"},
		{"GRE over IPv6", p("fd00::100", "2001:db8::1", 47), "ip_protocol"},
		{"IPv6 source routing", p("fd00::100", "2001:db8::1", 43), "drop_source_route"},
	} {
		t.Run(row.what, func(t *testing.T) {
			w := newWire(t, allowAll, nil)
			w.send(row.p)
			if n := w.f.Stats()[row.reason]; n != 1 {
				t.Errorf("%s is %d, want 1; counters: %v", row.reason, n, w.counters())
			}
			if n := w.f.gate.Table.Len(); n != 0 {
				t.Errorf("%d flows", n)
			}
		})
	}
}

func TestAGuestThatConfiguresItselfMayUseItsPrefix(t *testing.T) {
	chosen := netip.MustParseAddr("fd00::1234:5678")
	for _, row := range []struct {
		what   string
		prefix netip.Prefix
		src    netip.Addr
		reason string
	}{
		{"an address of the prefix", netip.MustParsePrefix("fd00::/64"), chosen, "udp_refused"},
		{"without a prefix", netip.Prefix{}, chosen, "drop_spoofed_source"},
		{"the gateway's own address", netip.MustParsePrefix("fd00::/64"), gateway6, "drop_spoofed_source"},
	} {
		t.Run(row.what, func(t *testing.T) {
			w := newWire(t, allowNone, func(c *Config) { c.SelfConfigured = row.prefix })
			w.send(udpPacket(netip.AddrPortFrom(row.src, 1000), netip.AddrPortFrom(far6, 2000), []byte("x")))
			if n := w.f.Stats()[row.reason]; n != 1 {
				t.Errorf("%s is %d, want 1; counters: %v", row.reason, n, w.counters())
			}
		})
	}
}

func TestBandwidthIsHeldAndShared(t *testing.T) {
	now := time.Unix(1000, 0)
	var b admit.Bucket
	b.SetRate(1_000_000)
	q := engine.NewRunQueue(func() {})
	defer b.SetRate(0)
	var tk engine.Task
	if got := b.Take(10<<20, now, &tk, q); got != admit.BucketMin {
		t.Fatalf("a full bucket gave %d bytes, want its %d", got, admit.BucketMin)
	}
	if got := b.Take(1, now, &tk, q); got != 0 {
		t.Fatalf("an empty bucket gave %d bytes", got)
	}
	var second engine.Task
	now = now.Add(100 * time.Millisecond)
	if got := b.Take(1<<20, now, &second, q); got != admit.Quantum {
		t.Errorf("while another waits a flow got %d bytes, want a quantum of %d", got, admit.Quantum)
	}
	b.Wake()
	if q.Next() != &tk {
		t.Error("the flow that waited was not queued")
	}
	total := 0
	for range 1000 {
		now = now.Add(10 * time.Millisecond)
		n := b.Take(1<<20, now, &tk, q)
		total += n
	}
	if total < 9_900_000 || total > 10_100_000 {
		t.Errorf("10 s at 1 MB/s gave %d bytes", total)
	}
}

func TestInjectedResetHasTheHeadersOfTheFlow(t *testing.T) {
	// A checksum that the stack refuses would leave the handshake open.
	// TestTCPHandshakesNobodyCompletesAreBounded shows that this does not happen; this test is
	// about IPv6.
	clock := newTestClock()
	w := newWire(t, allowAll, func(c *Config) { c.Now = clock.now })
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 loopback here: ", err)
	}
	defer l.Close()
	src, dst := netip.AddrPortFrom(guest6, 10000), netip.AddrPortFrom(gateway6, uint16(l.Addr().(*net.TCPAddr).Port))
	w.send(segment(src, dst, header.TCPFlagSyn, 1000, 0))
	w.recvTCP(src.Port(), header.TCPFlagSyn)
	clock.advance(tcpflow.HandshakeTimeout + time.Second)
	testutil.Eventually(t, "the half-open flow is gone", func() bool { return w.f.gate.Table.Len() == 0 })
}

// What accepts handshakes listens at no address of the stack's own: a segment for its port goes to
// the policy like any other.
func TestTCPAcceptorIsOutOfReach(t *testing.T) {
	w := newWire(t, allowAll, nil)
	for _, l := range w.f.tcp.Acceptor.All() {
		id := l.TransportEndpointInfo.ID
		if id.LocalPort == 0 {
			t.Fatal("the acceptor has no port, so the test would tell nothing")
		}
		if ep := w.f.stack.FindTransportEndpoint(l.NetProto, tcp.ProtocolNumber, id, packet.NICID); ep != nil {
			t.Errorf("the acceptor is found at port %d", id.LocalPort)
		}
	}
	src := netip.AddrPortFrom(guest4, 10002)
	w.send(segment(src, netip.AddrPortFrom(gateway4, w.f.tcp.Acceptor.Plain.V4.TransportEndpointInfo.ID.LocalPort), header.TCPFlagSyn, 1000, 0))
	w.recvTCP(src.Port(), header.TCPFlagRst) // of the host, where the port is closed
}
