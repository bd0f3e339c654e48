package forwarder

import (
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

// refuseAll refuses everything, and says so.
const refuseAll = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: refuse}
spec: {defaultAction: reject}
`

// lab is a forwarder with one way to begin a flow of a certain kind.
type lab struct {
	f     *Forwarder
	table *nat.Table
	// begin begins the flow and reports whether it carried something.
	begin func() bool
	// again reports whether the flow that begin began still carries.
	again func() bool
	// wait is how long either waits for what it expects.
	wait time.Duration
}

// expectNothing shortens the lab's wait, for tests that expect silence.
func (l *lab) expectNothing() *lab { l.wait = 300 * time.Millisecond; return l }

// kindsOfFlow lists all kinds, each in a lab of its own.
var kindsOfFlow = []struct {
	name string
	lab  func(t *testing.T, text string, change func(*Config)) *lab
}{
	{"TCP of the sandbox", labTCP("tcp4")},
	{"TCP of the sandbox by IPv6", labTCP("tcp6")},
	{"UDP of the sandbox", labUDP("udp4", guest4)},
	{"UDP of the sandbox by IPv6", labUDP("udp6", guest6)},
	{"echo of the sandbox", labEcho(guest4, gateway4)},
	{"echo of the sandbox by IPv6", labEcho(guest6, gateway6)},
	{"a published connection through the stack", labPublishedTCP(false)},
	{"a published connection that is relayed", labPublishedTCP(true)},
	{"a published datagram", labPublishedUDP},
	{"a connection from outside to a pod", labInboundTCP(client4, guest4)},
	{"a connection from outside to a pod by IPv6", labInboundTCP(client6, guest6)},
	{"a datagram from outside to a pod", labInboundUDP},
}

// says reports whether what it writes comes back.
func says(c net.Conn) bool {
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Write([]byte("ping")); err != nil {
		return false
	}
	_, err := io.ReadFull(c, make([]byte, 4))
	return err == nil
}

func labTCP(network string) func(*testing.T, string, func(*Config)) *lab {
	return func(t *testing.T, text string, change func(*Config)) *lab {
		g := newGuest(t, text, change)
		server := g.listen(network, echo)
		l := &lab{f: g.f, table: g.table}
		var c *gonet.TCPConn
		l.begin = func() bool {
			var err error
			if c, err = g.dial(server); err != nil {
				return false
			}
			t.Cleanup(func() { c.Close() })
			return says(c)
		}
		l.again = func() bool { return says(c) }
		return l
	}
}

func labPublishedTCP(relayed bool) func(*testing.T, string, func(*Config)) *lab {
	return func(t *testing.T, text string, change func(*Config)) *lab {
		g := newGuest(t, text, func(c *Config) {
			if relayed {
				c.Guests = &hostsOwn{}
			}
			if change != nil {
				change(c)
			}
		})
		port := uint16(80)
		if relayed {
			port = echoServer(t).Port()
		} else {
			g.serveInside(port, func(c *gonet.TCPConn) { _, _ = io.Copy(c, c) })
		}
		published := g.publishTCP("127.0.0.1:0", port)
		l := &lab{f: g.f, table: g.table}
		var c net.Conn
		l.begin = func() bool {
			var err error
			if c, err = net.Dial("tcp4", published.String()); err != nil {
				return false // a reset may come so early that connecting reports it
			}
			t.Cleanup(func() { c.Close() })
			return says(c)
		}
		l.again = func() bool { return says(c) }
		return l
	}
}

// echoServer serves the host's loopback.
func echoServer(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func labUDP(network string, from netip.Addr) func(*testing.T, string, func(*Config)) *lab {
	return func(t *testing.T, text string, change func(*Config)) *lab {
		w := newWire(t, text, change)
		loop, gateway := "127.0.0.1:0", gateway4
		if network == "udp6" {
			loop, gateway = "[::1]:0", gateway6
		}
		s, err := net.ListenPacket(network, loop)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		go func() { // ends with the socket
			b := make([]byte, 100)
			for {
				n, a, err := s.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = s.WriteTo(b[:n], a)
			}
		}()
		to := at(gateway, s.LocalAddr().(*net.UDPAddr).AddrPort().Port())
		return w.lab(func() ipPacket { return udpPacket(at(from, 1000), to, []byte("ping")) }, w, to.Addr())
	}
}

func labEcho(from, gateway netip.Addr) func(*testing.T, string, func(*Config)) *lab {
	return func(t *testing.T, text string, change func(*Config)) *lab {
		inNetns(t)
		ip(t, "addr", "add", "192.0.2.9/32", "dev", "lo")
		ip(t, "addr", "add", "2001:db8::9/128", "dev", "lo", "nodad")
		if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0); err != nil {
			t.Fatal(err)
		}
		to := netip.MustParseAddr("192.0.2.9")
		if from.Is6() {
			to = netip.MustParseAddr("2001:db8::9")
		}
		w := newWire(t, text, change)
		return w.lab(func() ipPacket { return echoPacket(from, to, 7, 1, []byte("ping")) }, w, to)
	}
}

func labInboundUDP(t *testing.T, text string, change func(*Config)) *lab {
	w := newPodWire(t, text, change)
	return w.lab(func() ipPacket { return udpPacket(at(client4, 5), at(guest4, 6), []byte("ping")) }, w.out, client4)
}

func labInboundTCP(client, pod netip.Addr) func(*testing.T, string, func(*Config)) *lab {
	return func(t *testing.T, text string, change func(*Config)) *lab {
		w := newPodWire(t, text, change)
		return w.lab(func() ipPacket { return segment(at(client, 5), at(pod, 6), header.TCPFlagSyn, 1, 0) }, w.out, client)
	}
}

// lab sends a packet on one side of the forwarder, and looks on the sandbox's side for one from
// addr or with the same contents.
func (w *wire) lab(p func() ipPacket, from *wire, addr netip.Addr) *lab {
	l := &lab{f: w.f, table: w.table, wait: 5 * time.Second}
	l.begin = func() bool {
		deadline := time.Now().Add(l.wait)
		for time.Now().Before(deadline) {
			from.send(p()) // repeated, because the kernel takes a while to put a new IPv6 address in force
			for next := time.Now().Add(200 * time.Millisecond); time.Now().Before(next); {
				got, ok := w.tryRecv(time.Until(next))
				if ok && got.src == addr && (got.proto != packet.ProtoICMP || got.l4[0] == packet.EchoReply4) && !isError(got) {
					return true
				}
			}
		}
		return false
	}
	l.again = l.begin
	return l
}

// isError reports whether p only says that something was refused.
func isError(p ipPacket) bool {
	switch p.proto {
	case packet.ProtoICMP:
		return p.l4[0] == 3
	case packet.ProtoICMPv6:
		return p.l4[0] < 128
	case packet.ProtoTCP:
		return header.TCP(p.l4).Flags()&header.TCPFlagRst != 0
	}
	return false
}

func labPublishedUDP(t *testing.T, text string, change func(*Config)) *lab {
	w := newWire(t, text, change)
	published := publishUDP(w, "127.0.0.1:0", guest4)
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(published.Host))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	l := &lab{f: w.f, table: w.table, wait: 5 * time.Second}
	l.begin = func() bool {
		_, _ = c.Write([]byte("ping"))
		got, ok := w.tryRecv(l.wait)
		return ok && got.proto == packet.ProtoUDP && !isError(got)
	}
	l.again = l.begin
	return l
}

// duringEntry calls f once while the first flow is entered: after it was judged, and before its
// owner knows that it is in the table.
func duringEntry(f func()) func(*Config) {
	var once sync.Once
	return func(c *Config) {
		c.Table = nat.NewTable(nat.Config{OnEvent: func(e nat.Event) {
			if e.Type == nat.New {
				once.Do(f)
			}
		}})
	}
}

func TestEveryKindOfFlowIsAskedAgainByRulesThatCameWhileItEntered(t *testing.T) {
	for _, kind := range kindsOfFlow {
		t.Run(kind.name, func(t *testing.T) {
			var l *lab
			l = kind.lab(t, allowAll, duringEntry(func() { l.f.SetRules(compile(t, refuseAll)) }))
			if l.expectNothing().begin() {
				t.Error("a flow that was judged by the old rules began under the new ones")
			}
			testutil.Eventually(t, "the table is empty", func() bool { return l.table.Len() == 0 })
		})
	}
}

func TestEveryKindOfFlowIsCutByRulesThatRefuseIt(t *testing.T) {
	for _, kind := range kindsOfFlow {
		t.Run(kind.name, func(t *testing.T) {
			l := kind.lab(t, allowAll, nil)
			if !l.begin() {
				t.Fatalf("no flow began; counters: %v", l.f.Stats())
			}
			l.f.SetRules(compile(t, refuseAll))
			if l.expectNothing().again() {
				t.Error("the flow goes on under rules that refuse it")
			}
			// It moves nothing once SetRules returns, but may be taken down a moment later.
			testutil.Eventually(t, "the table is empty", func() bool { return l.table.Len() == 0 })
		})
	}
}

// TestEveryKindOfFlowGoesOnByTheNewRule gives every rule a new name and a bandwidth of its own.
func TestEveryKindOfFlowGoesOnByTheNewRule(t *testing.T) {
	next := strings.NewReplacer(
		"name: loopback,", "name: next-loopback, limits: {flows: 1, egressBandwidth: 8M, ingressBandwidth: 8M},",
		"name: world,", "name: next-world, limits: {flows: 1, egressBandwidth: 8M, ingressBandwidth: 8M},",
		"name: published,", "name: next-published, limits: {flows: 1, egressBandwidth: 8M, ingressBandwidth: 8M},",
	).Replace(allowAll)
	for _, kind := range kindsOfFlow {
		t.Run(kind.name, func(t *testing.T) {
			l := kind.lab(t, allowAll, nil)
			if !l.begin() {
				t.Fatal("no flow began")
			}
			l.f.SetRules(compile(t, next))
			all := l.table.Leases()
			if len(all) != 1 {
				t.Fatalf("%d flows, want the one that both rules allow", len(all))
			}
			if rule := all[0].Rule(); !strings.Contains(rule, " next-") {
				t.Errorf("the flow is still rule %q's", rule)
			}
			p := all[0].Owner().(*admit.Pass)
			if p.RuleUp() == nil || p.RuleDown() == nil || !p.RuleUp().Limited() || !p.RuleDown().Limited() {
				t.Error("the flow is not limited as its new rule says")
			}
			if _, err := l.table.Acquire(nat.Spec{Orig: nat.NewTuple(packet.ProtoUDP, at(guest4, 9), at(client4, 9)), Budget: p.Shape.Load().BudgetOf()}); err == nil {
				t.Error("the flow is not charged to its new rule's budget")
			}
			if !l.again() {
				t.Error("the flow did not go on")
			}
		})
	}
}

// TestRelaysObeyBandwidth moves bulk data through a relay both ways and under either limit. Its
// bytes are spliced and never seen here.
func TestRelaysObeyBandwidth(t *testing.T) {
	for _, of := range []string{"the rule", "the sandbox"} {
		for _, direction := range []string{"egressBandwidth", "ingressBandwidth"} {
			t.Run(direction+" of "+of, func(t *testing.T) {
				limits := "{" + direction + ": 8M}" // 1 MB/s
				text := strings.Replace(allowAll, "name: published,", "name: published, limits: "+limits+",", 1)
				if of == "the sandbox" {
					text = strings.TrimRight(allowAll, "\n") + "\n  limits: " + limits + "\n"
				}
				l := labPublishedTCP(true)(t, text, nil)
				if !l.begin() {
					t.Fatal("no connection")
				}
				port := l.f.Published()[0].Host
				c := hostDial(t, port)
				start := time.Now()
				go func() { _, _ = c.Write(make([]byte, 64<<20)); c.Close() }() // ends with the connection
				moved, err := io.CopyN(io.Discard, c, 1<<20)
				if err != nil {
					t.Fatalf("%d bytes came back: %v", moved, err)
				}
				// The bucket's fill, then the rate.
				if least := time.Duration(float64(moved-admit.BucketMin-admit.Quantum) / 1e6 * float64(time.Second)); time.Since(start) < least {
					t.Errorf("%d bytes moved in %v, want at least %v", moved, time.Since(start), least)
				}
			})
		}
	}
}

func TestInboundFlowsObeyTheirRulesBandwidth(t *testing.T) {
	clock := newTestClock()
	const limited = `
  - {name: slow, action: allow, from: [{cidr: 192.0.2.77/32}], limits: {ingressBandwidth: 8M, egressBandwidth: 8M}}
`
	text := strings.Replace(allowAll, "  ingress:\n", "  ingress:"+limited, 1)
	w := newPodWire(t, text, func(c *Config) { c.Now = clock.now })
	slow, fast, server := at(client4, 1), at(netip.MustParseAddr("192.0.2.78"), 1), at(guest4, 2)
	received := func(to *wire) (n int) {
		for {
			if _, ok := to.tryRecv(20 * time.Millisecond); !ok {
				return n
			}
			n++
		}
	}
	// Of packets of 1000 bytes, 66 pass by the bucket of 64 KiB and 131 wait in the queue of 128
	// KiB.
	for _, way := range []struct {
		from, to *wire
		packet   func(client netip.AddrPort) ipPacket
	}{
		{w.out, w.wire, func(c netip.AddrPort) ipPacket { return udpPacket(c, server, pattern(972)) }},
		{w.wire, w.out, func(c netip.AddrPort) ipPacket { return udpPacket(server, c, pattern(972)) }},
	} {
		for range 200 {
			way.from.send(way.packet(slow))
		}
		if n := received(way.to); n != 66 {
			t.Errorf("%d packets of the limited rule passed at once, want 66", n)
		}
		for range 200 {
			way.from.send(way.packet(fast))
		}
		if n := received(way.to); n != 200 {
			t.Errorf("%d of 200 packets of another rule passed beside them", n)
		}
	}
	// A rule that loses its limits holds back nothing and leaves nothing behind.
	w.f.SetRules(compile(t, allowAll))
	if in, out := received(w.wire), received(w.out); in != 131 || out != 131 {
		t.Errorf("%d and %d packets had waited, want 131 each", in, out)
	}
	if n := len(w.f.outside.Ruled); n != 0 {
		t.Errorf("%d rules' queues are left", n)
	}
}
