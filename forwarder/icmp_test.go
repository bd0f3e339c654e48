package forwarder

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

var (
	router4 = netip.MustParseAddr("192.0.2.2")
	router6 = netip.MustParseAddr("2001:db8::2")
	far4    = netip.MustParseAddr("198.51.100.1")
	far6    = netip.MustParseAddr("2001:db8:1::1")
	nobody4 = netip.MustParseAddr("198.51.100.7")   // the router has an unreachable route
	beyond4 = netip.MustParseAddr("198.51.100.200") // the router forwards to it
	beyond6 = netip.MustParseAddr("2001:db8:1:0:8000::1")
)

// families are the two families with a far host and a router on the way.
var families = []struct {
	name        string
	me, gateway netip.Addr
	router, far netip.Addr
	beyond      netip.Addr
}{
	{"IPv4", guest4, gateway4, router4, far4, beyond4},
	{"IPv6", guest6, gateway6, router6, far6, beyond6},
}

func permitPing(t testing.TB) { sysctl(t, "ipv4/ping_group_range", "0 2147483647") }

func forbidPing(t testing.TB) { sysctl(t, "ipv4/ping_group_range", "1 0") }

func (w *wire) wantReply(p ipPacket, from ipPacket) {
	w.t.Helper()
	if p.src != from.dst || p.dst != from.src {
		w.t.Fatalf("reply from %s to %s", p.src, p.dst)
	}
	want := uint8(0)
	if from.dst.Is6() {
		want = 129
	}
	if p.l4[0] != want || !bytes.Equal(p.l4[4:], from.l4[4:]) {
		w.t.Fatalf("got type %d, id %x, seq %x, %d bytes; asked with id %x, seq %x, %d bytes",
			p.l4[0], p.l4[4:6], p.l4[6:8], len(p.l4), from.l4[4:6], from.l4[6:8], len(from.l4))
	}
}

func TestEchoToTheGatewayIsAnsweredByIt(t *testing.T) {
	for _, fam := range families {
		t.Run(fam.name, func(t *testing.T) {
			w := newWire(t, allowNone, nil)
			p := echoPacket(fam.me, fam.gateway, 7, 1, pattern(56))
			p.ttl = 1
			w.send(p)
			w.wantReply(w.recv(), p)
		})
	}
}

func TestEchoReachesTheHostsNetwork(t *testing.T) {
	ns := inNetns(t)
	routerNetns(t)
	permitPing(t)
	for _, fam := range families {
		for _, size := range []int{0, 56, 1300, 20000} {
			ns.run(t, fmt.Sprintf("%s/%d", fam.name, size), func(t *testing.T) {
				w := newWire(t, allowAll, nil)
				for seq := range uint16(2) {
					p := echoPacket(fam.me, fam.far, 4711, seq, pattern(size))
					if size > 1300 {
						w.sendFragments(p, 1400)
					} else {
						w.send(p)
					}
					r := w.recv()
					w.wantReply(r, p)
					if r.ttl != 63 {
						t.Errorf("reply with TTL %d, expected one hop less than 64", r.ttl)
					}
				}
				fl := w.table.List()
				if len(fl) != 1 || fl[0].OrigPackets != 2 || fl[0].ReplyPackets != 2 {
					t.Errorf("flows %v", fl)
				}
			})
		}
	}
}

func TestEchoIsRefusedWhereNoPingSocketIsPermitted(t *testing.T) {
	inNetns(t)
	routerNetns(t)
	forbidPing(t)
	w := newWire(t, allowAll, nil)
	w.send(echoPacket(guest4, far4, 1, 1, nil))
	w.wantError("ping without permission", 3, 13, gateway4)
	w.send(echoPacket(guest6, far6, 1, 1, nil))
	w.wantError("ping without permission", 1, 1, gateway6)
	if n := w.f.Stats()["icmp_no_ping_socket"]; n != 2 {
		t.Errorf("icmp_no_ping_socket is %d, expected 2", n)
	}
	if w.table.Len() != 0 {
		t.Error("a refused echo left a flow")
	}
}

func TestEchoByOneRawSocket(t *testing.T) {
	inNetns(t)
	routerNetns(t)
	forbidPing(t)
	w := newWire(t, allowAll, rawICMP(t))
	for _, fam := range families {
		for id := range uint16(3) {
			p := echoPacket(fam.me, fam.far, id, 5, pattern(100))
			w.send(p)
			w.wantReply(w.recv(), p)
		}
		p := echoPacket(fam.me, fam.beyond, 9, 5, pattern(100))
		p.ttl = 2
		w.send(p)
		_, quoted := w.wantError("a hop limit of 2 ends at the router", map[bool]uint8{true: 11, false: 3}[fam.me.Is4()], 0, fam.router)
		wantQuote(t, quoted, p, 16)
	}
}

// wantQuote checks that an error quotes what the sandbox sent: its addresses, protocol and the
// first n bytes after the IP header.
func wantQuote(t *testing.T, quoted []byte, p ipPacket, n int) {
	t.Helper()
	sent := p.bytes()
	hl := len(sent) - len(p.l4)
	if len(quoted) < hl+n {
		t.Fatalf("only %d bytes quoted", len(quoted))
	}
	if p.dst.Is6() {
		quoted, sent = bytes.Clone(quoted), bytes.Clone(sent)
		quoted[1], sent[1] = 0, 0 // traffic class and flow label
	}
	n = min(n, len(p.l4))
	if p.proto == 17 {
		// A UDP checksum cannot be known, so the quote omits it.
		quoted, sent = bytes.Clone(quoted), bytes.Clone(sent)
		copy(quoted[hl+6:hl+8], []byte{0, 0})
		copy(sent[hl+6:hl+8], []byte{0, 0})
	}
	if !bytes.Equal(quoted[:hl+n], sent[:hl+n]) {
		t.Errorf("quoted %x\n  sent %x", quoted[:hl+n], sent[:hl+n])
	}
}

func TestICMPErrorsFromTheNetworkReachTheSandbox(t *testing.T) {
	ns := inNetns(t)
	routerNetns(t)
	permitPing(t)
	udp := func(from, to netip.Addr, port uint16) ipPacket {
		p := udpPacket(at(from, 4000), at(to, port), []byte("are you there"))
		p.id = 99
		return p
	}
	with := func(p ipPacket, ttl uint8) ipPacket { p.ttl = ttl; return p }
	for _, c := range []struct {
		what      string
		p         ipPacket
		typ, code uint8
		from      netip.Addr
	}{
		{"a closed port at the far host", udp(guest4, far4, 9), 3, 3, far4},
		{"a closed port at the far host, IPv6", udp(guest6, far6, 9), 1, 4, far6},
		{"traceroute's first hop is the gateway", with(udp(guest4, far4, 33434), 1), 11, 0, gateway4},
		{"traceroute's second hop is the router", with(udp(guest4, beyond4, 33435), 2), 11, 0, router4},
		{"traceroute's second hop in IPv6", with(udp(guest6, beyond6, 33435), 2), 3, 0, router6},
		{"traceroute's last hop is the target", with(udp(guest4, far4, 33436), 3), 3, 3, far4},
		{"an unreachable host, told by the router", udp(guest4, nobody4, 9), 3, 1, router4},
		{"no route at the host", udp(guest4, netip.MustParseAddr("203.0.113.5"), 9), 3, 0, gateway4},
		{"no route at the host, IPv6", udp(guest6, netip.MustParseAddr("2001:db8:ffff::5"), 9), 1, 0, gateway6},
		{"a closed port of the host, by the gateway", udp(guest4, gateway4, 9), 3, 3, gateway4},
		{"ping at its last hop", with(echoPacket(guest4, beyond4, 77, 3, pattern(40)), 2), 11, 0, router4},
		{"ping at its last hop, IPv6", with(echoPacket(guest6, beyond6, 77, 3, pattern(40)), 2), 3, 0, router6},
		{"ping to an unreachable host", echoPacket(guest4, nobody4, 77, 3, nil), 3, 1, router4},
	} {
		ns.run(t, c.what, func(t *testing.T) {
			w := newWire(t, allowAll, nil)
			w.send(c.p)
			_, quoted := w.wantError(c.what, c.typ, c.code, c.from)
			wantQuote(t, quoted, c.p, 8)
		})
	}
}

func TestPathMTUIsTold(t *testing.T) {
	ns := inNetns(t)
	routerNetns(t)
	permitPing(t)
	for _, c := range []struct {
		what   string
		p      ipPacket
		df     bool
		mtu    uint32
		from   netip.Addr
		typ, c uint8
	}{
		{"a datagram too big for the uplink", udpPacket(at(guest4, 4000), at(far4, 9), pattern(1450)), true, 1400, gateway4, 3, 4},
		{"a datagram too big for the uplink, IPv6", udpPacket(at(guest6, 4000), at(far6, 9), pattern(1450)), true, 1400, gateway6, 2, 0},
		{"an echo too big for the uplink", echoPacket(guest4, far4, 5, 1, pattern(1450)), true, 1400, gateway4, 3, 4},
		{"an echo too big for the uplink, IPv6", echoPacket(guest6, far6, 5, 1, pattern(1450)), true, 1400, gateway6, 2, 0},
		{"a datagram too big beyond the router", udpPacket(at(guest4, 4000), at(beyond4, 9), pattern(1350)), true, 1300, router4, 3, 4},
	} {
		ns.run(t, c.what, func(t *testing.T) {
			w := newWire(t, allowAll, nil)
			c.p.df = c.df
			w.send(c.p)
			e, quoted := w.wantError(c.what, c.typ, c.c, c.from)
			if mtu := binary.BigEndian.Uint32(e.l4[4:]); mtu != c.mtu {
				t.Errorf("MTU %d, expected %d", mtu, c.mtu)
			}
			wantQuote(t, quoted, c.p, 8)
		})
	}
	ns.run(t, "without don't-fragment the host fragments", func(t *testing.T) {
		w := newWire(t, allowAll, nil)
		p := echoPacket(guest4, far4, 5, 1, pattern(1450))
		w.send(p)
		w.wantReply(w.recv(), p)
	})
}

func TestICMPErrorsKeepTheRulesOfRFC1812(t *testing.T) {
	w := newWire(t, allowNone, nil)
	ok := udpPacket(at(guest4, 1), at(far4, 2), []byte("payload"))
	fragment := ok.bytes()
	fragment[6], fragment[7] = 0, 1
	for _, c := range []struct {
		what string
		orig []byte
		sent bool
	}{
		{"about a datagram", ok.bytes(), true},
		{"about the first eight bytes of one", ok.bytes()[:28], true},
		{"about an echo request", echoPacket(guest4, far4, 1, 1, nil).bytes(), true},
		{"about an IPv6 datagram", udpPacket(at(guest6, 1), at(far6, 2), nil).bytes(), true},
		{"about a later fragment", fragment, false},
		{"about an ICMP error", ipPacket{src: guest4, dst: far4, proto: 1, l4: []byte{3, 1, 0, 0, 0, 0, 0, 0}}.bytes(), false},
		{"about an ICMPv6 error", ipPacket{src: guest6, dst: far6, proto: 58, l4: []byte{1, 4, 0, 0, 0, 0, 0, 0}}.bytes(), false},
		{"about a broadcast", udpPacket(at(guest4, 1), at(onlink.IPv4Broadcast, 2), nil).bytes(), false},
		{"about a multicast", udpPacket(at(guest4, 1), at(netip.MustParseAddr("224.0.0.251"), 2), nil).bytes(), false},
		{"about an IPv6 multicast", udpPacket(at(guest6, 1), at(onlink.AllNodes, 2), nil).bytes(), false},
		{"to nobody", udpPacket(at(netip.IPv4Unspecified(), 1), at(far4, 2), nil).bytes(), false},
		{"about nothing", nil, false},
		{"about half a header", ok.bytes()[:19], false},
		{"about a header that claims more than there is", append([]byte{0x4f}, ok.bytes()[1:24]...), false},
	} {
		w.f.dgram.UDP.Errs.Send(packet.ICMPHostUnreachable, 0, c.orig, netip.Addr{})
		if !c.sent {
			w.silent(c.what)
			continue
		}
		_ = w.recv()
	}
}

func TestICMPErrorsAreLimitedInRate(t *testing.T) {
	clock := newTestClock()
	w := newWire(t, allowNone, func(c *Config) { c.Now = clock.now; c.Table = nat.NewTable(nat.Config{Now: clock.now}) })
	orig := udpPacket(at(guest4, 1), at(far4, 2), nil).bytes()
	count := func() (n int) {
		for range 2 * packet.ICMPErrorsBurst {
			w.f.dgram.UDP.Errs.Send(packet.ICMPPortUnreachable, 0, orig, netip.Addr{})
		}
		for w.ep.Read() != nil {
			n++
		}
		return n
	}
	if n := count(); n != packet.ICMPErrorsBurst {
		t.Errorf("%d errors at once, expected the burst of %d", n, packet.ICMPErrorsBurst)
	}
	clock.advance(10 * time.Millisecond)
	if n := count(); n != packet.ICMPErrorsPerSec/100 {
		t.Errorf("%d errors after 10 ms, expected %d", n, packet.ICMPErrorsPerSec/100)
	}
	for range 2 * packet.ICMPErrorsBurst {
		w.f.dgram.UDP.Errs.Send(packet.ICMPPacketTooBig, 1400, orig, netip.Addr{})
	}
	if n := w.ep.NumQueued(); n != 2*packet.ICMPErrorsBurst {
		t.Errorf("%d path MTU errors, expected all %d", n, 2*packet.ICMPErrorsBurst)
	}
}

func TestOtherProtocolsAreUnreachable(t *testing.T) {
	w := newWire(t, allowAll, nil)
	p := ipPacket{src: guest4, dst: far4, proto: 132, l4: pattern(20)} // SCTP
	w.send(p)
	_, quoted := w.wantError("SCTP", 3, 2, gateway4)
	if !bytes.Equal(quoted, p.bytes()) {
		t.Errorf("quoted %x, sent %x", quoted, p.bytes())
	}
	if n := w.f.Stats()["ip_protocol"]; n != 1 {
		t.Errorf("ip_protocol is %d", n)
	}
}
