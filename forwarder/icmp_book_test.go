package forwarder

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"sluice.dev/sluice/forwarder/internal/datagram"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

// echoFar is a far side that answers echo requests as it likes, at an address of this network
// namespace whose kernel does not answer.
type echoFar struct {
	t    *testing.T
	fd   int
	addr netip.Addr
}

func newEchoFar(t *testing.T, v4 bool) *echoFar {
	t.Helper()
	f := &echoFar{t: t, addr: netip.MustParseAddr("2001:db8:9::9")}
	domain, proto := unix.AF_INET6, unix.IPPROTO_ICMPV6
	if v4 {
		f.addr = netip.MustParseAddr("203.0.113.9")
		domain, proto = unix.AF_INET, unix.IPPROTO_ICMP
		ip(t, "addr", "replace", f.addr.String()+"/32", "dev", "lo")
	} else {
		ip(t, "addr", "replace", f.addr.String()+"/128", "dev", "lo", "nodad")
	}
	// The kernel prepares an IPv6 address in a work queue.
	testutil.Eventually(t, "a datagram reaches the far side", func() bool {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(f.addr, 0)))
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.WriteTo([]byte("ready"), c.LocalAddr()); err != nil {
			return false
		}
		_, _, err = c.ReadFrom(make([]byte, 8))
		return err == nil
	})
	sysctl(t, "ipv4/icmp_echo_ignore_all", "1")
	sysctl(t, "ipv6/icmp/echo_ignore_all", "1")
	var err error
	if f.fd, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(f.fd) })
	if err := unix.Bind(f.fd, hostsock.ToSockaddr(netip.AddrPortFrom(f.addr, 0))); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(f.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	return f
}

// request returns the next request that reaches the far side.
func (f *echoFar) request() (msg []byte, from unix.Sockaddr) {
	f.t.Helper()
	b := make([]byte, 1<<16)
	for {
		n, from, err := unix.Recvfrom(f.fd, b, 0)
		if err != nil {
			f.t.Fatalf("no echo request reaches the far side: %v", err)
		}
		msg := b[:n]
		if f.addr.Is4() {
			if checksum.Checksum(datagram.StripIPv4(msg), 0) != 0xffff {
				f.t.Fatalf("the request's checksum is wrong: %x", msg[:28])
			}
			msg = datagram.StripIPv4(msg)
		}
		if msg[0] == 8 || msg[0] == 128 {
			return msg, from
		}
	}
}

// reply answers a request with a payload and a code chosen by the far side.
func (f *echoFar) reply(request []byte, to unix.Sockaddr, code byte, payload string) {
	f.t.Helper()
	b := append(bytes.Clone(request[:8]), payload...)
	b[0], b[1], b[2], b[3] = 129, code, 0, 0
	if f.addr.Is4() {
		b[0] = 0
		binary.BigEndian.PutUint16(b[2:], ^checksum.Checksum(b, 0))
	}
	if err := unix.Sendto(f.fd, b, 0, to); err != nil {
		f.t.Fatal(err)
	}
}

// rawICMP gives the forwarder raw sockets.
func rawICMP(t *testing.T) func(*Config) {
	return func(c *Config) {
		for fd, domain := range map[*int][2]int{
			&c.RawICMP4: {unix.AF_INET, unix.IPPROTO_ICMP}, &c.RawICMP6: {unix.AF_INET6, unix.IPPROTO_ICMPV6},
		} {
			var err error
			if *fd, err = unix.Socket(domain[0], unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, domain[1]); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestAnEchoCarriesNoPayload(t *testing.T) {
	ns := inNetns(t)
	for _, raw := range []bool{false, true} {
		for _, fam := range families {
			for _, size := range []int{0, 1, 56, 1400, 20000} {
				ns.run(t, fmt.Sprintf("%s/raw=%v/%d", fam.name, raw, size), func(t *testing.T) {
					far := newEchoFar(t, fam.me.Is4())
					var change func(*Config)
					if permitPing(t); raw {
						forbidPing(t)
						change = rawICMP(t)
					}
					w := newWire(t, allowAll, change)
					p := echoPacket(fam.me, far.addr, 0x4c45, 0x414b, pattern(size))
					w.sendFragments(p, 1400)
					got, from := far.request()
					if len(got) != len(p.l4) {
						t.Errorf("%d bytes arrive of %d", len(got), len(p.l4))
					}
					if len(bytes.Trim(got[8:], "\x00")) > 0 || bytes.Equal(got[4:6], p.l4[4:6]) || bytes.Equal(got[6:8], p.l4[6:8]) || got[1] != 0 {
						t.Errorf("the sandbox's identifier, sequence number or payload left: %x", got[:min(len(got), 40)])
					}
					far.reply(got, from, 7, string(bytes.Repeat([]byte("FOREIGN "), 1+size/8)))
					r := w.recv()
					w.wantReply(r, p)
					if r.l4[1] != 0 {
						t.Errorf("the reply has the far side's code %d", r.l4[1])
					}
					// A duplicate is delivered, cut to what the far side sent, but not a third
					// reply.
					far.reply(got, from, 0, "")
					if r := w.recv(); !bytes.Equal(r.l4[4:], p.l4[4:8]) {
						t.Errorf("an empty duplicate arrives as %x", r.l4)
					}
					far.reply(got, from, 0, "more")
					w.counts(t, "icmp_answers", 1)
					// No request had this number.
					binary.BigEndian.PutUint16(got[6:], 0x3333)
					far.reply(got, from, 0, "more")
					w.counts(t, "icmp_late", 1)
					w.silent("what is no answer")
				})
			}
		}
	}
}

// counts waits until a counter has a value.
func (w *wire) counts(t *testing.T, name string, want uint64) {
	t.Helper()
	testutil.Eventually(t, fmt.Sprintf("%s is %d", name, want), func() bool { return w.f.Stats()[name] == want })
}

// withClock gives the forwarder the test's clock.
func withClock(clock *testClock) func(*Config) {
	return func(c *Config) { c.Now = clock.now; c.Table = nat.NewTable(nat.Config{Now: clock.now}) }
}

func TestTheEchoBookIsBounded(t *testing.T) {
	ns := inNetns(t)
	for _, c := range []struct {
		name       string
		size, sent int
		left       int
	}{
		{"in entries", 0, datagram.EchoBookLen + 10, datagram.EchoBookLen},
		{"in bytes", 20000, 60, datagram.EchoBookBytes / (packet.EchoHeaderLen + 20000 + datagram.EchoSentOverhead)},
	} {
		ns.run(t, c.name, func(t *testing.T) {
			far := newEchoFar(t, true)
			permitPing(t)
			clock := newTestClock()
			w := newWire(t, allowAll, withClock(clock))
			book := &w.f.dgram.Echo.Book
			var first []byte
			var to unix.Sockaddr
			for i := range c.sent {
				clock.advance(time.Second / datagram.EchoPerSec)
				w.sendFragments(echoPacket(guest4, far.addr, 7, uint16(i), pattern(c.size)), 1400)
				msg, from := far.request()
				if i == 0 {
					first, to = bytes.Clone(msg), from
				}
				if len(book.ByKey) > datagram.EchoBookLen || book.Bytes > datagram.EchoBookBytes {
					t.Fatalf("%d entries, %d bytes", len(book.ByKey), book.Bytes)
				}
			}
			if len(book.ByKey) != c.left || book.Order.Len() != c.left {
				t.Errorf("%d of %d requests are in the book, expected %d", len(book.ByKey), c.sent, c.left)
			}
			far.reply(first, to, 0, "late")
			w.counts(t, "icmp_late", 1)
			w.silent("a reply to a request that made room")

			w.f.SetRules(compile(t, allowNone))
			if len(book.ByKey) != 0 || book.Order.Len() != 0 || book.Bytes != 0 || book.Charge.Held.Load() != 0 {
				t.Errorf("the flow has ended, and %d requests of %d bytes are left", len(book.ByKey), book.Bytes)
			}
		})
	}
}

func TestEchoRequestsAreLimitedInRate(t *testing.T) {
	ns := inNetns(t)
	ns.run(t, "", func(t *testing.T) {
		far := newEchoFar(t, true)
		permitPing(t)
		clock := newTestClock()
		w := newWire(t, allowAll, withClock(clock))
		// The far side reads each request, so that none is lost in its queue.
		passed := func(n int, ttl func(int) uint8) (passed int) {
			for i := range n {
				before := w.f.Stats()["icmp_rate"]
				p := echoPacket(guest4, far.addr, 7, uint16(i), pattern(8))
				p.ttl = ttl(i)
				w.send(p)
				if w.f.Stats()["icmp_rate"] == before {
					far.request()
					passed++
				}
			}
			return passed
		}
		same := func(int) uint8 { return 64 }
		changing := func(i int) uint8 { return uint8(20 + i%2) }
		if n, want := passed(2*datagram.EchoBurst, same), datagram.EchoBurst-datagram.EchoShapeCost+1; n != want {
			t.Errorf("%d requests pass at once, expected %d", n, want)
		}
		clock.advance(time.Second)
		if n := passed(2*datagram.EchoPerSec, same); n != datagram.EchoPerSec {
			t.Errorf("%d requests of one shape pass in a second, expected %d", n, datagram.EchoPerSec)
		}
		clock.advance(time.Second)
		if n, want := passed(2*datagram.EchoPerSec, changing), datagram.EchoPerSec/datagram.EchoShapeCost; n != want {
			t.Errorf("%d requests of changing shapes pass in a second, expected %d", n, want)
		}
	})
}

func TestAnErrorAboutAnEchoQuotesTheSandboxsOwn(t *testing.T) {
	inNetns(t)
	routerNetns(t)
	permitPing(t)
	w := newWire(t, allowAll, nil)
	for _, fam := range families {
		// The error is about the second request; the third was sent last.
		var ps []ipPacket
		for seq, ttl := range []uint8{64, 2, 64} {
			p := echoPacket(fam.me, fam.beyond, 9, uint16(500*seq), pattern(100+seq))
			p.ttl, p.tos, p.id = ttl, uint8(4*seq), uint16(seq)
			w.send(p)
			ps = append(ps, p)
		}
		for {
			r := w.recv()
			if fam.me.Is4() && r.l4[0] != 11 || fam.me.Is6() && r.l4[0] != 3 {
				continue // no host is beyond, and the router may say so
			}
			wantQuote(t, r.l4[8:], ps[1], len(ps[1].l4))
			break
		}
	}
}
