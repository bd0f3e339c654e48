package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"sluice.dev/sluice/internal/prefix"
)

// The stupid twin: it walks the rules one by one for one address and knows
// nothing of tries, lines or cut-out pieces. It shares only the tables of
// special.go with the real thing.

type twin struct {
	p   *Policy
	env Environment
}

// twinVerdict is what the twin says.
type twinVerdict struct {
	action            Action
	rule, tried       string
	reason            Reason
	verify            Verify
	audited, requests bool
	target            netip.AddrPort
}

func (w twin) decide(q Query) twinVerdict {
	deny := w.deny()
	dst := q.Dst.Addr().Unmap()
	src := q.Src.Addr().Unmap().WithZone("")
	if q.Dst.Addr().Zone() != "" {
		return twinVerdict{action: deny, rule: "special:zone"}
	}
	if !dst.IsValid() || q.Ingress && !src.IsValid() {
		return twinVerdict{action: deny, rule: "special:invalid"}
	}
	port := uint16(0)
	if q.Proto == 6 || q.Proto == 17 || q.Proto == 132 {
		if port = q.Dst.Port(); port == 0 {
			return twinVerdict{action: deny, rule: "special:port-zero"}
		}
	}
	if q.Ingress {
		v, _ := w.judge(q, src)
		if rule := w.closedClient(q, src); v.action == Allow && rule != "" {
			return twinVerdict{action: deny, rule: rule}
		}
		if v.action == Allow {
			v.target = netip.AddrPortFrom(dst, port)
		}
		return v
	}
	if w.gates() && q.Proto != 132 && port == 53 {
		return twinVerdict{action: deny, rule: "builtin:dns"}
	}
	v, c := w.judge(q, dst)
	if v.action != Allow {
		return v
	}
	for _, inner := range w.embedded(dst) {
		i, ic := w.judge(q, inner)
		if ic == hostLoopback && i.action == Allow {
			return twinVerdict{action: deny, rule: "special:gateway"}
		}
		if i.action != Allow {
			return i
		}
		v.requests = v.requests || i.requests
		if i.audited && !v.audited {
			v.audited, v.rule, v.tried, v.reason = true, i.rule, i.tried, i.reason
		}
	}
	if c == hostLoopback {
		dst = netip.MustParseAddr(map[bool]string{true: "127.0.0.1", false: "::1"}[dst.Is4()])
	}
	v.target = netip.AddrPortFrom(dst, port)
	return v
}

// closedClient is what refuses a client that the rules let in.
func (w twin) closedClient(q Query, src netip.Addr) string {
	for _, inner := range w.embedded(src) {
		if c, _ := w.class(inner, true); c == metadata || classes[c].lock == never {
			return classes[c].rule
		}
	}
	if !w.gates() || q.Proto != 6 && q.Proto != 17 {
		return ""
	}
	port := q.Src.Port()
	if port == 53 {
		return "builtin:dns"
	}
	back := w.decide(Query{Proto: q.Proto, Src: q.Dst, Dst: netip.AddrPortFrom(src, port), Names: q.Names, Now: q.Now})
	switch {
	case back.action == Allow && back.verify == VerifyNone:
	case port == 853:
		return "builtin:dns-over-tls"
	case isPublicResolver(src):
		return "builtin:dns-over-https"
	}
	return ""
}

func (w twin) deny() Action {
	if w.p.Spec.DefaultAction == Allow {
		return Reject
	}
	return w.p.Spec.DefaultAction
}

func twinEmbedded(a netip.Addr) []netip.Addr {
	b := a.As16()
	last := netip.AddrFrom4([4]byte(b[12:]))
	if !a.Is4() && (strings.HasPrefix(fmt.Sprintf("%x", b[8:]), "00005efe") || strings.HasPrefix(fmt.Sprintf("%x", b[8:]), "02005efe")) {
		return append(twinByRange(a), last)
	}
	return twinByRange(a)
}

func twinByRange(a netip.Addr) []netip.Addr {
	in := func(s string) bool { return netip.MustParsePrefix(s).Contains(a) }
	b := a.As16()
	switch {
	case a.Is4() || slices.Contains(metadataServices, netip.PrefixFrom(a, a.BitLen())):
		return nil
	case in("fc00::/7"), in("fe80::/10"):
		last := netip.AddrFrom4([4]byte(b[12:]))
		for _, p := range metadataServices {
			if p.Addr() == last {
				return []netip.Addr{last}
			}
		}
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
	widen := func(to class, list []netip.Prefix) {
		for _, p := range list {
			if p.Bits() == 0 && p.Contains(a) {
				p = netip.PrefixFrom(a, 1).Masked()
			}
			if p.Contains(a) {
				if c = to; !around.IsValid() || p.Bits() > around.Bits() {
					around = p
				}
			}
		}
	}
	if classes[c].lock == open || c == linkLocal || c == reserved {
		widen(metadata, w.env.Metadata)
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
	if classes[c].lock == open {
		widen(host, w.env.Host)
	}
	return c, around
}

func (w twin) judge(q Query, a netip.Addr) (twinVerdict, class) {
	c, around := w.class(a, q.Ingress)
	info := classes[c]
	if q.Ingress && info.martian || !q.Ingress && info.lock == never {
		return twinVerdict{action: w.deny(), rule: info.rule}, c
	}
	rules := w.p.Spec.Egress
	if q.Ingress {
		rules = w.p.Spec.Ingress
	}
	named := !q.Ingress && info.lock == open
	v, decided := twinVerdict{action: w.p.Spec.DefaultAction, rule: "default"}, len(rules)
	closed := info.lock != open && (!q.Ingress || c == metadata)
	if closed {
		v = twinVerdict{action: w.deny(), rule: info.rule}
	}
	var byName twinMatch
	for i, r := range rules {
		var peers []Peer
		for _, p := range append(append([]Peer{}, r.To...), r.From...) {
			if p.Domain == "" {
				peers = append(peers, p)
			}
		}
		precise := (!q.Ingress || c == metadata) && r.Action == Allow
		hit := len(r.To)+len(r.From) == 0 && (!precise || info.lock == open)
		for _, p := range peers {
			hit = hit || w.peer(p, a, c, around, precise, q.Ingress)
		}
		hit = hit && twinPorts(r, q)
		if !hit && named {
			byName = w.byName(i, q, a)
		}
		if hit || byName.hit {
			v, decided = w.says(i, r, q, byName), i
			break
		}
	}
	for i := range rules[:decided] {
		if named && q.Seen.isHTTP() && v.action == Allow && w.candidate(i, q, a) {
			v.requests = true // the next one may be one that this rule decides
		}
	}
	if v.action == Allow && !q.Ingress && w.around(rules, decided, q, a, byName.hit) != "" {
		v = twinVerdict{action: w.deny(), rule: w.around(rules, decided, q, a, byName.hit)}
	}
	if v.verify == VerifyNone && v.action != Allow {
		if named {
			v.tried, v.reason = w.tried(rules[:decided], q, a, v)
		}
		audit := w.p.Spec.Mode == Audit && !closed
		silent := q.Proto != 6 && q.Proto != 17 || q.Proto == 6 && slices.Contains(serverFirst, q.Dst.Port()) || q.Proto == 17 && slices.Contains(nameless, q.Dst.Port())
		if audit && !q.Ingress && q.Seen.Kind == SeenNone && !silent && len(twinGranted(q)) > 0 {
			v = twinVerdict{action: w.deny(), rule: v.rule, reason: ReasonUnread, verify: VerifyFirstBytes}
		} else if audit {
			v.action, v.audited = Allow, true
		}
	}
	return v, c
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
		if p.CIDR.Contains(a) && !contains(p.Except, a) && (!precise || classes[c].lock == open || prefix.Covers(around, p.CIDR)) {
			return true
		}
		if c != hostLoopback {
			return false
		}
		loop, within := netip.MustParseAddr("127.0.0.1"), netip.MustParsePrefix("127.0.0.0/8")
		if a == w.env.Gateway6 {
			loop, within = netip.MustParseAddr("::1"), netip.MustParsePrefix("::1/128")
		}
		return p.CIDR.Contains(loop) && !contains(p.Except, loop) && (!precise || prefix.Covers(within, p.CIDR))
	case EntityWorld:
		return classes[c].lock == open || ingress && c == host && w.env.HostClients
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
	return p.Entity == EntityHost && w.within(host, w.env.Host, a, ingress) || p.Entity == EntityMetadata && w.within(metadata, w.env.Metadata, a, ingress)
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
		Guest: []netip.Addr{netip.MustParseAddr("10.0.2.100"), netip.MustParseAddr("fd00::100")},
		Host:  prefixes("192.168.1.5/32", "2001:db8::5/128", "169.254.20.10/32", "fe80::5/128", "2002:808:808::1/128"),
	}
	twinAddrs = []string{
		"1.1.1.1", "8.8.8.8", "10.0.2.2", "10.0.2.3", "10.0.2.100", "10.0.2.7", "192.168.1.5", "192.168.1.6",
		"0.0.0.0", "0.1.2.3", "127.0.0.1", "127.9.9.9", "169.254.169.254", "169.254.169.253", "169.254.20.10", "169.254.1.1", "100.100.100.200",
		"100.64.0.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "255.255.255.254", "172.16.0.1",
		"::", "::1", "::2", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.2.2", "::ffff:1.1.1.1", "fe80::1", "fe80::5", "fd00::2", "fd00::3", "fd00::100", "fd00::7",
		"fd00:ec2::254", "fd00:ec2::253", "ff02::1", "2001:db8::5", "2001:db8::6", "2600::1", "fe80::1%eth0", "::ffff:1.1.1.1%eth0",
		"64:ff9b::1.1.1.1", "64:ff9b::127.0.0.1", "64:ff9b::10.0.2.2", "64:ff9b::169.254.169.254", "64:ff9b:1::8.8.8.8", "64:ff9b:1::10.0.0.1",
		"2002:101:101::1", "2002:7f00:1::1", "2002:808:808::1", "2002:a00:202::1", "::ffff:0:1.1.1.1", "::ffff:0:169.254.169.254",
		"2600::5efe:808:808", "2600::200:5efe:a9fe:a9fe", "fd00:c1::a9fe:a9fe", "fd12::a9fe:a9fe", "fe80::6464:64c8", "198.18.0.1", "fd12::101:101", "fd12::ac10:1", "2600:0:7f00:1::", "2600:0:101:101::1",
		"2600:64:a9fe:a9:fe::", "2600:64:a9fe:a9fe::", "2001:db8::a9:fea9:fe00:0", "2001:db8::c0:a801:500:0", "2001:db8:0:7f::1:0:0", "2001:db8:64::7f00:1", "2001:db8:64::c0a8:105", "192.168.1.255",
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

func (d dice) peer(ingress bool) Peer {
	if d(3) == 0 {
		return Peer{Entity: entities[d(len(entities))]}
	}
	if !ingress && d(2) == 0 {
		return Peer{Domain: []string{"", "*.", "**."}[d(3)] + twinNames[d(len(twinNames))]}
	}
	p := Peer{CIDR: d.prefix()}
	for range d(3) {
		if e := d.prefix(); prefix.Covers(p.CIDR, e) && e != p.CIDR {
			p.Except = append(p.Except, e)
		}
	}
	return p
}

func (d dice) rule(ingress bool) Rule {
	r := Rule{Action: Action(d(3))}
	for range d(3) {
		if p := d.peer(ingress); ingress {
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
			if d(8) == 0 {
				p.Port, p.EndPort = 853, 0
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
	if !ingress {
		d.byName(&r)
	}
	return r
}

func (d dice) policy() *Policy {
	p := &Policy{APIVersion: APIVersion, Kind: Kind, Metadata: Metadata{Name: "random"}, Spec: Spec{DefaultAction: Action(d(3))}}
	if d(6) == 0 {
		p.Spec.Mode = Audit
	}
	p.Spec.DNS.Names = []NamesMode{"", "", "any"}[d(3)]
	for range d(5) {
		p.Spec.Egress = append(p.Spec.Egress, d.rule(false))
	}
	for range d(4) {
		p.Spec.Ingress = append(p.Spec.Ingress, d.rule(true))
	}
	return p
}

func (d dice) query(names *Names) Query {
	protos := []uint8{1, 6, 6, 17, 58, 132, 47}
	return Query{
		Names: names, Now: twinNow, Seen: d.seen(), Held: d.held(),
		Ingress: d(3) == 0, Proto: protos[d(len(protos))],
		Src: netip.AddrPortFrom(d.addr(), []uint16{1234, 1234, 53, 853}[d(4)]), Dst: netip.AddrPortFrom(d.addr(), []uint16{0, 1, 2, 3, 4, 5, 6, 7, 8, 65529, 65530, 65535, 22, 53, 123, 853}[d(16)]),
		ICMPType: uint8(d(3) * 127), ICMPCode: uint8(d(3)),
	}
}

func (d dice) compare(t *testing.T, queries int) {
	t.Helper()
	p, env := d.policy(), d.environment()
	rules, err := Compile(p, env)
	if err != nil {
		text, _ := p.YAML()
		t.Fatalf("%v\n%s", err, text)
	}
	names := d.names()
	for range queries {
		q := d.query(names)
		v := rules.Decide(q)
		want := twin{p, env}.decide(q)
		got := twinVerdict{v.Action(), v.Rule(), v.Tried(), v.Reason(), v.Verify(), v.Audited(), v.EachRequest(), v.Target()}
		if got != want || v.Proto() != q.Proto {
			text, _ := p.YAML()
			names := q.Names.Of(q.Dst.Addr(), q.Now, nil)
			t.Fatalf("query %+v, granted %v, environment %+v:\n got %+v\nwant %+v\n%s", q, names, env, got, want, text)
		}
		if v.Permits(want.target) != (want.action == Allow) {
			t.Fatalf("%v: Permits(%v) is %v", v, want.target, v.Permits(want.target))
		}
		if v.Verify() != VerifyNone && !v.Contact().IsValid() {
			text, _ := p.YAML()
			d.neverAllowed(t, rules, q, text)
		}
		for _, name := range twinNames {
			got, want := rules.DecideName(name), twin{p, env}.decideName(name)
			got.Pattern, got.ECH = "", false
			if got != want {
				text, _ := p.YAML()
				t.Fatalf("name %s:\n got %+v\nwant %+v\n%s", name, got, want, text)
			}
		}
	}
}

// neverAllowed asks whether a flow that may not even be set up would be allowed by anything it
// could say.
func (d dice) neverAllowed(t *testing.T, rules *Rules, q Query, policy []byte) {
	t.Helper()
	for range 20 {
		for q.Seen = (Seen{}); q.Seen.Kind == SeenNone; {
			q.Seen = d.seen()
		}
		if v := rules.Decide(q); v.Allowed() && q.Seen.Name != "" {
			t.Fatalf("there is no contact for a flow that is allowed by %+v: %v\n%s", q.Seen, v, policy)
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
