package policy

import (
	"math/rand/v2"
	"net/netip"
	"testing"
)

// The stupid twin: it walks the rules one by one for one address and knows
// nothing of tries, lines or cut-out pieces. It shares only the tables of
// special.go with the real thing.

type twin struct {
	p   *Policy
	env Environment
}

func (w twin) decide(q Query) (Action, string, netip.AddrPort) {
	deny := w.p.Spec.DefaultAction
	if deny == Allow {
		deny = Reject
	}
	var none netip.AddrPort
	dst := q.Dst.Addr().Unmap()
	src := q.Src.Addr().Unmap().WithZone("")
	if q.Dst.Addr().Zone() != "" {
		return deny, "special:zone", none
	}
	if !dst.IsValid() || q.Ingress && !src.IsValid() {
		return deny, "special:invalid", none
	}
	port := uint16(0)
	if q.Proto == 6 || q.Proto == 17 || q.Proto == 132 {
		if port = q.Dst.Port(); port == 0 {
			return deny, "special:port-zero", none
		}
	}
	if q.Ingress {
		a, rule, _ := w.judge(q, src, deny)
		if a != Allow {
			return a, rule, none
		}
		return a, rule, netip.AddrPortFrom(dst, port)
	}
	a, rule, c := w.judge(q, dst, deny)
	if a != Allow {
		return a, rule, none
	}
	for _, inner := range twinEmbedded(dst) {
		b, innerRule, ic := w.judge(q, inner, deny)
		if ic == hostLoopback && b == Allow {
			return deny, "special:gateway", none
		}
		if b != Allow {
			return b, innerRule, none
		}
	}
	if c == hostLoopback {
		dst = netip.MustParseAddr(map[bool]string{true: "127.0.0.1", false: "::1"}[dst.Is4()])
	}
	return a, rule, netip.AddrPortFrom(dst, port)
}

func twinEmbedded(a netip.Addr) []netip.Addr {
	in := func(s string) bool { return netip.MustParsePrefix(s).Contains(a) }
	b := a.As16()
	switch {
	case a.Is4():
		return nil
	case in("64:ff9b::/96"), in("64:ff9b:1::/48"), in("::ffff:0:0:0/96"):
		return []netip.Addr{netip.AddrFrom4([4]byte(b[12:]))}
	case in("2002::/16"):
		return []netip.Addr{netip.AddrFrom4([4]byte(b[2:6]))}
	case in("2001::/32"):
		return []netip.Addr{netip.AddrFrom4([4]byte(b[4:8])), netip.AddrFrom4([4]byte{255 - b[12], 255 - b[13], 255 - b[14], 255 - b[15]})}
	}
	return nil
}

func (w twin) class(a netip.Addr, ingress bool) (class, netip.Prefix) {
	one := netip.PrefixFrom(a, a.BitLen())
	c, around := ordinary, netip.Prefix{}
	for i := range classes {
		for _, p := range classes[i].ranges {
			if p.Contains(a) && (!around.IsValid() || p.Bits() > around.Bits()) {
				c, around = class(i), p
			}
		}
	}
	if around == one {
		return c, one
	}
	if !ingress {
		switch {
		case a == w.env.Gateway4 || a == w.env.Gateway6:
			if w.env.HostLoopback {
				return hostLoopback, one
			}
			return gateway, one
		case a == w.env.DNS4 || a == w.env.DNS6:
			return dnsServer, one
		}
		for _, g := range w.env.Guest {
			if a == g {
				return guest, one
			}
		}
	}
	for _, h := range w.env.HostAddrs {
		if a == h && classes[c].lock == open {
			return host, one
		}
	}
	return c, around
}

func (w twin) judge(q Query, a netip.Addr, deny Action) (Action, string, class) {
	c, around := w.class(a, q.Ingress)
	info := classes[c]
	if q.Ingress && info.martian || !q.Ingress && info.lock == never {
		return deny, info.rule, c
	}
	rules := w.p.Spec.Egress
	if q.Ingress {
		rules = w.p.Spec.Ingress
	}
	for i, r := range rules {
		peers := append(append([]Peer{}, r.To...), r.From...)
		precise := !q.Ingress && r.Action == Allow
		hit := len(peers) == 0 && (!precise || info.lock == open)
		for _, p := range peers {
			hit = hit || w.peer(p, a, c, around, precise, q.Ingress)
		}
		if hit && twinPorts(r, q) {
			return r.Action, ruleName(q.Ingress, i, r.Name), c
		}
	}
	if !q.Ingress && info.lock != open {
		return deny, info.rule, c
	}
	return w.p.Spec.DefaultAction, "default", c
}

func (w twin) peer(p Peer, a netip.Addr, c class, around netip.Prefix, precise, ingress bool) bool {
	contains := func(list []netip.Prefix, a netip.Addr) bool {
		for _, x := range list {
			if x.Contains(a) {
				return true
			}
		}
		return false
	}
	switch p.Entity {
	case "":
		if p.CIDR.Contains(a) && !contains(p.Except, a) && (!precise || classes[c].lock == open || covers(around, p.CIDR)) {
			return true
		}
		if c != hostLoopback {
			return false
		}
		loop, within := netip.MustParseAddr("127.0.0.1"), netip.MustParsePrefix("127.0.0.0/8")
		if a == w.env.Gateway6 {
			loop, within = netip.MustParseAddr("::1"), netip.MustParsePrefix("::1/128")
		}
		return p.CIDR.Contains(loop) && !contains(p.Except, loop) && (!precise || covers(within, p.CIDR))
	case EntityWorld:
		return classes[c].lock == open
	case EntityPrivate:
		return contains(privateRanges, a) && (!precise || classes[c].lock == open)
	case EntityHostLoopback:
		return c == hostLoopback || ingress && a.IsLoopback()
	}
	if precise {
		return classes[c].entity == p.Entity
	}
	if classes[c].entity == p.Entity {
		return true
	}
	for _, k := range classes {
		if k.entity == p.Entity && contains(k.ranges, a) {
			return true
		}
	}
	return false
}

func twinPorts(r Rule, q Query) bool {
	if len(r.Ports) == 0 && len(r.ICMP) == 0 {
		return true
	}
	for _, p := range r.Ports {
		if uint8(p.Protocol) == q.Proto && (p.Port == 0 || q.Dst.Port() == p.Port ||
			p.EndPort != 0 && q.Dst.Port() >= p.Port && q.Dst.Port() <= p.EndPort) {
			return true
		}
	}
	for _, m := range r.ICMP {
		proto := uint8(1)
		if m.Family == IPv6 {
			proto = 58
		}
		if q.Proto == proto && (m.Type == nil || *m.Type == q.ICMPType && (m.Code == nil || *m.Code == q.ICMPCode)) {
			return true
		}
	}
	return false
}

// A crowded little world, so that random rules and queries meet.
var (
	twinEnv = Environment{
		Gateway4: netip.MustParseAddr("10.0.2.2"), Gateway6: netip.MustParseAddr("fd00::2"),
		DNS4: netip.MustParseAddr("10.0.2.3"), DNS6: netip.MustParseAddr("fd00::3"),
		Guest:     []netip.Addr{netip.MustParseAddr("10.0.2.100"), netip.MustParseAddr("fd00::100")},
		HostAddrs: []netip.Addr{netip.MustParseAddr("192.168.1.5"), netip.MustParseAddr("2001:db8::5"), netip.MustParseAddr("169.254.20.10"), netip.MustParseAddr("fe80::5"), netip.MustParseAddr("2002:808:808::1")},
	}
	twinAddrs = []string{
		"1.1.1.1", "8.8.8.8", "10.0.2.2", "10.0.2.3", "10.0.2.100", "10.0.2.7", "192.168.1.5", "192.168.1.6",
		"0.0.0.0", "0.1.2.3", "127.0.0.1", "127.9.9.9", "169.254.169.254", "169.254.169.253", "169.254.20.10", "169.254.1.1", "100.100.100.200",
		"100.64.0.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "255.255.255.254", "172.16.0.1",
		"::", "::1", "::2", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.2.2", "::ffff:1.1.1.1", "fe80::1", "fe80::5", "fd00::2", "fd00::3", "fd00::100", "fd00::7",
		"fd00:ec2::254", "fd00:ec2::253", "ff02::1", "2001:db8::5", "2001:db8::6", "2600::1", "fe80::1%eth0", "::ffff:1.1.1.1%eth0",
		"64:ff9b::1.1.1.1", "64:ff9b::127.0.0.1", "64:ff9b::10.0.2.2", "64:ff9b::169.254.169.254", "64:ff9b:1::8.8.8.8", "64:ff9b:1::10.0.0.1",
		"2002:101:101::1", "2002:7f00:1::1", "2002:808:808::1", "2002:a00:202::1", "::ffff:0:1.1.1.1", "::ffff:0:169.254.169.254",
		"2001:0:101:101::f7f7:f7f7", "2001:0:101:101::80ff:fffe", "2001:0:7f00:1::f7f7:f7f7",
	}
)

// dice makes random policies and queries from anything that gives numbers.
type dice func(n int) int

func (d dice) addr() netip.Addr { return netip.MustParseAddr(twinAddrs[d(len(twinAddrs))]) }

func (d dice) prefix() netip.Prefix {
	a := d.addr().Unmap().WithZone("")
	bits := []int{0, 1, 4, 7, 8, 9, 15, 16, 24, 31, 32, 48, 64, 96, 104, 127, 128}
	return netip.PrefixFrom(a, min(bits[d(len(bits))], a.BitLen())).Masked()
}

func (d dice) peer() Peer {
	if d(3) == 0 {
		return Peer{Entity: entities[d(len(entities))]}
	}
	p := Peer{CIDR: d.prefix()}
	for range d(3) {
		if e := d.prefix(); covers(p.CIDR, e) && e != p.CIDR {
			p.Except = append(p.Except, e)
		}
	}
	return p
}

func (d dice) rule(ingress bool) Rule {
	r := Rule{Action: Action(d(3))}
	for range d(3) {
		if p := d.peer(); ingress {
			r.From = append(r.From, p)
		} else {
			r.To = append(r.To, p)
		}
	}
	for range d(3) {
		p := Port{Protocol: protocols[d(len(protocols))].num}
		if p.Protocol.hasPorts() {
			p.Port = uint16(d(6))
			if p.Port != 0 && d(2) == 0 {
				p.EndPort = p.Port + uint16(d(4))
			}
			if d(8) == 0 {
				p.Port, p.EndPort = 65530, 65535
			}
		}
		r.Ports = append(r.Ports, p)
	}
	for range d(2) {
		m := ICMP{Family: []Family{IPv4, IPv6}[d(2)]}
		if d(2) == 0 {
			t := uint8(d(3) * 127)
			if m.Type = &t; d(2) == 0 {
				c := uint8(d(2))
				m.Code = &c
			}
		}
		r.ICMP = append(r.ICMP, m)
	}
	return r
}

func (d dice) policy() *Policy {
	p := &Policy{APIVersion: APIVersion, Kind: Kind, Metadata: Metadata{Name: "random"}, Spec: Spec{DefaultAction: Action(d(3))}}
	for range d(5) {
		p.Spec.Egress = append(p.Spec.Egress, d.rule(false))
	}
	for range d(4) {
		p.Spec.Ingress = append(p.Spec.Ingress, d.rule(true))
	}
	return p
}

func (d dice) query() Query {
	protos := []uint8{1, 6, 6, 17, 58, 132, 47}
	return Query{
		Ingress: d(3) == 0, Proto: protos[d(len(protos))],
		Src: netip.AddrPortFrom(d.addr(), 1234), Dst: netip.AddrPortFrom(d.addr(), []uint16{0, 1, 2, 3, 4, 5, 6, 7, 8, 65529, 65530, 65535}[d(12)]),
		ICMPType: uint8(d(3) * 127), ICMPCode: uint8(d(3)),
	}
}

func (d dice) compare(t *testing.T, queries int) {
	t.Helper()
	p, env := d.policy(), twinEnv
	env.HostLoopback = d(2) == 0
	rules, err := Compile(p, env)
	if err != nil {
		text, _ := p.YAML()
		t.Fatalf("%v\n%s", err, text)
	}
	for range queries {
		q := d.query()
		v := rules.Decide(q)
		action, rule, target := twin{p, env}.decide(q)
		if v.Action() != action || v.Rule() != rule || v.Target() != target || v.Proto() != q.Proto {
			text, _ := p.YAML()
			t.Fatalf("query %+v (host loopback %v): got %v, the twin says %v by %s to %v\n%s", q, env.HostLoopback, v, action, rule, target, text)
		}
		if v.Permits(target) != (action == Allow) {
			t.Fatalf("%v: Permits(%v) is %v", v, target, v.Permits(target))
		}
	}
}

func TestDecideAgreesWithTheStupidTwin(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 5000 {
		dice(rng.IntN).compare(t, 60)
	}
}

// FuzzDecide lets the fuzzer throw the dice.
func FuzzDecide(f *testing.F) {
	f.Add([]byte("some dice"))
	f.Add([]byte{4, 2, 1, 0, 3, 200, 17, 90, 1, 1, 1, 5, 66, 12, 255, 9})
	f.Fuzz(func(t *testing.T, data []byte) {
		i := 0
		dice(func(n int) int {
			if i++; i > len(data) {
				return i % n
			}
			return int(data[i-1]) % n
		}).compare(t, 20)
	})
}
