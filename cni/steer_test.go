package cni

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

// What comes from outside: to the worker's sockets what is theirs, all else to in0. The
// test is the worker: it has in0's descriptor, and sockets in the uplink namespace.

// captiveLauncher keeps in0 for the test.
type captiveLauncher struct {
	*procLauncher
	in0 int
}

func (l *captiveLauncher) Launch(ctx context.Context, a LaunchSpec) (int, uint64, error) {
	raw, err := a.InboundFD.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	err = raw.Control(func(fd uintptr) { l.in0, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) })
	if err != nil {
		return 0, 0, err
	}
	return l.procLauncher.Launch(ctx, a)
}

// vnetHeader is how many bytes stand before each packet.
const vnetHeader = 10

// inbound is the parts of a packet that the tests look at.
type inbound struct {
	src, dst netip.Addr
	proto    byte
	hops     byte
	payload  []byte
}

// next reads the next packet from in0, or fails if there is none.
func (l *captiveLauncher) next(t *testing.T) inbound {
	t.Helper()
	p, ok := l.poll(t, 5000)
	if !ok {
		t.Fatal("no packet came to in0")
	}
	return p
}

func (l *captiveLauncher) poll(t *testing.T, ms int) (p inbound, ok bool) {
	t.Helper()
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(l.in0), Events: unix.POLLIN}}, ms); err != nil || n == 0 {
		return p, false
	}
	b := make([]byte, 1<<16)
	n, err := unix.Read(l.in0, b)
	testutil.Must(t, err)
	b = b[vnetHeader:n]
	if b[0]>>4 == 4 {
		head := int(b[0]&15) * 4
		p = inbound{netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[9], b[8], b[head:]}
	} else {
		p = inbound{netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), b[6], b[7], b[40:]}
	}
	if p.dst.IsMulticast() {
		return l.poll(t, ms) // the kernel tells in0 what groups it is in
	}
	return p, true
}

// in runs f on a thread in a namespace, whose sockets stay there.
func in(t *testing.T, n ns.NetNS, f func() error) {
	t.Helper()
	testutil.Must(t, n.Do(func(ns.NetNS) error { return f() }))
}

func newSteered(t *testing.T) (*node, *captiveLauncher, ns.NetNS) {
	n := newNode(t)
	l := &captiveLauncher{procLauncher: n.procs}
	n.plugin.Launcher = l
	testutil.Must(t, n.add())
	t.Cleanup(func() {
		_ = unix.Close(l.in0)
		if err := n.del(); err != nil {
			t.Error(err)
		}
	})
	up, _ := n.uplink()
	// Neighbours are found before anything is counted; what is sent to port 9 is dropped here.
	for _, a := range []string{pod4, pod6} {
		send(t, udpTo(t, a, 9), "first")
		if p := l.next(t); p.proto != unix.IPPROTO_UDP {
			t.Fatalf("protocol %d came instead of the first datagram", p.proto)
		}
	}
	return n, l, up
}

func udpTo(t *testing.T, addr string, port uint16) *net.UDPConn {
	t.Helper()
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), port)))
	testutil.Must(t, err)
	t.Cleanup(func() { c.Close() })
	testutil.Must(t, c.SetDeadline(time.Now().Add(5*time.Second)))
	return c
}

func send(t *testing.T, c net.Conn, text string) {
	t.Helper()
	_, err := c.Write([]byte(text))
	testutil.Must(t, err)
}

func listen(t *testing.T, n ns.NetNS, addr string) (c *net.UDPConn) {
	t.Helper()
	in(t, n, func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), 0)))
		return err
	})
	t.Cleanup(func() { c.Close() })
	testutil.Must(t, c.SetDeadline(time.Now().Add(5*time.Second)))
	return c
}

func portOf(c *net.UDPConn) uint16 { return c.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

func TestSocketsGetTheirsAndIn0TheRest(t *testing.T) {
	n, l, up := newSteered(t)
	for _, f := range []struct{ name, host, pod string }{{"IPv4", host4, pod4}, {"IPv6", host6, pod6}} {
		t.Run(f.name, func(t *testing.T) {
			n.hostThread(t)
			// A datagram that a socket waits for, whole and in fragments.
			worker := listen(t, up, f.pod)
			client := udpTo(t, f.pod, portOf(worker))
			for _, size := range []int{10, 5000} {
				send(t, client, string(make([]byte, size)))
				b := make([]byte, 10000)
				if got, err := worker.Read(b); err != nil || got != size {
					t.Errorf("of a datagram of %d bytes the worker's socket got %d: %v", size, got, err)
				}
			}
			// The same to nobody's port.
			other := udpTo(t, f.pod, 4242)
			send(t, other, "to the pod")
			if p := l.next(t); p.proto != unix.IPPROTO_UDP || p.dst.String() != f.pod || p.src.String() != f.host || string(p.payload[8:]) != "to the pod" {
				t.Errorf("in0 got %+v", p)
			}
			// A connection of the worker's own, and a SYN to the pod.
			workerDials(t, up, f.host)
			go func() {
				d := net.Dialer{Timeout: 100 * time.Millisecond}
				n.hostThread(t)
				if c, err := d.Dial("tcp", net.JoinHostPort(f.pod, "80")); err == nil {
					c.Close()
					t.Error("somebody accepted a connection to the pod")
				}
			}()
			if p := l.next(t); p.proto != unix.IPPROTO_TCP || binary.BigEndian.Uint16(p.payload[2:]) != 80 {
				t.Errorf("in0 got %+v instead of a SYN", p)
			}
			drain(t, l)
		})
	}
}

// hostThread binds the goroutine to a thread in the node's host namespace. Subtests have
// goroutines of their own, which start on any thread.
func (n *node) hostThread(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	testutil.Must(t, unix.Setns(int(n.host.Fd()), unix.CLONE_NEWNET))
}

// workerDials connects from the uplink namespace to a listener of the host, both ways.
func workerDials(t *testing.T, up ns.NetNS, host string) {
	t.Helper()
	ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	testutil.Must(t, err)
	defer ln.Close()
	var c net.Conn
	in(t, up, func() (err error) {
		c, err = net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second)
		return err
	})
	defer c.Close()
	s, err := ln.Accept()
	testutil.Must(t, err)
	defer s.Close()
	send(t, s, "back")
	b := make([]byte, 4)
	if _, err := c.Read(b); err != nil || string(b) != "back" {
		t.Errorf("the worker's connection got %q: %v", b, err)
	}
}

// drain empties in0 of what retransmissions have left there.
func drain(t *testing.T, l *captiveLauncher) {
	t.Helper()
	for {
		if _, ok := l.poll(t, 0); !ok {
			return
		}
	}
}

func TestEchoIsThePodsAndItsRepliesAreTheWorkers(t *testing.T) {
	n, l, up := newSteered(t)
	for _, f := range []struct {
		name, net, host, pod string
		request, reply       icmp.Type
		proto                byte
	}{
		{"IPv4", "udp4", host4, pod4, ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply, unix.IPPROTO_ICMP},
		{"IPv6", "udp6", host6, pod6, ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply, unix.IPPROTO_ICMPV6},
	} {
		t.Run(f.name, func(t *testing.T) {
			n.hostThread(t)
			testutil.Must(t, os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0))
			echo := func(c *icmp.PacketConn, to string) {
				m := icmp.Message{Type: f.request, Body: &icmp.Echo{Seq: 1, Data: []byte("echo")}}
				b, err := m.Marshal(nil)
				testutil.Must(t, err)
				_, err = c.WriteTo(b, &net.UDPAddr{IP: net.ParseIP(to)})
				testutil.Must(t, err)
			}
			var worker *icmp.PacketConn
			in(t, up, func() (err error) { worker, err = icmp.ListenPacket(f.net, f.pod); return err })
			defer worker.Close()
			testutil.Must(t, worker.SetDeadline(time.Now().Add(5*time.Second)))
			echo(worker, f.host)
			b := make([]byte, 100)
			if n, _, err := worker.ReadFrom(b); err != nil || n != 12 {
				t.Errorf("the worker's ping socket got %d bytes: %v", n, err)
			}
			host, err := icmp.ListenPacket(f.net, f.host)
			testutil.Must(t, err)
			defer host.Close()
			echo(host, f.pod)
			if p := l.next(t); p.proto != f.proto || string(p.payload[8:]) != "echo" {
				t.Errorf("in0 got %+v instead of the echo request", p)
			}
		})
	}
}

func TestAPacketWithOneHopLeftArrives(t *testing.T) {
	_, l, _ := newSteered(t)
	for _, addr := range []string{pod4, pod6} {
		c := udpTo(t, addr, 4242)
		raw, err := c.SyscallConn()
		testutil.Must(t, err)
		testutil.Must(t, raw.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, 1))
			if addr == pod6 {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, 1)
			}
		}))
		testutil.Must(t, err)
		send(t, c, "one hop")
		if p := l.next(t); p.hops != 1 || string(p.payload[8:]) != "one hop" {
			t.Errorf("in0 got %+v", p)
		}
	}
}

func TestWithoutItsMonitorAPodAnswersNothing(t *testing.T) {
	n, l, _ := newSteered(t)
	endProcess(n.procs.pid(n.name()))
	testutil.Must(t, unix.Close(l.in0))
	l.in0 = -1
	for _, addr := range []string{pod4, pod6} {
		c := udpTo(t, addr, 4242)
		testutil.Must(t, c.SetDeadline(time.Now().Add(200*time.Millisecond)))
		send(t, c, "anybody?")
		if _, err := c.Read(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s answered: %v", addr, err)
		}
	}
}
