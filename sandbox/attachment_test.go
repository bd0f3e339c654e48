package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/sandbox/internal/registry"
	"sluice.dev/sluice/tun"
)

// The monitor of an attachment runs with real namespaces, devices, rules and a real worker. The
// kernel is at each end of the pod's traffic:
//
//	pod netns        │ uplink netns                 │ outside netns
//	eth0 tap .2 ════ worker ── sockets ── eth0 .2 ──┼── veth .1
//	                   ╚══════ in0                  │
var (
	podAddr4 = netip.MustParsePrefix("10.99.0.2/24")
	podAlso4 = netip.MustParsePrefix("10.99.0.3/24") // a second address
	podAddr6 = netip.MustParsePrefix("fd99::2/64")
)

const (
	outside4 = "10.99.0.1"
	outside6 = "fd99::1"
)

// namespace is a network namespace held by a process that does nothing.
type namespace struct {
	t   *testing.T
	pid int
}

func newNamespace(t *testing.T) namespace {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make network namespaces")
	}
	cmd := exec.Command("unshare", "-n", "sh", "-c", "echo; exec cat")
	stdin, err := cmd.StdinPipe()
	testutil.Must(t, err)
	stdout, err := cmd.StdoutPipe()
	testutil.Must(t, err)
	testutil.Must(t, cmd.Start())
	t.Cleanup(func() { _ = stdin.Close(); _ = cmd.Wait() })
	_, err = stdout.Read(make([]byte, 1))
	testutil.Must(t, err)
	n := namespace{t, cmd.Process.Pid}
	n.ip("link set lo up")
	return n
}

func (n namespace) path() string { return fmt.Sprintf("/proc/%d/ns/net", n.pid) }

// command returns a command that runs inside.
func (n namespace) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", strconv.Itoa(n.pid), "-n"}, args...)...)
}

func (n namespace) run(args ...string) string {
	n.t.Helper()
	out, err := n.command(args...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (n namespace) ip(line string) {
	n.t.Helper()
	n.run(append([]string{"ip"}, strings.Fields(line)...)...)
}

// do runs f on a thread inside, which is not used again.
func (n namespace) do(f func()) {
	n.t.Helper()
	fd, err := unix.Open(n.path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	testutil.Must(n.t, err)
	defer unix.Close(fd)
	done := make(chan error)
	process.OnOwnThread(func() {
		err := unix.Setns(fd, unix.CLONE_NEWNET)
		if err == nil {
			f()
		}
		done <- err
	})
	testutil.Must(n.t, <-done)
}

// pod is a pod whose network is set up as the plugin does it.
type pod struct {
	inside, uplink, outside namespace
	tap, in0                *tun.Device
}

// steering brings to in0 the packets that no socket of the worker waits for.
const steering = `
table inet sluice {
	chain prerouting {
		type filter hook prerouting priority mangle; policy accept;
		iifname "in0" return
		ip daddr != { 10.99.0.2, 10.99.0.3 } return
		ip6 daddr != fd99::2 return
		ct state invalid,new,established,related counter
		icmp type { echo-reply } return
		icmpv6 type { echo-reply, nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, nd-router-advert } return
		icmp type { destination-unreachable, time-exceeded, parameter-problem } @th,136,8 1 return
		icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } @th,112,8 58 return
		socket wildcard 0 return
		socket wildcard 1 return
		meta mark set 0x51
	}
}
`

func newPod(t *testing.T, kind tun.Kind) *pod {
	t.Helper()
	for _, tool := range []string{"ip", "nft", "ping", "sysctl", "unshare", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs the program %s", tool)
		}
	}
	p := &pod{inside: newNamespace(t), uplink: newNamespace(t), outside: newNamespace(t)}
	up, in := strconv.Itoa(p.uplink.pid), p.inside
	p.outside.ip("link add out0 type veth peer name eth0 netns " + up)
	p.outside.ip("addr add " + outside4 + "/24 dev out0")
	p.outside.ip("addr add " + outside6 + "/64 dev out0 nodad")
	p.outside.ip("link set out0 up")
	p.uplink.ip("addr add " + podAddr4.String() + " dev eth0")
	p.uplink.ip("addr add " + podAlso4.String() + " dev eth0")
	p.uplink.ip("addr add " + podAddr6.String() + " dev eth0 nodad")
	p.uplink.ip("link set eth0 up")
	p.uplink.ip("route add default via " + outside4)
	p.uplink.ip("-6 route add default via " + outside6)
	p.uplink.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.rp_filter=0",
		"net.ipv4.conf.all.accept_local=1", "net.ipv4.ping_group_range=0 2147483647",
		"net.ipv4.ip_local_port_range=32768 65535")

	p.uplink.do(func() {
		var err error
		p.in0, err = tun.Create(tun.Config{Name: "in0", Kind: tun.TUN, MTU: tun.MaxMTU})
		testutil.Must(t, err)
	})
	t.Cleanup(func() { _ = p.in0.Close() })
	p.uplink.ip("link set in0 up")
	p.uplink.run("sysctl", "-qw", "net.ipv4.conf.in0.rp_filter=0", "net.ipv4.conf.in0.accept_local=1")
	rules := p.uplink.command("nft", "-f", "-")
	rules.Stdin = strings.NewReader(steering)
	if out, err := rules.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	for _, v := range []string{"", "-6 "} {
		p.uplink.ip(v + "rule add pref 10 fwmark 0x51 lookup 51")
		p.uplink.ip(v + "rule add pref 100 lookup local")
		p.uplink.ip(v + "rule del pref 0")
		p.uplink.ip(v + "route add default dev in0 table 51")
	}

	in.do(func() {
		var err error
		p.tap, err = tun.Create(tun.Config{Name: "eth0", Kind: kind, MTU: 1500})
		testutil.Must(t, err)
	})
	t.Cleanup(func() { _ = p.tap.Close() })
	in.ip("addr add " + podAddr4.String() + " dev eth0")
	in.ip("addr add " + podAlso4.String() + " dev eth0")
	in.ip("addr add " + podAddr6.String() + " dev eth0 nodad")
	in.ip("link set eth0 up")
	in.ip("route add default via 169.254.1.1 dev eth0 onlink")
	in.ip("-6 route add default via fe80::1 dev eth0")
	return p
}

func (p *pod) config(t *testing.T) AttachmentConfig {
	cfg := AttachmentConfig{
		Name: "pod", RuntimeDir: testutil.ShortDir(t), Describe: []string{"pod", "default/web"},
		UplinkNetNS: p.uplink.path(), Addrs: []netip.Prefix{podAddr4, podAlso4, podAddr6},
		Link:    tun.Config{Kind: p.tap.Kind(), MTU: p.tap.MTU()},
		Inbound: tun.Config{MTU: tun.MaxMTU},
		Policy:  policy.NotGiven(policy.Builtin{Pod: true}),
	}
	for _, fd := range p.tap.FDs() {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		testutil.Must(t, err)
		cfg.Device = append(cfg.Device, guest.PlainFile(dup))
	}
	dup, err := unix.FcntlInt(uintptr(p.in0.FDs()[0]), unix.F_DUPFD_CLOEXEC, 3)
	testutil.Must(t, err)
	cfg.In0 = guest.PlainFile(dup)
	t.Cleanup(func() {
		for _, f := range append(cfg.Device, cfg.In0) {
			_ = f.Close()
		}
	})
	return cfg
}

// attach launches the monitor and stops it at the end of the test.
func attach(t *testing.T, cfg AttachmentConfig) (pid int, client api.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	pid, start, err := LaunchAttachment(ctx, "", cfg)
	testutil.Must(t, err)
	if now, err := processStart(pid); err != nil || now != start {
		t.Errorf("the monitor started at %d, was told %d, %v", now, start, err)
	}
	t.Cleanup(func() {
		if err := StopAttachment(context.Background(), cfg.RuntimeDir, cfg.Name); err != nil {
			t.Error(err)
		}
		isGone(t, pid) // its devices take the kernel a moment
		if entries, _ := os.ReadDir(cfg.RuntimeDir); len(entries) > 0 {
			t.Errorf("it left %v", entries)
		}
	})
	return pid, api.Client{Path: cfg.RuntimeDir + "/" + cfg.Name + "/" + registry.SocketFile}
}

func TestAttachmentCarriesBothWays(t *testing.T) {
	for _, kind := range []tun.Kind{tun.TAP, tun.TUN} {
		t.Run(kind.String(), func(t *testing.T) {
			p := newPod(t, kind)
			cfg := p.config(t)
			_, client := attach(t, cfg)
			testutil.Must(t, AttachmentAlive(context.Background(), cfg.RuntimeDir, cfg.Name))
			for _, family := range []struct{ name, pod, far string }{
				{"IPv4", podAddr4.Addr().String(), outside4}, {"IPv6", podAddr6.Addr().String(), outside6},
			} {
				t.Run(family.name, func(t *testing.T) {
					p.exchange(t, "tcp", p.outside, p.inside, family.pod, family.far)
					p.exchange(t, "tcp", p.inside, p.outside, family.far, family.pod)
					p.exchange(t, "udp", p.outside, p.inside, family.pod, family.far)
					p.exchange(t, "udp", p.inside, p.outside, family.far, family.pod)
					for _, size := range []string{"56", "6000"} { // the latter in fragments
						p.outside.run("ping", "-c1", "-W2", "-s", size, family.pod)
						p.inside.run("ping", "-c1", "-W2", "-s", size, family.far)
					}
					if out := p.outside.run("ping", "-c1", "-W2", family.pod); !strings.Contains(out, "ttl=64") {
						t.Errorf("somebody before the pod takes a hop:\n%s", out)
					}
					if _, err := p.outside.dial("tcp", net.JoinHostPort(family.pod, "9")); !errors.Is(err, unix.ECONNREFUSED) {
						t.Errorf("a closed port of the pod: %v, want that it is refused", err)
					}
				})
			}
			// Each address of the pod is preserved, in both directions.
			p.exchange(t, "tcp", p.outside, p.inside, podAlso4.Addr().String(), outside4)
			for _, network := range []string{"tcp", "udp"} {
				p.speakAs(t, network, podAlso4.Addr().String(), outside4)
			}
			var stats api.StatsResult
			call(t, client, api.MethodStats, nil, &stats)
			for _, part := range []string{"link", "inbound"} {
				var s tun.Stats
				testutil.Must(t, json.Unmarshal(stats.Stats[part], &s))
				if s.RxGSO == 0 || s.TxGSO == 0 {
					t.Errorf("no segments larger than the MTU passed the %s: %+v", part, s)
				}
			}
		})
	}
}

// speakAs has the pod speak from one of its addresses, which the outside must see.
func (p *pod) speakAs(t *testing.T, network, own, server string) {
	t.Helper()
	seen := make(chan string, 1)
	var at string
	if network == "udp" {
		c := p.outside.packet(net.JoinHostPort(server, "0"))
		defer c.Close()
		at = c.LocalAddr().String()
		go func() {
			if _, peer, err := c.ReadFrom(make([]byte, 10)); err == nil {
				seen <- peer.String()
			}
		}()
	} else {
		l := p.outside.listen(net.JoinHostPort(server, "0"))
		defer l.Close()
		at = l.Addr().String()
		go func() {
			if c, err := l.Accept(); err == nil {
				seen <- c.RemoteAddr().String()
				_ = c.Close()
			}
		}()
	}
	var c net.Conn
	var err error
	p.inside.do(func() {
		d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(own)}}
		if network == "udp" {
			d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(own)}
		}
		c, err = d.Dial(network, at)
	})
	testutil.Must(t, err)
	defer c.Close()
	_, _ = c.Write([]byte("hello"))
	select {
	case peer := <-seen:
		host, port, _ := net.SplitHostPort(peer)
		if n, _ := strconv.Atoi(port); host != own || network == "udp" && n < 61000 {
			t.Errorf("%s from %s is seen as from %s", network, own, peer)
		}
	case <-time.After(5 * time.Second):
		t.Errorf("%s from %s: nothing arrived", network, own)
	}
}

// exchange has a client in one namespace say something to a server in another, which answers, and
// checks that the server sees the client's address.
func (p *pod) exchange(t *testing.T, network string, from, to namespace, server, client string) {
	t.Helper()
	const size = 200_000
	seen := make(chan string, 1)
	at := net.JoinHostPort(server, "0")
	if network == "udp" {
		c := to.packet(at)
		defer c.Close()
		at = c.LocalAddr().String()
		go func() {
			b := make([]byte, 2000)
			n, peer, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(b[:n], peer)
			seen <- peer.String()
		}()
	} else {
		l := to.listen(at)
		defer l.Close()
		at = l.Addr().String()
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			seen <- c.RemoteAddr().String()
			_, _ = io.Copy(c, c)
		}()
	}
	c, err := from.dial(network, at)
	if err != nil {
		t.Errorf("%s to %s: %v", network, at, err)
		return
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	sent := make([]byte, size)
	if network == "udp" {
		sent = sent[:1000]
	}
	for i := range sent {
		sent[i] = byte(i * 7)
	}
	go func() { _, _ = c.Write(sent) }()
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%s to %s: the answer is not what was sent: %v", network, at, err)
		return
	}
	if host, _, _ := net.SplitHostPort(<-seen); host != client {
		t.Errorf("%s to %s: the server sees %s, want %s", network, at, host, client)
	}
}

func (n namespace) listen(at string) (l net.Listener) {
	n.t.Helper()
	var err error
	n.do(func() { l, err = net.Listen("tcp", at) })
	testutil.Must(n.t, err)
	return l
}

func (n namespace) packet(at string) (c net.PacketConn) {
	n.t.Helper()
	var err error
	n.do(func() { c, err = net.ListenPacket("udp", at) })
	testutil.Must(n.t, err)
	return c
}

func (n namespace) dial(network, at string) (c net.Conn, err error) {
	n.t.Helper()
	n.do(func() { c, err = net.DialTimeout(network, at, 3*time.Second) })
	return c, err
}
