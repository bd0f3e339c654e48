package forwarder

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

// serveInside listens in the guest and serves each connection with handle.
func (g *guest) serveInside(port uint16, handle func(*gonet.TCPConn)) {
	g.t.Helper()
	l, err := gonet.ListenTCP(g.stack, full(netip.AddrPortFrom(guest4, port)), packet.NetProto(guest4))
	if err != nil {
		g.t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); handle(c.(*gonet.TCPConn)) }()
		}
	}()
	g.t.Cleanup(func() { l.Close() })
}

// publishTCP publishes a guest port on an address of the host and returns where.
func (g *guest) publishTCP(host string, port uint16) netip.AddrPort {
	g.t.Helper()
	return g.publishListener(host, hostsock.Listener{Guest: at(guest4, port)})
}

// publishListener publishes, on an address of the host, what leads where p says.
func (g *guest) publishListener(host string, p hostsock.Listener) netip.AddrPort {
	g.t.Helper()
	l, err := net.Listen("tcp", host)
	if err != nil {
		g.t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		g.t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		g.t.Fatal(err)
	}
	_ = unix.SetNonblock(fd, true)
	p.Proto, p.FD, p.Host = unix.IPPROTO_TCP, fd, l.Addr().(*net.TCPAddr).AddrPort()
	if err := g.f.Publish(p); err != nil {
		g.t.Fatal(err)
	}
	return p.Host
}

func hostDial(t *testing.T, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c
}

func TestPublishedPortsCarryConnectionsIn(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	peers := make(chan string, 1)
	g.serveInside(80, func(c *gonet.TCPConn) {
		peers <- c.RemoteAddr().String()
		all, _ := io.ReadAll(c)
		_, _ = c.Write([]byte(strings.ToUpper(string(all))))
	})
	at := g.publishTCP("127.0.0.1:0", 80)
	for range 5 {
		c := hostDial(t, at)
		_, _ = c.Write([]byte("in and out"))
		_ = c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "IN AND OUT" {
			t.Fatalf("the client read %q, %v", b, err)
		}
		// Without sockets inside, a loopback client is the gateway, with its own port.
		want := netip.AddrPortFrom(gateway4, c.LocalAddr().(*net.TCPAddr).AddrPort().Port()).String()
		if got := <-peers; got != want {
			t.Errorf("inside, the client was %s, want %s", got, want)
		}
	}
	testutil.Eventually(t, "every flow has left the table", func() bool { return g.table.Len() == 0 })
}

func TestPublishedFlowsStandInTheTableFromTheClientsSide(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	g.serveInside(80, func(c *gonet.TCPConn) { _, _ = io.Copy(c, c) })
	to := g.publishTCP("127.0.0.1:0", 80)
	c := hostDial(t, to)
	_, _ = c.Write(make([]byte, 1000))
	_, _ = io.ReadFull(c, make([]byte, 1000))
	l := g.table.List()
	if len(l) != 1 {
		t.Fatalf("%d flows", len(l))
	}
	fl := l[0]
	client := c.LocalAddr().(*net.TCPAddr).AddrPort()
	if fl.Orig.Src() != client || fl.Orig.Dst() != to || fl.State.String() != "ESTABLISHED" {
		t.Errorf("the flow is %v in %v, want from %s to %s, ESTABLISHED", fl.Orig, fl.State, client, to)
	}
	if want := nat.NewTuple(unix.IPPROTO_TCP, at(guest4, 80), at(gateway4, client.Port())); fl.Reply != want {
		t.Errorf("the answers are %v, want %v", fl.Reply, want)
	}
}

func TestPublishedPortNobodyServesInsideIsReset(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	wantReset(t, g.publishTCP("127.0.0.1:0", 81))
	testutil.Eventually(t, "the flow has left the table", func() bool { return g.table.Len() == 0 })
}

func TestPublishedPortsObeyIngressRules(t *testing.T) {
	g := newGuest(t, strings.Replace(allowAll, "{name: published, action: allow}", "{name: nobody, action: reject}", 1), nil)
	g.serveInside(80, func(*gonet.TCPConn) { t.Error("a refused client came through") })
	wantReset(t, g.publishTCP("127.0.0.1:0", 80))
}

// wantReset connects and expects a reset, which may come so early that connecting reports it.
func wantReset(t *testing.T, to netip.AddrPort) {
	t.Helper()
	c, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(to))
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("the client saw %v, want a reset", err)
	}
}

func TestPublishAndUnpublish(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	at := g.publishTCP("127.0.0.1:0", 80)
	if err := g.f.Publish(hostsock.Listener{Proto: unix.IPPROTO_TCP, FD: -1, Host: at}); !errors.Is(err, hostsock.ErrPublished) {
		t.Errorf("publishing it twice: %v", err)
	}
	if l := g.f.Published(); len(l) != 1 || l[0].Host != at {
		t.Errorf("Published: %v", l)
	}
	if !g.f.Unpublish(unix.IPPROTO_TCP, at) || g.f.Unpublish(unix.IPPROTO_TCP, at) {
		t.Error("Unpublish does not tell whether there was one")
	}
	if _, err := net.Dial("tcp4", at.String()); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dialling an unpublished port: %v, want refused", err)
	}
}

// hostsOwn stands for a sandbox's namespace: its sockets are the host's.
type hostsOwn struct{ made atomic.Int32 }

func (h *hostsOwn) Stream(v6 bool) (int, bool) {
	domain := unix.AF_INET
	if v6 {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	h.made.Add(1)
	return fd, err == nil
}

func TestLoopbackClientsAreRelayedAsThemselves(t *testing.T) {
	sockets := &hostsOwn{}
	g := newGuest(t, allowAll, func(c *Config) { c.Guests = sockets })
	inside, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	peers := make(chan string, 1)
	go func() {
		for {
			c, err := inside.Accept()
			if err != nil {
				return
			}
			peers <- c.RemoteAddr().(*net.TCPAddr).IP.String()
			all, _ := io.ReadAll(c)
			_, _ = c.Write(all)
			c.Close()
		}
	}()
	at := g.publishTCP("127.0.0.1:0", uint16(inside.Addr().(*net.TCPAddr).Port))
	before := testutil.Descriptors(t, os.Getpid())
	data := make([]byte, 8<<20)
	for i := range data {
		data[i] = byte(i * 7)
	}
	c := hostDial(t, at)
	go func() {
		_, _ = c.Write(data)
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != string(data) {
		t.Fatalf("%d of %d bytes came back, %v", len(got), len(data), err)
	}
	if p := <-peers; p != "127.0.0.1" {
		t.Errorf("inside, the client was %s", p)
	}
	c.Close()
	testutil.Eventually(t, "the relay has given everything back", func() bool { return g.table.Len() == 0 && testutil.Descriptors(t, os.Getpid()) <= before })
	if g.f.Stats()["tcp_relayed_loopback"] != 1 {
		t.Error("the flow did not take the short cut")
	}
}

func TestLoopbackClientsOfAServerOnTheLinkGoThroughTheStack(t *testing.T) {
	g := newGuest(t, allowAll, func(c *Config) { c.Guests = &hostsOwn{} })
	g.serveInside(1, func(c *gonet.TCPConn) { _, _ = io.Copy(c, c) }) // no server on the host's own port 1
	c := hostDial(t, g.publishTCP("127.0.0.1:0", 1))
	_, _ = c.Write([]byte("hello"))
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
}

// dialFrom connects from a given port, which other connections may use too.
func dialFrom(t *testing.T, from, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Timeout: 5 * time.Second, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	c, err := d.Dial("tcp4", to.String())
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func TestOneClientPortReachesOneGuestPortBySeveralHostPorts(t *testing.T) {
	for _, c := range []struct {
		what    string
		sockets GuestSockets
	}{
		{"through the stack", nil},
		{"from loopback to loopback", &hostsOwn{}},
	} {
		t.Run(c.what, func(t *testing.T) {
			g := newGuest(t, allowAll, func(cfg *Config) { cfg.Guests = c.sockets })
			// The same server is on the host, which hostsOwn treats as the sandbox's namespace.
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
				}
			}()
			port := uint16(l.Addr().(*net.TCPAddr).Port)
			g.serveInside(port, func(c *gonet.TCPConn) { _, _ = io.Copy(c, c) })
			one, two := g.publishTCP("0.0.0.0:0", port), g.publishTCP("0.0.0.0:0", port)
			host := func(addr string, p netip.AddrPort) netip.AddrPort { return at(netip.MustParseAddr(addr), p.Port()) }
			client := netip.MustParseAddrPort("127.0.0.1:0")
			var conns []*net.TCPConn
			to := []netip.AddrPort{host("127.0.0.1", one), host("127.0.0.1", two), host("127.0.0.2", one), host("127.0.0.2", two)}
			for _, a := range to {
				conn := dialFrom(t, client, a)
				client = conn.LocalAddr().(*net.TCPAddr).AddrPort()
				conns = append(conns, conn)
			}
			for i, conn := range conns {
				word := to[i].String()
				_, _ = conn.Write([]byte(word))
				got := make([]byte, len(word))
				if _, err := io.ReadFull(conn, got); err != nil || string(got) != word {
					t.Fatalf("to %s: %q, %v", word, got, err)
				}
				l := g.table.Lookup(nat.NewTuple(unix.IPPROTO_TCP, client, to[i]))
				if l == nil {
					t.Fatalf("no flow to %s in the table: %v", word, g.table.List())
				}
				if reply := l.Snapshot().Reply; reply.Src() != at(guest4, port) {
					t.Errorf("the answers to %s come from %s", word, reply.Src())
				}
			}
		})
	}
}

func TestClientMayConnectAgainFromThePortItHasJustReset(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	g.serveInside(80, func(c *gonet.TCPConn) { _, _ = io.Copy(c, c) })
	to := g.publishTCP("127.0.0.1:0", 80)
	client := netip.MustParseAddrPort("127.0.0.1:0")
	for range 300 {
		c := dialFrom(t, client, to)
		client = c.LocalAddr().(*net.TCPAddr).AddrPort()
		_, _ = c.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		_ = c.SetLinger(0)
		c.Close()
	}
}

func TestSourcePortsAreOfTheClientsKindAndDiffer(t *testing.T) {
	for _, port := range []uint16{0, 1, 22, 511, 512, 599, 600, 1023, 1024, 40000, 65535} {
		kind := func(p uint16) int {
			switch {
			case p < 512:
				return 0
			case p < 1024:
				return 1
			}
			return 2
		}
		seen := map[uint16]bool{}
		for p := range onlink.SourcePorts(port) {
			if len(seen) == 0 && port != 0 && p != port {
				t.Errorf("the first port for %d is %d", port, p)
			}
			if p == 0 || seen[p] || kind(p) != kind(port) {
				t.Errorf("%d appears under %d", port, p)
			}
			seen[p] = true
		}
		if len(seen) < onlink.SourceTries-1 {
			t.Errorf("%d ports for %d", len(seen), port)
		}
	}
}

func TestClientFindsTheServerOfTheOtherFamily(t *testing.T) {
	ns := inNetns(t)
	ip(t, "addr", "add", "192.0.2.10/32", "dev", "lo")
	ip(t, "addr", "add", "2001:db8::10/128", "dev", "lo", "nodad")
	for _, c := range []struct {
		what, host, inside string // inside: on the sandbox's loopback
		onLink             netip.Addr
	}{
		{"a client on ::1, a server on 127.0.0.1", "[::1]:0", "127.0.0.1:0", netip.Addr{}},
		{"a client on 127.0.0.1, a server on ::1", "127.0.0.1:0", "[::1]:0", netip.Addr{}},
		{"a client on ::1, a server on the link's IPv4 address", "[::1]:0", "", guest4},
		{"a client on 127.0.0.1, a server on the link's IPv6 address", "127.0.0.1:0", "", guest6},
		{"a client on the network over IPv6, a server of IPv4", "[2001:db8::10]:0", "", guest4},
		{"a client on the network over IPv4, a server of IPv6", "192.0.2.10:0", "", guest6},
	} {
		in := func(t *testing.T, what string, f func(*testing.T)) { t.Run(what, f) }
		if c.inside == "" {
			in = ns.run
		} // otherwise in the namespace of the forwarder's goroutines, which make hostsOwn's sockets
		in(t, c.what, func(t *testing.T) {
			g := newGuest(t, allowAll, func(cfg *Config) { cfg.Guests = &hostsOwn{} })
			port := uint16(80)
			serve := func(l net.Listener) {
				t.Cleanup(func() { l.Close() })
				go func() {
					for {
						conn, err := l.Accept()
						if err != nil {
							return
						}
						go func() { defer conn.Close(); _, _ = io.Copy(conn, conn) }()
					}
				}()
			}
			if c.inside != "" {
				l, err := net.Listen("tcp", c.inside)
				if err != nil {
					t.Fatal(err)
				}
				port = l.Addr().(*net.TCPAddr).AddrPort().Port()
				serve(l)
			} else {
				l, err := gonet.ListenTCP(g.stack, full(at(c.onLink, port)), packet.NetProto(c.onLink))
				if err != nil {
					t.Fatal(err)
				}
				serve(l)
			}
			p := hostsock.Listener{Guest: at(guest4, port), Other: at(guest6, port)}
			if c.host[0] == '[' {
				p.Guest, p.Other = p.Other, p.Guest
			}
			to := g.publishListener(c.host, p)
			conn, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
			_, _ = conn.Write([]byte("hello"))
			_ = conn.CloseWrite()
			if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
				t.Fatalf("the client read %q, %v", got, err)
			}
			conn.Close()
			testutil.Eventually(t, "every flow has left the table", func() bool { return g.table.Len() == 0 })
		})
	}
}

func TestPublishedPortIsResetAtOnceWhereNeitherFamilyIsServed(t *testing.T) {
	for _, sockets := range []GuestSockets{nil, &hostsOwn{}} {
		g := newGuest(t, allowAll, func(cfg *Config) { cfg.Guests = sockets })
		wantReset(t, g.publishListener("127.0.0.1:0", hostsock.Listener{Guest: at(guest4, 1), Other: at(guest6, 1)}))
		testutil.Eventually(t, "every flow has left the table", func() bool { return g.table.Len() == 0 })
	}
}
