package forwarder

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/internal/testutil"
)

// probed returns the keepalive of a host socket.
func probed(t *testing.T, fd int) (k hostsock.Keepalive, on bool) {
	t.Helper()
	get := func(level, name int) int {
		n, err := unix.GetsockoptInt(fd, level, name)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	k.Time = time.Duration(get(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)) * time.Second
	k.Interval = time.Duration(get(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)) * time.Second
	k.Probes = get(unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
	return k, get(unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 0
}

func TestBothHalvesOfAConnectionAreProbed(t *testing.T) {
	for _, want := range []hostsock.Keepalive{hostsock.DefaultKeepalive(), {Time: 7 * time.Second, Interval: 3 * time.Second, Probes: 5}} {
		g := newGuest(t, allowAll, func(c *Config) {
			if want != hostsock.DefaultKeepalive() {
				c.Keepalive = want
			}
		})
		check := func(what string) {
			t.Helper()
			fl := g.onlyFlow(what, func(fl *tcpflow.Flow) bool { return fl.Live.Load() })
			if k, on := probed(t, fl.FD); k != want || !on {
				t.Errorf("%s: the host's side has %+v, on %v, want %+v", what, k, on, want)
			}
			var idle tcpip.KeepaliveIdleOption
			if terr := fl.Ep.GetSockOpt(&idle); terr != nil || time.Duration(idle) != want.Time || !fl.Ep.SocketOptions().GetKeepAlive() {
				t.Errorf("%s: the sandbox's side is probed after %v, %v", what, time.Duration(idle), terr)
			}
		}
		c := g.mustDial(g.listen("tcp4", echo))
		roundTrip(t, c)
		check("out of the sandbox")
		c.Close()
		testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
		g.serveInside(80, func(c *gonet.TCPConn) { _, _ = io.Copy(c, c) })
		host := hostDial(t, g.publishTCP("127.0.0.1:0", 80))
		if _, err := host.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(host, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		check("into a published port")
	}
}

func TestKeepaliveSysctlsAreBounded(t *testing.T) {
	for _, row := range []struct {
		name, value string
		want        string // "" if refused
	}{
		{"net.ipv4.tcp_keepalive_time", "30", "30"},
		{"tcp_keepalive_intvl", " 15 ", "15"},
		{"tcp_keepalive_probes", "127", "127"},
		{"tcp_keepalive_probes", "128", ""},
		{"tcp_keepalive_time", "32767", "32767"},
		{"tcp_keepalive_time", "32768", ""},
		{"tcp_keepalive_time", "0", ""},
		{"tcp_keepalive_intvl", "a minute", ""},
	} {
		k := hostsock.DefaultKeepalive()
		err := k.SetSysctl(row.name, row.value)
		if row.want == "" {
			if err == nil || k != hostsock.DefaultKeepalive() {
				t.Errorf("%s=%s: %v, %+v, want refused", row.name, row.value, err, k)
			}
			continue
		}
		if got := k.Sysctl(row.name); err != nil || got != row.want {
			t.Errorf("%s=%s: %v, reads %s", row.name, row.value, err, got)
		}
	}
	if hostsock.IsKeepaliveSysctl("nf_conntrack_max") || hostsock.IsKeepaliveSysctl("") {
		t.Error("another setting is taken for keepalive's")
	}
}

// A client half-closes and vanishes; its kernel answers the next probe with a reset.
func TestTCPAResetBehindTheSandboxsEndOfStreamReachesTheServer(t *testing.T) {
	w := newWire(t, allowAll, nil)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	eof, ended := make(chan error, 1), make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, err = io.Copy(io.Discard, c)
		eof <- err
		raw, _ := c.(*net.TCPConn).SyscallConn()
		var state uint8
		for state != unix.BPF_TCP_CLOSE { // a silent server's kernel learns of the reset
			_ = raw.Control(func(fd uintptr) {
				if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
					state = info.State
				}
			})
			time.Sleep(time.Millisecond)
		}
		ended <- nil
	}()
	a := &again{w: w, src: netip.AddrPortFrom(guest4, 40000), dst: netip.AddrPortFrom(gateway4, uint16(l.Addr().(*net.TCPAddr).Port))}
	a.syn()
	a.established(0)
	a.send(header.TCPFlagFin | header.TCPFlagAck)
	a.seq++
	if err := <-eof; err != nil {
		t.Fatal(err)
	}
	a.w.send(segment(a.src, a.dst, header.TCPFlagRst, a.seq, 0))
	testutil.Eventually(t, "the flow has ended", func() bool { return w.table.Len() == 0 && w.f.dialer.Sockets.Load() == 0 })
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the server's kernel knows of no reset")
	}
}

// The sandbox's half is probed while the server is silent.
func TestTCPAClientThatIsGoneIsFoundByAProbe(t *testing.T) {
	for _, half := range []string{"open", "half-closed"} {
		t.Run(half, func(t *testing.T) {
			w := newWire(t, allowAll, func(c *Config) { c.Keepalive = hostsock.Keepalive{Time: time.Second, Interval: time.Second, Probes: 3} })
			a := &again{w: w, src: netip.AddrPortFrom(guest4, 40000), dst: netip.AddrPortFrom(gateway4, listenSilent(t))}
			a.syn()
			a.established(0)
			if half == "half-closed" {
				a.send(header.TCPFlagFin | header.TCPFlagAck)
				a.seq++
				w.recvTCP(a.src.Port(), header.TCPFlagAck)
			}
			for {
				probe := w.recvTCP(a.src.Port(), header.TCPFlagAck)
				if probe.SequenceNumber() == a.ack-1 { // RFC 9293 section 3.8.4
					w.send(segment(a.src, a.dst, header.TCPFlagRst, probe.AckNumber(), 0)) // from a kernel that knows no such connection
					break
				}
			}
			testutil.Eventually(t, "the flow has ended", func() bool { return w.table.Len() == 0 && w.f.dialer.Sockets.Load() == 0 })
		})
	}
}

// listenSilent accepts connections, and neither says nor closes anything.
func listenSilent(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns := make(chan net.Conn, 16)
	go func() {
		defer close(conns)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c
		}
	}()
	t.Cleanup(func() {
		l.Close()
		for c := range conns {
			c.Close()
		}
	})
	return uint16(l.Addr().(*net.TCPAddr).Port)
}
