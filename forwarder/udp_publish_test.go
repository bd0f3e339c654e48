package forwarder

import (
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

// publishUDP publishes a host port that leads to the sandbox's port 80.
func publishUDP(w *wire, listen string, guest netip.Addr) hostsock.Listener {
	w.t.Helper()
	return publishUDPBoth(w, listen, guest, netip.Addr{})
}

// publishUDPBoth publishes a host port that leads to port 80 of guest, or of other.
func publishUDPBoth(w *wire, listen string, guest, other netip.Addr) hostsock.Listener {
	w.t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(listen)))
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	fd := dupFD(w.t, c)
	l := hostsock.Listener{Proto: unix.IPPROTO_UDP, FD: fd, Host: c.LocalAddr().(*net.UDPAddr).AddrPort(), Guest: at(guest, 80)}
	if other.IsValid() {
		l.Other = at(other, 80)
	}
	if err := w.f.Publish(l); err != nil {
		w.t.Fatal(err)
	}
	return l
}

func dupFD(t testing.TB, c syscall.Conn) (dup int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		t.Fatal(err)
	}
	return dup
}

func TestUDPPublishedPortShowsTheClientAndAnswersFromWhereItAsked(t *testing.T) {
	ns := inNetns(t)
	ip(t, "addr", "add", "192.0.2.10/32", "dev", "lo")
	ip(t, "addr", "add", "192.0.2.11/32", "dev", "lo")
	ip(t, "addr", "add", "192.0.2.20/32", "dev", "lo")
	ip(t, "addr", "add", "2001:db8::10/128", "dev", "lo", "nodad")
	ip(t, "addr", "add", "2001:db8::20/128", "dev", "lo", "nodad")
	for _, c := range []struct {
		what, listen, client, to string
		guest                    netip.Addr
		seen                     string // the address that the sandbox sees
	}{
		{"a client on the network", "0.0.0.0:8080", "192.0.2.20:0", "192.0.2.10:8080", guest4, "192.0.2.20"},
		{"at another address of the host", "0.0.0.0:8080", "192.0.2.20:0", "192.0.2.11:8080", guest4, "192.0.2.20"},
		{"an IPv6 client", "[::]:8080", "[2001:db8::20]:0", "[2001:db8::10]:8080", guest6, "2001:db8::20"},
		{"an IPv4 client of a dual-stack listener", "[::]:8080", "192.0.2.20:0", "192.0.2.10:8080", guest4, "192.0.2.20"},
		{"an IPv6 client of an IPv4 sandbox", "[::]:8080", "[2001:db8::20]:0", "[2001:db8::10]:8080", guest4, "10.0.2.2"},
		{"a client on the host's loopback", "0.0.0.0:8080", "127.0.0.1:0", "127.0.0.1:8080", guest4, "10.0.2.2"},
		{"a client on the IPv6 loopback", "[::]:8080", "[::1]:0", "[::1]:8080", guest6, "fd00::2"},
	} {
		ns.run(t, c.what, func(t *testing.T) {
			w := newWire(t, allowAll, nil)
			publishUDP(w, c.listen, c.guest)
			client, to := udpServer(t, c.client), netip.MustParseAddrPort(c.to)
			for range 2 {
				if _, err := client.WriteToUDPAddrPort([]byte("question"), to); err != nil {
					t.Fatal(err)
				}
				src, dst, payload, _ := w.recvUDP()
				if want := at(netip.MustParseAddr(c.seen), portOf(client)); src != want || dst != at(c.guest, 80) || string(payload) != "question" {
					t.Fatalf("the sandbox got %q from %s to %s, expected it from %s", payload, src, dst, want)
				}
				w.send(udpPacket(dst, src, []byte("answer")))
				if got, from := read(t, client); string(got) != "answer" || from != to {
					t.Fatalf("the client got %q from %s, expected it from %s", got, from, to)
				}
			}
			flows := w.table.List()
			if len(flows) != 1 {
				t.Fatalf("%d flows, expected one: %v", len(flows), flows)
			}
			fl := flows[0]
			if !fl.Ingress || fl.Orig != nat.NewTuple(17, srvAddr(client), to) || fl.OrigPackets != 2 || fl.ReplyPackets != 2 {
				t.Errorf("flow %+v", fl)
			}
		})
	}
}

func TestUDPPublishedPortFindsAServerOfTheOtherFamily(t *testing.T) {
	for _, c := range []struct {
		what, listen string
		guest, other netip.Addr
		gateway      netip.Addr // of other
	}{
		{"from IPv4 to IPv6", "127.0.0.1:0", guest4, guest6, gateway6},
		{"from IPv6 to IPv4", "[::1]:0", guest6, guest4, gateway4},
	} {
		t.Run(c.what, func(t *testing.T) {
			w := newWire(t, allowAll, nil)
			l := publishUDPBoth(w, c.listen, c.guest, c.other)
			client := udpServer(t, at(l.Host.Addr(), 0).String())
			refuse := func() {
				_, _, _, p := w.recvUDP()
				typ, code := uint8(3), uint8(3)
				if p.dst.Is6() {
					typ, code = 1, 4
				}
				w.send(icmpError(p.dst, p.src, typ, code, p, true))
			}
			ask := func(q string) {
				t.Helper()
				if _, err := client.WriteToUDPAddrPort([]byte(q), l.Host); err != nil {
					t.Fatal(err)
				}
			}
			ask("question")
			refuse()
			src, dst, payload, _ := w.recvUDP()
			if dst != at(c.other, 80) || src.Addr() != c.gateway || string(payload) != "question" {
				t.Fatalf("after the refusal the sandbox got %q from %s to %s", payload, src, dst)
			}
			w.send(udpPacket(dst, src, []byte("answer")))
			if got, from := read(t, client); string(got) != "answer" || from != l.Host {
				t.Fatalf("the client got %q from %s", got, from)
			}
			ask("again")
			if _, dst, _, _ := w.recvUDP(); dst != at(c.other, 80) {
				t.Errorf("the flow's next datagram went to %s", dst)
			}
			if n := w.table.Len(); n != 1 {
				t.Errorf("%d flows, expected one", n)
			}
			client.Close()
			client = udpServer(t, at(l.Host.Addr(), 0).String())
			ask("another")
			if _, dst, _, _ := w.recvUDP(); dst != at(c.other, 80) {
				t.Errorf("the next client's datagram went to %s first", dst)
			}

			// A datagram that both refuse is tried once at each, and then its flow is over.
			client.Close()
			client = udpServer(t, at(l.Host.Addr(), 0).String())
			ask("to nobody")
			refuse()
			refuse()
			w.silent("a datagram that both families refused")
			if n := w.table.Len(); n != 2 {
				t.Errorf("%d flows, expected those of the two clients before", n)
			}
		})
	}
}

func TestUDPPublishedPortIsJudgedByIngressRules(t *testing.T) {
	w := newWire(t, allowNone, nil)
	l := publishUDP(w, "127.0.0.1:0", guest4)
	client := udpServer(t, "127.0.0.1:0")
	_, _ = client.WriteToUDPAddrPort([]byte("hello"), l.Host)
	testutil.Eventually(t, "the datagram is refused", func() bool { return w.f.Stats()["udp_ingress_refused_by_policy"] == 1 })
	w.silent("a refused client")
}

func TestUDPUnpublishEndsItsFlowsAndFreesThePort(t *testing.T) {
	w := newWire(t, allowAll, nil)
	l := publishUDP(w, "127.0.0.1:0", guest4)
	client := udpServer(t, "127.0.0.1:0")
	_, _ = client.WriteToUDPAddrPort([]byte("hello"), l.Host)
	src, dst, _, _ := w.recvUDP()
	if !w.f.Unpublish(unix.IPPROTO_UDP, l.Host) {
		t.Fatal("nothing was unpublished")
	}
	if n := w.table.Len(); n != 0 {
		t.Errorf("%d flows left", n)
	}
	again, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(l.Host))
	if err != nil {
		t.Fatalf("the port is still taken: %v", err)
	}
	again.Close()
	client.Close()
	w.send(udpPacket(dst, src, []byte("to nobody now")))
	w.wantError("what the sandbox still sends meets a closed port of the host", 3, 3, gateway4)
}

func TestUDPClientsOnLoopbackWithOnePortAreToldApart(t *testing.T) {
	w := newWire(t, allowAll, nil)
	l := publishUDP(w, "0.0.0.0:0", guest4)
	a := udpServer(t, "127.0.0.1:0")
	b := udpServer(t, at(netip.MustParseAddr("127.0.0.2"), portOf(a)).String())
	to := at(netip.MustParseAddr("127.0.0.1"), l.Host.Port())
	var seen []netip.AddrPort
	for _, c := range []*net.UDPConn{a, b} {
		_, _ = c.WriteToUDPAddrPort([]byte("hello"), to)
		src, _, _, _ := w.recvUDP()
		seen = append(seen, src)
	}
	if seen[0] == seen[1] {
		t.Fatalf("both clients are seen as %s", seen[0])
	}
	for i, c := range []*net.UDPConn{a, b} {
		w.send(udpPacket(at(guest4, 80), seen[i], []byte{byte(i)}))
		if got, _ := read(t, c); len(got) != 1 || got[0] != byte(i) {
			t.Fatalf("client %d got %v", i, got)
		}
	}
}

func TestUDPClientOfSeveralHostPortsIsAnsweredByTheOneItAsked(t *testing.T) {
	ns := inNetns(t)
	for _, a := range []string{"192.0.2.10", "192.0.2.11", "192.0.2.20"} {
		ip(t, "addr", "add", a+"/32", "dev", "lo")
	}
	for _, c := range []struct {
		what, client string
		listen, to   []string
	}{
		{"two ports of the host", "192.0.2.20:0", []string{"0.0.0.0:8080", "0.0.0.0:8081"}, []string{"192.0.2.10:8080", "192.0.2.10:8081"}},
		{"two addresses of the host", "192.0.2.20:0", []string{"0.0.0.0:8080"}, []string{"192.0.2.10:8080", "192.0.2.11:8080"}},
		{"two addresses, a port each", "192.0.2.20:0", []string{"192.0.2.10:8080", "192.0.2.11:8080"}, []string{"192.0.2.10:8080", "192.0.2.11:8080"}},
		{"a client on loopback", "127.0.0.1:0", []string{"127.0.0.1:8080", "127.0.0.1:8081"}, []string{"127.0.0.1:8080", "127.0.0.1:8081"}},
	} {
		ns.run(t, c.what, func(t *testing.T) {
			w := newWire(t, allowAll, nil)
			for _, l := range c.listen {
				publishUDP(w, l, guest4)
			}
			client := udpServer(t, c.client)
			seen := make([]netip.AddrPort, len(c.to))
			for range 2 { // the second time, all flows exist
				for i, to := range c.to {
					if _, err := client.WriteToUDPAddrPort([]byte(to), netip.MustParseAddrPort(to)); err != nil {
						t.Fatal(err)
					}
					var payload []byte
					seen[i], _, payload, _ = w.recvUDP()
					if string(payload) != to {
						t.Fatalf("the sandbox got %q, expected %q", payload, to)
					}
				}
				for i, to := range c.to {
					w.send(udpPacket(at(guest4, 80), seen[i], []byte(to)))
					if got, from := read(t, client); string(got) != to || from.String() != to {
						t.Errorf("the answer of %s is %q from %s", to, got, from)
					}
				}
			}
			for _, to := range c.to {
				if l := w.table.Lookup(nat.NewTuple(unix.IPPROTO_UDP, srvAddr(client), netip.MustParseAddrPort(to))); l == nil {
					t.Errorf("no flow in the table to %s: %v", to, w.table.List())
				}
			}
		})
	}
}
