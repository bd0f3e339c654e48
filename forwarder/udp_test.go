package forwarder

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

const allowNone = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: closed}
spec: {defaultAction: drop}
`

const rejectAll = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: closed}
spec: {defaultAction: reject}
`

// testClock is a clock that stands still until it is advanced.
type testClock struct{ ns atomic.Int64 }

func newTestClock() *testClock {
	c := new(testClock)
	c.ns.Store(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano())
	return c
}

func (c *testClock) now() time.Time { return time.Unix(0, c.ns.Load()) }

func (c *testClock) advance(d time.Duration) { c.ns.Add(int64(d)) }

// sides are the two families, each with a host server reached by the gateway.
var sides = []struct {
	name           string
	listen         string
	guest, gateway netip.Addr
	dns            netip.Addr
}{
	{"IPv4", "127.0.0.1:0", guest4, gateway4, dns4},
	{"IPv6", "[::1]:0", guest6, gateway6, dns6},
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

func TestUDPDatagramsOfEverySizeGoBothWays(t *testing.T) {
	for _, side := range sides {
		for _, size := range []int{0, 1, 64, 512, 1472, 1473, 9000, 65507 - 40} {
			t.Run(fmt.Sprintf("%s/%d", side.name, size), func(t *testing.T) {
				w := newWire(t, allowAll, nil)
				srv := udpServer(t, side.listen)
				me, peer := at(side.guest, 4000), at(side.gateway, portOf(srv))
				p := udpPacket(me, peer, pattern(size))
				p.id = 7
				if len(p.l4) > 1400 {
					w.sendFragments(p, 1400)
				} else {
					w.send(p)
				}
				got, from := read(t, srv)
				if !bytes.Equal(got, pattern(size)) {
					t.Fatalf("the host got %d bytes, not the %d that were sent", len(got), size)
				}
				if _, err := srv.WriteToUDPAddrPort(got, from); err != nil {
					t.Fatal(err)
				}
				src, dst, payload, _ := w.recvUDP()
				if src != peer || dst != me || !bytes.Equal(payload, pattern(size)) {
					t.Fatalf("got %d bytes from %s to %s, expected %d from %s to %s", len(payload), src, dst, size, peer, me)
				}
			})
		}
	}
}

func TestUDPLargestIPv4Datagram(t *testing.T) {
	w := newWire(t, allowAll, nil)
	srv := udpServer(t, "127.0.0.1:0")
	w.sendFragments(udpPacket(at(guest4, 4000), at(gateway4, portOf(srv)), pattern(65507)), 1480)
	got, from := read(t, srv)
	if len(got) != 65507 {
		t.Fatalf("the host got %d bytes", len(got))
	}
	if _, err := srv.WriteToUDPAddrPort(got, from); err != nil {
		t.Fatal(err)
	}
	if _, _, payload, _ := w.recvUDP(); !bytes.Equal(payload, pattern(65507)) {
		t.Fatalf("the sandbox got %d bytes", len(payload))
	}
}

func TestUDPFlowStandsInTheTableWithItsCounts(t *testing.T) {
	w := newWire(t, allowAll, nil)
	srv := udpServer(t, "127.0.0.1:0")
	me, peer := at(guest4, 4000), at(gateway4, portOf(srv))
	w.send(udpPacket(me, peer, pattern(100)))
	_, from := read(t, srv)
	for range 2 {
		_, _ = srv.WriteToUDPAddrPort(pattern(50), from)
		w.recvUDP()
	}
	flows := w.table.List()
	if len(flows) != 1 {
		t.Fatalf("%d flows, expected one", len(flows))
	}
	fl := flows[0]
	if fl.OrigPackets != 1 || fl.OrigBytes != 128 || fl.ReplyPackets != 2 || fl.ReplyBytes != 2*78 {
		t.Errorf("counted %d packets of %d bytes out, %d of %d in; expected 1 of 128 and 2 of 156",
			fl.OrigPackets, fl.OrigBytes, fl.ReplyPackets, fl.ReplyBytes)
	}
	if fl.Orig != nat.NewTuple(17, me, peer) || fl.Reply != nat.NewTuple(17, srvAddr(srv), from) || !fl.SeenReply {
		t.Errorf("tuples %s and %s", fl.Orig, fl.Reply)
	}
}

func srvAddr(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

func TestUDPHeaderFieldsAreCarried(t *testing.T) {
	for _, side := range sides {
		t.Run(side.name, func(t *testing.T) {
			w := newWire(t, allowAll, nil)
			srv := udpServer(t, side.listen)
			raw, _ := srv.SyscallConn()
			level, recvTTL, recvTOS, setTOS := unix.IPPROTO_IP, unix.IP_RECVTTL, unix.IP_RECVTOS, unix.IP_TOS
			if side.guest.Is6() {
				level, recvTTL, recvTOS, setTOS = unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, unix.IPV6_RECVTCLASS, unix.IPV6_TCLASS
			}
			_ = raw.Control(func(fd uintptr) {
				for _, o := range []int{recvTTL, recvTOS} {
					if err := unix.SetsockoptInt(int(fd), level, o, 1); err != nil {
						t.Error(err)
					}
				}
				if err := unix.SetsockoptInt(int(fd), level, setTOS, 0x28); err != nil {
					t.Error(err)
				}
			})
			p := udpPacket(at(side.guest, 4000), at(side.gateway, portOf(srv)), []byte("x"))
			p.ttl, p.tos = 33, 0xb9 // EF with ECT(1)
			w.send(p)
			buf, oob := make([]byte, 16), make([]byte, 256)
			_, n, _, from, err := srv.ReadMsgUDPAddrPort(buf, oob)
			if err != nil {
				t.Fatal(err)
			}
			if c := hostsock.ParseControl(oob[:n]); c.TTL != 33 || c.Tos != 0xb9 {
				t.Errorf("the host sees TTL %d and TOS %#x, expected 33 and 0xb9", c.TTL, c.Tos)
			}
			_, _ = srv.WriteToUDPAddrPort([]byte("y"), netip.AddrPortFrom(from.Addr().Unmap(), from.Port()))
			if _, _, _, p := w.recvUDP(); p.tos != 0x28 || p.ttl != 64 {
				t.Errorf("the sandbox sees TTL %d and TOS %#x, expected 64 and 0x28", p.ttl, p.tos)
			}
		})
	}
}

func TestUDPRefusalsTellTheTruth(t *testing.T) {
	anywhere4, anywhere6 := netip.MustParseAddr("198.51.100.9"), netip.MustParseAddr("2001:db8::9")
	for _, c := range []struct {
		what      string
		policy    string
		to        netip.AddrPort
		ttl       uint8
		typ, code uint8 // 0: silence
		counter   string
	}{
		{"a dropping policy is silent", allowNone, at(anywhere4, 9), 64, 0, 0, "udp_refused"},
		{"a rejecting policy says port unreachable", rejectAll, at(anywhere4, 9), 64, 3, 3, "udp_refused"},
		{"a rejecting policy says so in IPv6", rejectAll, at(anywhere6, 9), 64, 1, 4, "udp_refused"},
		{"the gateway is a hop", allowAll, at(anywhere4, 9), 1, 11, 0, "udp_hop_limit"},
		{"the gateway is a hop in IPv6", allowAll, at(anywhere6, 9), 1, 3, 0, "udp_hop_limit"},
		{"nothing but DNS listens at the DNS address", allowAll, at(dns4, 54), 64, 3, 3, "udp_closed_port"},
		{"nor at the IPv6 one", allowAll, at(dns6, 54), 64, 1, 4, "udp_closed_port"},
		{"nothing listens at the gateway, whatever policy drops", allowNone, at(gateway4, 99), 64, 3, 3, "udp_closed_port"},
	} {
		t.Run(c.what, func(t *testing.T) {
			w := newWire(t, c.policy, nil)
			me, gw := guest4, gateway4
			if c.to.Addr().Is6() {
				me, gw = guest6, gateway6
			}
			p := udpPacket(at(me, 4000), c.to, []byte("hello"))
			p.ttl = c.ttl
			w.send(p)
			if c.typ == 0 {
				w.silent(c.what)
			} else if _, quoted := w.wantError(c.what, c.typ, c.code, gw); !bytes.Equal(quoted, p.bytes()) {
				t.Errorf("quoted %x, sent %x", quoted, p.bytes())
			}
			if n := w.f.Stats()[c.counter]; n != 1 {
				t.Errorf("%s is %d, expected 1", c.counter, n)
			}
		})
	}
}

func TestUDPChecksumsAreVerified(t *testing.T) {
	srv4, srv6 := udpServer(t, "127.0.0.1:0"), udpServer(t, "[::1]:0")
	for _, c := range []struct {
		what string
		v6   bool
		xor  byte
		zero bool
		ok   bool
	}{
		{"a wrong checksum in IPv4 is dropped", false, 1, false, false},
		{"a wrong checksum in IPv6 is dropped", true, 1, false, false},
		{"no checksum is fine in IPv4", false, 0, true, true},
		{"no checksum is wrong in IPv6", true, 0, true, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			w := newWire(t, allowAll, nil)
			me, peer, srv := at(guest4, 4000), at(gateway4, portOf(srv4)), srv4
			if c.v6 {
				me, peer, srv = at(guest6, 4000), at(gateway6, portOf(srv6)), srv6
			}
			p := udpPacket(me, peer, []byte(c.what))
			p.l4[6] ^= c.xor
			if c.zero {
				p.l4[6], p.l4[7] = 0, 0
			}
			w.send(p)
			if c.ok {
				if got, _ := read(t, srv); string(got) != c.what {
					t.Fatalf("the host got %q", got)
				}
				return
			}
			if n := w.f.Stats()["udp_checksum"]; n != 1 {
				t.Errorf("udp_checksum is %d, expected 1", n)
			}
		})
	}
}

func TestUDPSocketClosesWithItsLastFlow(t *testing.T) {
	w := newWire(t, allowAll, nil)
	a, b := udpServer(t, "127.0.0.1:0"), udpServer(t, "127.0.0.1:0")
	me := at(guest4, 4000)
	for _, srv := range []*net.UDPConn{a, b} {
		w.send(udpPacket(me, at(gateway4, portOf(srv)), nil))
		read(t, srv)
	}
	for left, srv := range []*net.UDPConn{b, a} {
		if n := w.f.dialer.Sockets.Load(); n != 1 {
			t.Fatalf("%d host sockets, expected one", n)
		}
		w.table.Lookup(nat.NewTuple(17, me, at(gateway4, portOf(srv)))).Kill("test")
		if n := w.table.Len(); n != 1-left {
			t.Fatalf("%d flows", n)
		}
	}
	if n := w.f.dialer.Sockets.Load(); n != 0 {
		t.Fatalf("%d host sockets after the last flow", n)
	}
	w.send(udpPacket(me, at(gateway4, portOf(a)), []byte("again")))
	if got, _ := read(t, a); string(got) != "again" {
		t.Fatalf("got %q", got)
	}
}

func TestUDPIdleFlowsEndByTheTablesClock(t *testing.T) {
	clock := newTestClock()
	var table *nat.Table
	w := newWire(t, allowAll, func(c *Config) {
		table = nat.NewTable(nat.Config{Now: clock.now})
		c.Table, c.Now = table, clock.now
	})
	srv := udpServer(t, "127.0.0.1:0")
	w.send(udpPacket(at(guest4, 4000), at(gateway4, portOf(srv)), nil))
	read(t, srv)
	clock.advance(119 * time.Second)
	table.Expire(clock.now())
	if table.Len() != 1 {
		t.Fatal("an unreplied flow ended before the two minutes of RFC 4787 REQ-5")
	}
	clock.advance(2 * time.Second)
	table.Expire(clock.now())
	if n, s := table.Len(), w.f.dialer.Sockets.Load(); n != 0 || s != 0 {
		t.Fatalf("%d flows and %d sockets after nf_conntrack_udp_timeout", n, s)
	}
}

func TestUDPNewRulesCutWhatTheyDeny(t *testing.T) {
	w := newWire(t, allowAll, nil)
	srv := udpServer(t, "127.0.0.1:0")
	me, peer := at(guest4, 4000), at(gateway4, portOf(srv))
	w.send(udpPacket(me, peer, nil))
	_, mapped := read(t, srv)
	w.f.SetRules(compile(t, allowAll))
	if w.table.Len() != 1 {
		t.Fatal("rules that allow the flow cut it")
	}
	w.f.SetRules(compile(t, allowNone))
	if w.table.Len() != 0 || w.f.dialer.Sockets.Load() != 0 {
		t.Fatal("rules that deny the flow left it")
	}
	_, _ = srv.WriteToUDPAddrPort([]byte("late"), mapped)
	w.f.SetRules(nil)
	w.send(udpPacket(me, peer, nil))
	w.wantError("without rules the gateway's ports are closed", 3, 3, gateway4)
	w.silent("what comes late from outside")
}

func TestUDPFullTableRefusesTheNewAndKeepsTheOld(t *testing.T) {
	var table *nat.Table
	w := newWire(t, allowAll, func(c *Config) {
		table = nat.NewTable(nat.Config{Limits: nat.Limits{Max: 1}})
		c.Table = table
	})
	srv := udpServer(t, "127.0.0.1:0")
	me := at(guest4, 4000)
	for range 3 { // assured, so that it is not dropped early
		w.send(udpPacket(me, at(gateway4, portOf(srv)), nil))
		_, from := read(t, srv)
		_, _ = srv.WriteToUDPAddrPort(nil, from)
		w.recvUDP()
	}
	w.send(udpPacket(at(guest4, 4001), at(gateway4, portOf(srv)), nil))
	if n := w.f.Stats()["udp_no_flow"]; n != 1 {
		t.Errorf("udp_no_flow is %d, expected 1; flows %v", n, table.List())
	}
	w.send(udpPacket(me, at(gateway4, portOf(srv)), []byte("still here")))
	if got, _ := read(t, srv); string(got) != "still here" {
		t.Errorf("got %q", got)
	}
}

// resolver answers every query with its bytes reversed, twice. Only one answer may arrive.
type resolver struct{}

func (resolver) ServePacket(_ context.Context, q []byte, _ netip.AddrPort, reply func([]byte, policy.Outcome)) {
	a := bytes.Clone(q)
	for i, b := range q {
		a[len(q)-1-i] = b
	}
	reply(a, policy.OutcomeAnswered)
	reply(a, policy.OutcomeAnswered)
}

func (resolver) ServeStream(context.Context, net.Conn, func(policy.Outcome)) {}

// later answers from a goroutine of its own, like a resolver that had to ask.
type later struct{ resolver }

func (resolver) AnswerPacket([]byte, netip.AddrPort) []byte { return nil }

func (later) AnswerPacket([]byte, netip.AddrPort) []byte { return nil }

func (later) ServePacket(ctx context.Context, q []byte, from netip.AddrPort, reply func([]byte, policy.Outcome)) {
	go resolver{}.ServePacket(ctx, q, from, reply)
}

// A client that asks again as soon as it has its answer does so while its flow ends.
func TestNoQuestionIsLostWhileTheLastOnesFlowEnds(t *testing.T) {
	w := newWire(t, allowNone, func(c *Config) { c.DNSHandler = later{} })
	for range 20_000 {
		w.send(udpPacket(at(guest4, 4000), at(sides[0].dns, 53), []byte("abc")))
		if _, _, answer, _ := w.recvUDP(); string(answer) != "cba" {
			t.Fatalf("the answer is %q", answer)
		}
	}
}

func TestUDPQueriesGoToTheResolver(t *testing.T) {
	for _, side := range sides {
		t.Run(side.name, func(t *testing.T) {
			w := newWire(t, allowNone, func(c *Config) { c.DNSHandler = resolver{} })
			w.send(udpPacket(at(side.guest, 4000), at(side.dns, 53), []byte("abc")))
			src, dst, payload, _ := w.recvUDP()
			if src != at(side.dns, 53) || dst != at(side.guest, 4000) || string(payload) != "cba" {
				t.Fatalf("got %q from %s to %s", payload, src, dst)
			}
			w.silent("one answer to one query")
			if n := w.table.Len(); n != 0 {
				t.Errorf("%d flows after the answer", n)
			}
		})
	}
}

func TestUDPTrainsLeaveAndArriveAsDatagrams(t *testing.T) {
	w := newWire(t, allowAll, nil)
	srv := udpServer(t, "127.0.0.1:0")
	me, peer := at(guest4, 4000), at(gateway4, portOf(srv))
	data := pattern(2500)
	w.sendBytes(udpPacket(me, peer, data).bytes(), 1000) // as the device delivers a USO frame
	var mapped netip.AddrPort
	for _, want := range [][]byte{data[:1000], data[1000:2000], data[2000:]} {
		got, from := read(t, srv)
		if !bytes.Equal(got, want) {
			t.Fatalf("got %d bytes, expected %d", len(got), len(want))
		}
		mapped = from
	}
	fl := w.table.Lookup(nat.NewTuple(17, me, peer)).Snapshot()
	if fl.OrigPackets != 3 || fl.OrigBytes != 2500+3*28 {
		t.Errorf("a train of three counts as %d packets of %d bytes", fl.OrigPackets, fl.OrigBytes)
	}
	// A train from a host that segments late arrives joined.
	raw, _ := srv.SyscallConn()
	_ = raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := srv.WriteToUDPAddrPort(data, mapped); err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]byte{data[:1000], data[1000:2000], data[2000:]} {
		if _, _, got, _ := w.recvUDP(); !bytes.Equal(got, want) {
			t.Fatalf("the sandbox got %d bytes, expected %d", len(got), len(want))
		}
	}
}

func TestUDPBatchesKeepOrderAndBoundaries(t *testing.T) {
	w := newWire(t, allowAll, nil)
	w.f.dgram.UDP.Batched = true
	a, b := udpServer(t, "127.0.0.1:0"), udpServer(t, "127.0.0.1:0")
	sizes := []int{10, 10, 10, 4, 10, 12, 12, 0, 12, 1400, 1400, 1400, 200, 3}
	for i, n := range sizes {
		p := pattern(n)
		if n > 0 {
			p[0] = byte(i)
		}
		w.send(udpPacket(at(guest4, 4000), at(gateway4, portOf(a)), p))
		w.send(udpPacket(at(guest4, 4000), at(gateway4, portOf(b)), p))
	}
	w.f.dgram.Flush()
	for _, srv := range []*net.UDPConn{a, b} {
		for i, n := range sizes {
			got, _ := read(t, srv)
			if len(got) != n || n > 0 && got[0] != byte(i) {
				t.Fatalf("datagram %d has %d bytes, expected %d", i, len(got), n)
			}
		}
	}
}

func TestUDPWithoutDescriptorsIsACountedRefusal(t *testing.T) {
	w := newWire(t, allowAll, nil)
	srv := udpServer(t, "127.0.0.1:0")
	me, peer := at(guest4, 4000), at(gateway4, portOf(srv))
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	none := was
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	p := udpPacket(me, peer, []byte("x"))
	w.send(p)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	w.wantError("no descriptor left", 3, 1, gateway4)
	if n, c := w.table.Len(), w.f.Stats()["udp_no_socket"]; n != 0 || c != 1 {
		t.Errorf("%d flows left, counted %d", n, c)
	}
	w.send(p)
	if got, _ := read(t, srv); string(got) != "x" {
		t.Errorf("got %q once there were descriptors again", got)
	}
}

func TestUDPBandwidthIsThePolicys(t *testing.T) {
	clock := newTestClock()
	w := newWire(t, strings.Replace(allowAll, "spec:", "spec:\n  limits: {egressBandwidth: 8M}", 1), func(c *Config) {
		c.Now = clock.now
		c.Table = nat.NewTable(nat.Config{Now: clock.now})
	})
	w.f.dgram.UDP.Batched = true // what passes waits, and no socket buffer fills
	srv := udpServer(t, "127.0.0.1:0")
	p := udpPacket(at(guest4, 4000), at(gateway4, portOf(srv)), pattern(972))
	pass := func() int {
		before := w.f.Stats()["udp_egress_bandwidth"]
		for range 100 {
			w.send(p)
		}
		return 100 - int(w.f.Stats()["udp_egress_bandwidth"]-before)
	}
	if n := pass(); n != admit.BucketMin/1000+1 {
		t.Errorf("%d datagrams passed at once, expected a bucket of %d", n, admit.BucketMin/1000+1)
	}
	clock.advance(10 * time.Millisecond) // 10 000 bytes
	if n := pass(); n < 9 || n > 11 {
		t.Errorf("%d datagrams of 1000 bytes passed after 10 ms at 8 Mbit/s", n)
	}
}
