package forwarder

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

// serveInside listens in the guest and serves each connection with handle.
func (g *guest) serveInside(port uint16, handle func(*gonet.TCPConn)) {
	g.t.Helper()
	l, err := gonet.ListenTCP(g.stack, full(netip.AddrPortFrom(guest4, port)), netProto(guest4))
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

// publishTCP publishes guest port on an address of the host and returns where.
func (g *guest) publishTCP(host string, port uint16) netip.AddrPort {
	g.t.Helper()
	l, err := net.Listen("tcp4", host)
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
	at := l.Addr().(*net.TCPAddr).AddrPort()
	if err := g.f.Publish(Listener{Proto: unix.IPPROTO_TCP, FD: fd, Host: at, Guest: netip.AddrPortFrom(guest4, port)}); err != nil {
		g.t.Fatal(err)
	}
	return at
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
	eventually(t, "every flow has left the table", func() bool { return g.table.Len() == 0 })
}

func TestPublishedFlowsStandInTheTableFromTheClientsSide(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	g.serveInside(80, func(c *gonet.TCPConn) { _, _ = io.Copy(c, c) })
	c := hostDial(t, g.publishTCP("127.0.0.1:0", 80))
	_, _ = c.Write(make([]byte, 1000))
	_, _ = io.ReadFull(c, make([]byte, 1000))
	l := g.table.List()
	if len(l) != 1 {
		t.Fatalf("%d flows", len(l))
	}
	fl := l[0]
	client := c.LocalAddr().(*net.TCPAddr).AddrPort()
	if fl.Orig.Src() != client || fl.Orig.Dst() != netip.AddrPortFrom(guest4, 80) || fl.State.String() != "ESTABLISHED" {
		t.Errorf("the flow is %v in %v, want from %s to the guest's port 80, ESTABLISHED", fl.Orig, fl.State, client)
	}
}

func TestPublishedPortNobodyServesInsideIsReset(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	wantReset(t, g.publishTCP("127.0.0.1:0", 81))
	eventually(t, "the flow has left the table", func() bool { return g.table.Len() == 0 })
}

func TestPublishedPortsObeyIngressRules(t *testing.T) {
	g := newGuest(t, strings.Replace(allowAll, "{name: published, action: allow}", "{name: nobody, action: reject}", 1), nil)
	g.serveInside(80, func(*gonet.TCPConn) { t.Error("a refused client came through") })
	wantReset(t, g.publishTCP("127.0.0.1:0", 80))
}

// wantReset connects and wants the connection reset, which may come so early that
// connecting reports it.
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
	if err := g.f.Publish(Listener{Proto: unix.IPPROTO_TCP, FD: -1, Host: at}); !errors.Is(err, ErrPublished) {
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
	before := openFDs(t)
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
	eventually(t, "the relay has given everything back", func() bool { return g.table.Len() == 0 && openFDs(t) <= before })
	if g.f.Stats()["tcp_relayed_loopback"] != 1 {
		t.Error("the flow did not take the short cut")
	}
}

func TestLoopbackClientsOfAServerOnTheLinkGoThroughTheStack(t *testing.T) {
	g := newGuest(t, allowAll, func(c *Config) { c.Guests = &hostsOwn{} })
	g.serveInside(1, func(c *gonet.TCPConn) { _, _ = io.Copy(c, c) }) // nobody on the host's own port 1
	c := hostDial(t, g.publishTCP("127.0.0.1:0", 1))
	_, _ = c.Write([]byte("hello"))
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
}

func openFDs(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}
