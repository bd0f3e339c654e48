package policy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// The shapes of 10 000 CIDRs that a decision must not feel: each with a query
// whose answer takes the longest way.

func cidr(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func allowing(rules ...Rule) *Policy {
	return &Policy{APIVersion: APIVersion, Kind: Kind, Metadata: Metadata{Name: "test"}, Spec: Spec{DefaultAction: Reject, Egress: rules}}
}

func tcpTo(dst string) Query {
	return Query{Proto: uint8(TCP), Src: netip.MustParseAddrPort("10.0.2.100:40000"), Dst: netip.MustParseAddrPort(dst)}
}

func randomCIDR(rng *rand.Rand, v6 bool) netip.Prefix {
	if v6 {
		var b [16]byte
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		b[0] = 0x26
		return netip.PrefixFrom(netip.AddrFrom16(b), 24+rng.IntN(105)).Masked()
	}
	b := [4]byte{byte(20 + rng.IntN(60)), byte(rng.Uint32()), byte(rng.Uint32()), byte(rng.Uint32())}
	return netip.PrefixFrom(netip.AddrFrom4(b), 12+rng.IntN(21)).Masked()
}

// deepest is the longest walk that addresses allow, and no policy's shape.
const deepest = "129 nested IPv6 CIDRs, each with ports"

var shapes = []struct {
	name  string
	build func() (*Policy, Query)
}{
	{"one rule with 10000 IPv4 CIDRs", func() (*Policy, Query) { return oneRule(false) }},
	{"one rule with 10000 IPv6 CIDRs", func() (*Policy, Query) { return oneRule(true) }},
	{"10000 rules of one IPv4 CIDR", func() (*Policy, Query) { return manyRules(false) }},
	{"10000 rules of one IPv6 CIDR", func() (*Policy, Query) { return manyRules(true) }},
	{"10000 rules for one CIDR, by port", func() (*Policy, Query) {
		p := allowing()
		for i := range 10000 {
			p.Spec.Egress = append(p.Spec.Egress, Rule{Action: Allow, To: []Peer{{CIDR: cidr("20.0.0.0/8")}}, Ports: []Port{{Protocol: TCP, Port: uint16(i + 1)}}})
		}
		return p, tcpTo("20.1.2.3:9999")
	}},
	{deepest, func() (*Policy, Query) {
		p, a := allowing(), netip.MustParseAddr("2600::1")
		for bits := range 129 {
			p.Spec.Egress = append(p.Spec.Egress, Rule{Action: Allow, To: []Peer{{CIDR: netip.PrefixFrom(a, bits).Masked()}}, Ports: []Port{{Protocol: UDP}, {Protocol: TCP, Port: uint16(bits + 1)}}})
		}
		return p, tcpTo("[2600::1]:500")
	}},
	{"the internet but for 10000 addresses", func() (*Policy, Query) {
		rng := rand.New(rand.NewPCG(3, 3))
		peer := Peer{CIDR: everyIPv4}
		for range 10000 {
			a := randomCIDR(rng, false).Addr()
			peer.Except = append(peer.Except, netip.PrefixFrom(a, 32))
		}
		return allowing(Rule{Action: Allow, To: []Peer{peer}}), tcpTo("79.255.255.255:443")
	}},
	{"one rule with 10000 domains, nothing read", func() (*Policy, Query) { return domains10k(true, false) }},
	{"one rule with 10000 domains, the name read", func() (*Policy, Query) { return domains10k(true, true) }},
	{"10000 rules of one domain, nothing read", func() (*Policy, Query) { return domains10k(false, false) }},
	{"10000 rules of one domain, the name read", func() (*Policy, Query) { return domains10k(false, true) }},
	{manyNames, func() (*Policy, Query) {
		p, q := domains10k(false, false)
		for i := range MaxNamesPerAddress - 1 {
			if err := q.Names.Grant(fmt.Sprintf("a.b.c.d.other%d.example", i), []netip.Addr{q.Dst.Addr()}, time.Hour, q.Now); err != nil {
				panic(err)
			}
		}
		return p, q
	}},
	{"the default policy and a NAT64 address", func() (*Policy, Query) { return Builtin{}.Policy(), tcpTo("[64:ff9b::1.1.1.1]:443") }},
}

// manyNames is the most that a sandbox can make of one address.
const manyNames = "10000 domains, and an address granted under 128 names"

// domains10k has exact names and both kinds of pattern; the query is for a name
// that only a pattern matches, at the end.
func domains10k(one, read bool) (*Policy, Query) {
	p := allowing(Rule{Action: Allow, Ports: []Port{{Protocol: TCP, Port: 443}}})
	if !one {
		p.Spec.Egress = nil
	}
	for i := range 10000 {
		peer := Peer{Domain: fmt.Sprintf("%shost%d.site%d.example", []string{"", "*.", "**."}[i%3], i, i%100)}
		if one {
			p.Spec.Egress[0].To = append(p.Spec.Egress[0].To, peer)
		} else {
			p.Spec.Egress = append(p.Spec.Egress, Rule{Action: Allow, To: []Peer{peer}, Ports: []Port{{Protocol: TCP, Port: 443}}})
		}
	}
	q := tcpTo("198.51.100.1:443")
	q.Names, q.Now = NewNames(NamesConfig{}), now
	const name = "some.long.name.of.host9998.site98.example"
	if err := q.Names.Grant(name, []netip.Addr{q.Dst.Addr()}, time.Minute, now); err != nil {
		panic(err)
	}
	if read {
		q.Seen = tls(name)
	}
	return p, q
}

func oneRule(v6 bool) (*Policy, Query) {
	rng := rand.New(rand.NewPCG(1, 1))
	r := Rule{Action: Allow, Ports: []Port{{Protocol: TCP, Port: 443}, {Protocol: TCP, Port: 80}}}
	for range 10000 {
		r.To = append(r.To, Peer{CIDR: randomCIDR(rng, v6)})
	}
	return allowing(r), tcpTo(netip.AddrPortFrom(r.To[9999].CIDR.Addr(), 443).String())
}

func manyRules(v6 bool) (*Policy, Query) {
	rng := rand.New(rand.NewPCG(2, 2))
	p := allowing()
	for range 10000 {
		p.Spec.Egress = append(p.Spec.Egress, Rule{Action: Allow, To: []Peer{{CIDR: randomCIDR(rng, v6)}}, Ports: []Port{{Protocol: TCP, Port: 443}}})
	}
	return p, tcpTo(netip.AddrPortFrom(p.Spec.Egress[9999].To[0].CIDR.Addr(), 443).String())
}

func TestDecideIsFastAndAllocatesNothing(t *testing.T) {
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			p, q := s.build()
			rules, err := Compile(p, twinEnv)
			if err != nil {
				t.Fatal(err)
			}
			if n := testing.AllocsPerRun(100, func() { rules.Decide(q) }); n != 0 {
				t.Errorf("%v allocations per decision", n)
			}
			if testutil.Race {
				t.Skip("the race detector slows every decision")
			}
			// The best of several runs, because other work shares the cores.
			best := time.Hour
			for range 20 {
				start := time.Now()
				for range 1000 {
					rules.Decide(q)
				}
				best = min(best, time.Since(start)/1000)
			}
			limit := time.Microsecond
			switch s.name {
			case deepest:
				limit *= 4
			case manyNames:
				limit *= 20
			}
			if best >= limit {
				t.Errorf("a decision takes %v, expected less than %v", best, limit)
			}
		})
	}
}

func BenchmarkDecide(b *testing.B) {
	for _, s := range shapes {
		b.Run(s.name, func(b *testing.B) {
			p, q := s.build()
			rules, err := Compile(p, twinEnv)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				rules.Decide(q)
			}
		})
	}
}

func BenchmarkCompile(b *testing.B) {
	for _, s := range shapes {
		b.Run(s.name, func(b *testing.B) {
			p, _ := s.build()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Compile(p, twinEnv); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParse(b *testing.B) {
	p, _ := oneRule(false)
	text, err := p.YAML()
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, err := Parse("p", text); err != nil {
			b.Fatal(err)
		}
	}
}

func TestCompileIsBounded(t *testing.T) {
	tests := []struct {
		name string
		p    *Policy
		want error
	}{
		{"exceptions that cut IPv6 into too many ranges", func() *Policy {
			rng := rand.New(rand.NewPCG(4, 4))
			peer := Peer{CIDR: everyIPv6}
			for range 8000 {
				peer.Except = append(peer.Except, netip.PrefixFrom(randomCIDR(rng, true).Addr().Next(), 128))
			}
			return allowing(Rule{Action: Allow, To: []Peer{peer}})
		}(), ErrTooManyRanges},
		{"many ports at many distinct combinations of rules", func() *Policy {
			var many []Port
			for i := range 1000 {
				many = append(many, Port{Protocol: TCP, Port: uint16(2*i + 1)})
			}
			p := allowing(Rule{Action: Allow, Ports: many})
			for i := range 1200 {
				to := []Peer{{CIDR: cidr(fmt.Sprintf("20.0.%d.%d/32", i/200, i%200))}}
				p.Spec.Egress[0].To = append(p.Spec.Egress[0].To, to...)
				p.Spec.Egress = append(p.Spec.Egress, Rule{Action: Drop, To: to})
			}
			return p
		}(), ErrTooManyPieces},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Compile(tt.p, Environment{}); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}
