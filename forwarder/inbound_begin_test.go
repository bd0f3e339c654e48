package forwarder

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/inbound"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

// allowIn lets every client in to every port, and nothing out; names are not gated.
const allowIn = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: in}
spec:
  defaultAction: drop
  dns: {names: ungated}
  ingress: [{name: any, action: allow}]
`

// saysNothing sends a packet of the pod and checks that none of it gets outside.
func (w *podWire) saysNothing(what string, p ipPacket) {
	w.t.Helper()
	w.send(p)
	if got, ok := w.out.tryRecv(5 * time.Millisecond); ok {
		w.t.Errorf("%s left as protocol %d to %s", what, got.proto, got.dst)
	}
	for {
		if _, ok := w.tryRecv(time.Millisecond); !ok {
			return // a matter for policy
		}
	}
}

// A segment of no flow is answered by a reset. It begins nothing by which the pod could speak to
// its sender.
func TestOnlyASYNBeginsAConnectionFromOutside(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		w := newPodWire(t, allowIn, nil)
		server, own := at(far, 443), at(pod, 40000)
		for _, test := range []struct {
			name  string
			flags header.TCPFlags
			data  int
		}{
			{"data in flight", header.TCPFlagAck, 1000},
			{"an acknowledgement", header.TCPFlagAck, 0},
			{"an end", header.TCPFlagFin | header.TCPFlagAck, 0},
			{"an answer to a SYN", header.TCPFlagSyn | header.TCPFlagAck, 0},
		} {
			t.Run(test.name, func(t *testing.T) {
				w.t, w.out.t = t, t
				stray := w.f.Stats()["inbound_tcp_stray"]
				w.out.send(dataSegment(server, own, test.flags, 1000, 77, pattern(test.data)))
				if h := header.TCP(w.out.recv().l4); h.Flags() != header.TCPFlagRst || h.SequenceNumber() != 77 {
					t.Errorf("it is answered by %v, seq %d", h.Flags(), h.SequenceNumber())
				}
				w.silent("inside")
				w.wantFlows(0)
				if n := w.f.Stats()["inbound_tcp_stray"] - stray; n != 1 {
					t.Errorf("counters: %v", w.counters())
				}
				w.saysNothing("data of the pod's", dataSegment(own, server, header.TCPFlagAck, 77, 1000, []byte("secret")))
				w.saysNothing("a SYN of the pod's", segment(own, server, header.TCPFlagSyn, 1, 0))
			})
		}
	})
}

// A pod's SYN is its own, whatever the client has begun on the same two ports.
func TestASYNOfThePodIsNoAnswer(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		w := newPodWire(t, allowIn, nil)
		client, own := at(far, 443), at(pod, 40000)
		arrives(t, w.out, w.wire, segment(client, own, header.TCPFlagSyn, 1000, 0))
		before := w.f.Stats()["tcp_refused_by_policy"]
		w.saysNothing("a SYN at the same time", segment(own, client, header.TCPFlagSyn, 5000, 0))
		arrives(t, w.wire, w.out, segment(own, client, header.TCPFlagSyn|header.TCPFlagAck, 5000, 1001))
		arrives(t, w.out, w.wire, segment(client, own, header.TCPFlagAck, 1001, 5001))
		w.saysNothing("a SYN within the connection", segment(own, client, header.TCPFlagSyn, 9000, 0))
		if n := w.f.Stats()["tcp_refused_by_policy"] - before; n != 2 {
			t.Errorf("%d were judged as what the pod asks for; counters: %v", n, w.counters())
		}
	})
}

// ownWorld is a namespace whose loopback has the addresses of the pod and of a server outside, so
// that the worker's sockets can be the pod's.
func ownWorld(t *testing.T, f func(t *testing.T, pod, far netip.Addr)) {
	ns := inNetns(t)
	far4, far6 := netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:7::7")
	for _, a := range []netip.Addr{guest4, guest6, far4, far6} {
		ip(t, "addr", "add", netip.PrefixFrom(a, a.BitLen()).String(), "dev", "lo", "nodad")
	}
	// The kernel adds an IPv6 address's route in its own time.
	server := udpServer(t, at(far6, 0).String())
	testutil.Eventually(t, "the server is reached", func() bool {
		c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(at(guest6, 0)), net.UDPAddrFromAddrPort(at(far6, portOf(server))))
		if err != nil {
			return false
		}
		defer c.Close()
		_, _ = c.Write([]byte("x"))
		_ = server.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, _, err = server.ReadFromUDPAddrPort(make([]byte, 1))
		return err == nil
	})
	ns.run(t, "IPv4", func(t *testing.T) { f(t, guest4, far4) })
	ns.run(t, "IPv6", func(t *testing.T) { f(t, guest6, far6) })
}

// rests checks that a packet from outside begins nothing because its port is resting.
func (w *podWire) rests(what string, p ipPacket) {
	w.t.Helper()
	before, flows := w.f.Stats()["inbound_rests"], w.f.outside.Count.Load()
	w.out.send(p)
	w.silent(what + ", inside")
	if n := w.f.Stats()["inbound_rests"] - before; n != 1 || w.f.outside.Count.Load() != flows {
		w.t.Errorf("%s: %d rest, %d inbound flows; counters: %v", what, n, w.f.outside.Count.Load(), w.counters())
	}
	for {
		if _, ok := w.out.tryRecv(time.Millisecond); !ok {
			return
		}
	}
}

// A late datagram, or one from a server that egress policy has cut off, begins no flow on the port
// that our socket had. Nor can the same server open the way by streaming on.
func TestADatagramForASocketThatIsGoneBeginsNothing(t *testing.T) {
	ownWorld(t, func(t *testing.T, pod, far netip.Addr) {
		clock := newTestClock()
		w := newPodWire(t, allowAll, func(c *Config) { c.Now, c.Table = clock.now, nat.NewTable(nat.Config{Now: clock.now}) })
		server := udpServer(t, at(far, 0).String())
		peer, own := at(far, portOf(server)), at(pod, 5000)
		w.send(udpPacket(own, peer, []byte("question")))
		_, mapped := read(t, server)
		w.rests("a datagram while the socket is open", udpPacket(at(far, 9), mapped, nil))
		w.f.SetRules(compile(t, allowIn))
		testutil.Eventually(t, "the flow is cut", func() bool { return w.table.Len() == 0 })

		w.rests("the server's next datagram", udpPacket(peer, mapped, []byte("more")))
		w.rests("one from another port of its", udpPacket(at(far, 9), mapped, nil))
		w.rests("one to the pod's own port", udpPacket(peer, own, nil))
		w.saysNothing("the pod by our port", udpPacket(mapped, peer, []byte("secret")))
		w.saysNothing("the pod by its own", udpPacket(own, peer, []byte("secret")))
		for range 20 {
			clock.advance(admit.TombTime * 3 / 4)
			w.rests("a stream that goes on", udpPacket(peer, mapped, []byte("more")))
		}
		clock.advance(2 * admit.TombTime)
		arrives(t, w.out, w.wire, udpPacket(peer, mapped, []byte("somebody, long after")))
	})
}

func TestAConnectionOfOurOwnBeginsNothingWhenItIsOver(t *testing.T) {
	ownWorld(t, func(t *testing.T, pod, far netip.Addr) {
		clock := newTestClock()
		w := newPodWire(t, allowAll, func(c *Config) { c.Now = clock.now })
		l, err := net.Listen("tcp", at(far, 0).String())
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		peer, own := netip.MustParseAddrPort(l.Addr().String()), at(pod, 5000)
		w.send(segment(own, peer, header.TCPFlagSyn, 1, 0))
		sa := w.recvTCP(5000, header.TCPFlagSyn)
		w.send(segment(own, peer, header.TCPFlagAck, 2, sa.SequenceNumber()+1))
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		mapped := netip.MustParseAddrPort(c.RemoteAddr().String())
		w.rests("a SYN by the ports of a connection of the pod's", segment(peer, own, header.TCPFlagSyn, 1, 0))
		testutil.Eventually(t, "the flow is established", func() bool { return w.flow().State == nat.Established })
		w.send(segment(own, peer, header.TCPFlagRst, 2, 0))
		testutil.Eventually(t, "the flow is over", func() bool { return w.table.Len() == 0 })
		for {
			if _, ok := w.tryRecv(5 * time.Millisecond); !ok {
				break
			}
		}
		w.out.send(dataSegment(peer, mapped, header.TCPFlagAck, 100, 200, pattern(1000)))
		if h := header.TCP(w.out.recv().l4); h.Flags() != header.TCPFlagRst {
			t.Errorf("a segment in flight is answered by %v", h.Flags())
		}
		w.silent("of a segment in flight, inside")
		w.rests("a SYN by the same ports", segment(peer, mapped, header.TCPFlagSyn, 1, 0))
		w.wantFlows(0)
		arrives(t, w.out, w.wire, segment(at(far, 9), mapped, header.TCPFlagSyn, 1, 0))
		clock.advance(2 * admit.TombTime)
		arrives(t, w.out, w.wire, segment(peer, mapped, header.TCPFlagSyn, 1, 0))
	})
}

// The pod does not get what policy refuses it by being called back.
func TestThePeerOfARefusedDatagramBeginsNothing(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		clock := newTestClock()
		w := newPodWire(t, allowIn, func(c *Config) { c.Now = clock.now })
		own, peer := at(pod, 5000), at(far, 6000)
		w.saysNothing("a refused datagram", udpPacket(own, peer, nil))
		w.rests("its peer", udpPacket(peer, own, nil))
		arrives(t, w.out, w.wire, udpPacket(at(far, 6001), own, nil))
		arrives(t, w.out, w.wire, udpPacket(peer, at(pod, 5001), nil))
		clock.advance(2 * admit.TombTime)
		arrives(t, w.out, w.wire, udpPacket(peer, own, nil))
	})
}

func TestTheResolversServersBeginNothing(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		server := at(far, 53)
		w := newPodWire(t, allowIn, func(c *Config) { c.Asks = func(a netip.AddrPort) bool { return a == server } })
		w.rests("a late answer", udpPacket(server, at(pod, 40000), nil))
		w.rests("a SYN", segment(server, at(pod, 40000), header.TCPFlagSyn, 1, 0))
		arrives(t, w.out, w.wire, udpPacket(at(far, 5353), at(pod, 40000), nil))
	})
}

// A dead worker has left which ports its sockets had.
func TestPortsRestAcrossWorkers(t *testing.T) {
	ownWorld(t, func(t *testing.T, pod, far netip.Addr) {
		memory := make([]byte, inbound.MemorySize)
		server := udpServer(t, at(far, 0).String())
		peer := at(far, portOf(server))
		w := generation(t, memory, allowAll)
		w.send(udpPacket(at(pod, 5000), peer, []byte("question")))
		_, mapped := read(t, server)
		left := slices.Clone(memory) // from a worker that dies at this moment
		for _, n := range []string{"second", "third"} {
			t.Run("the "+n, func(t *testing.T) {
				w := generation(t, left, allowIn)
				w.rests("a datagram for the first one's socket", udpPacket(peer, mapped, nil))
				arrives(t, w.out, w.wire, udpPacket(peer, at(pod, mapped.Port()-1), nil))
			})
		}
	})
}

func TestTombsAreBoundedAndThenClosed(t *testing.T) {
	clock := newTestClock()
	tombs := admit.NewTombs(clock.now, nil)
	tuple := func(i int) nat.Tuple {
		return nat.NewTuple(packet.ProtoTCP, at(client4, uint16(i)), at(guest4, uint16(1000+i>>16)))
	}
	for i := range admit.MaxTombs {
		tombs.Bury(tuple(i))
	}
	tombs.Bury(tuple(0)) // known, so it takes no place
	if tombs.Full[0] != nil {
		t.Fatal("it is full too early")
	}
	lucky := nat.NewTuple(packet.ProtoTCP, at(client4, 1), at(guest4, 7000))
	if tombs.Rests(lucky) {
		t.Error("what nobody buried rests")
	}
	tombs.Bury(nat.NewTuple(packet.ProtoTCP, at(client4, 2), at(guest4, 7000)))
	if len(tombs.Tuples[0]) != admit.MaxTombs {
		t.Errorf("%d tuples are held", len(tombs.Tuples[0]))
	}
	if !tombs.Rests(lucky) || tombs.Rests(nat.NewTuple(packet.ProtoTCP, at(client4, 1), at(guest4, 7001))) {
		t.Error("beyond the bound the pod's port is not closed, or another is")
	}
	clock.advance(admit.TombTime)
	if !tombs.Rests(tuple(5)) || !tombs.Rests(lucky) {
		t.Error("it rests for less than tombTime")
	}
	clock.advance(admit.TombTime)
	if tombs.Rests(tuple(5)) || tombs.Rests(lucky) {
		t.Error("it rests for more than two of them")
	}
}

// While names are gated the pod speaks to no resolver, in any flow.
func TestTheGateGoesBeforeInboundFlows(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		gated := gatesNames + "  ingress: [{name: any, action: allow}]\n"
		w := newPodWire(t, allowIn, func(c *Config) { c.DNSHandler = resolver{} })
		resolver53, own := at(far, 53), at(pod, 5000)
		arrives(t, w.out, w.wire, udpPacket(resolver53, own, nil)) // not gated: a client like any other
		w.connect(at(far, 853), own)
		w.f.gate.Rules.Store(compile(t, gated)) // in force, but the flows have not been asked yet
		w.saysNothing("a question by a flow that is left", udpPacket(own, resolver53, []byte("abc")))
		w.f.SetRules(compile(t, gated))
		testutil.Eventually(t, "both are cut", func() bool { return w.f.outside.Count.Load() == 0 })
		for {
			if _, ok := w.tryRecv(5 * time.Millisecond); !ok {
				break // resets
			}
		}
		for {
			if _, ok := w.out.tryRecv(5 * time.Millisecond); !ok {
				break
			}
		}
		refused := w.f.Stats()["inbound_refused"]
		for _, p := range []ipPacket{
			udpPacket(resolver53, own, nil), segment(resolver53, own, header.TCPFlagSyn, 1, 0),
			udpPacket(at(far, 853), own, nil), segment(at(far, 853), own, header.TCPFlagSyn, 1, 0),
		} {
			w.out.send(p)
			w.silent("a resolver that begins")
			for {
				if _, ok := w.out.tryRecv(time.Millisecond); !ok {
					break
				}
			}
		}
		if n := w.f.Stats()["inbound_refused"] - refused; n != 4 {
			t.Errorf("%d were refused; counters: %v", n, w.counters())
		}
		// A pod's own name server goes on answering.
		arrives(t, w.out, w.wire, udpPacket(at(far, 40000), at(pod, 53), []byte("question")))
		arrives(t, w.wire, w.out, udpPacket(at(pod, 53), at(far, 40000), []byte("answer")))
	})
}

func TestClosedAddressesAreNoClients(t *testing.T) {
	w := newPodWire(t, allowIn, nil)
	for _, a := range []string{"169.254.169.254", "100.100.100.200", "fd00:ec2::254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "64:ff9b::7f00:1"} {
		from := netip.MustParseAddr(a)
		pod := guest4
		if from.Is6() {
			pod = guest6
		}
		for _, p := range []ipPacket{udpPacket(at(from, 80), at(pod, 5000), nil), segment(at(from, 80), at(pod, 5000), header.TCPFlagSyn, 1, 0), echoPacket(from, pod, 1, 1, nil)} {
			w.stays(w.out, p, "inbound_refused")
		}
		w.saysNothing("the pod to "+a, udpPacket(at(pod, 5000), at(from, 80), nil))
	}
	w.wantFlows(0)
	w.stays(w.out, udpPacket(at(netip.MustParseAddr("10.0.2.255"), 1), at(guest4, 5000), nil), "inbound_martian_source")
}

// routed4 gives a packet an IPv4 source-routing option, by way of elsewhere.
func routed4(p ipPacket, option byte) []byte {
	b := p.bytes()
	opts := []byte{1, option, 7, 4, 169, 254, 169, 254}
	b = append(b[:20:20], append(opts, b[20:]...)...)
	h := header.IPv4(b)
	b[0] = 0x47
	h.SetTotalLength(uint16(len(b)))
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	return b
}

// routed6 gives it a routing header, behind other headers if asked.
func routed6(p ipPacket, behind bool, left byte) []byte {
	via := netip.MustParseAddr("fd00:ec2::254").As16()
	route := append([]byte{p.proto, 2, 0, left, 0, 0, 0, 0}, via[:]...)
	p.l4, p.proto = append(route, p.l4...), 43
	if behind {
		p.l4, p.proto = append([]byte{43, 0, 1, 4, 0, 0, 0, 0}, p.l4...), 60
	}
	return p.bytes()
}

func TestRoutesOfAPacketsOwnDoNotPass(t *testing.T) {
	w := newPodWire(t, allowAll, nil)
	client4, client6 := at(client4, 40000), at(client6, 40000)
	server4, server6 := at(guest4, 80), at(guest6, 80)
	arrives(t, w.out, w.wire, udpPacket(client4, server4, nil))
	arrives(t, w.out, w.wire, udpPacket(client6, server6, nil))
	w.connect(client4, server4)
	for name, b := range map[string][]byte{
		"loose source routing":     routed4(udpPacket(server4, client4, []byte("x")), 131),
		"strict source routing":    routed4(dataSegment(server4, client4, header.TCPFlagAck, 5001, 1001, []byte("x")), 137),
		"a routing header":         routed6(udpPacket(server6, client6, []byte("x")), false, 1),
		"one that is used up":      routed6(udpPacket(server6, client6, []byte("x")), false, 0),
		"one behind other headers": routed6(udpPacket(server6, client6, []byte("x")), true, 1),
	} {
		w.sendBytes(b, 0)
		if p, ok := w.out.tryRecv(5 * time.Millisecond); ok {
			t.Errorf("%s left as protocol %d to %s", name, p.proto, p.dst)
		}
	}
	for {
		if _, ok := w.tryRecv(5 * time.Millisecond); !ok {
			break // a matter for the stack
		}
	}
	before := w.f.Stats()["inbound_source_route"]
	for name, b := range map[string][]byte{
		"loose source routing":     routed4(udpPacket(client4, server4, []byte("x")), 131),
		"a routing header":         routed6(udpPacket(client6, server6, []byte("x")), false, 1),
		"one behind other headers": routed6(udpPacket(client6, server6, []byte("x")), true, 0),
	} {
		w.out.sendBytes(b, 0)
		for {
			p, ok := w.tryRecv(5 * time.Millisecond)
			if !ok {
				break
			}
			if p.src == client4.Addr() || p.src == client6.Addr() {
				t.Errorf("%s came in as protocol %d", name, p.proto)
			}
		}
	}
	if n := w.f.Stats()["inbound_source_route"] - before; n != 3 {
		t.Errorf("%d were counted; counters: %v", n, w.counters())
	}
	arrives(t, w.wire, w.out, udpPacket(server4, client4, []byte("the flow lives")))
}

// Whatever came before, the flow that a client begins is answered: the pod is a server for a host
// whose client it also is.
func TestPeersThatSpeakBothWays(t *testing.T) {
	ownWorld(t, func(t *testing.T, pod, far netip.Addr) {
		w := newPodWire(t, allowAll, nil)
		server := udpServer(t, at(far, 0).String())
		own, peer := at(pod, 7946), at(far, portOf(server))
		w.send(udpPacket(own, peer, []byte("gossip")))
		read(t, server)
		arrives(t, w.out, w.wire, udpPacket(peer, own, []byte("gossip of its own")))
		arrives(t, w.wire, w.out, udpPacket(own, peer, []byte("answer")))
		if n := w.f.outside.Count.Load(); n != 1 {
			t.Errorf("%d inbound flows; counters: %v", n, w.counters())
		}
	})
}
