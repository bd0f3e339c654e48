package kube

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"sluice.dev/sluice/internal/prefix"
)

// The twin of the sets lists the addresses of a /27, in the middle of a byte, one by one.
func TestSetsAreWhatTheirAddressesAre(t *testing.T) {
	base := netip.MustParsePrefix("10.0.3.224/27")
	all := []netip.Addr{}
	for a := base.Addr(); base.Contains(a); a = a.Next() {
		all = append(all, a)
	}
	g := generator{rand.New(rand.NewPCG(1, 14))}
	network := func() netip.Prefix {
		return netip.PrefixFrom(pick(g, all...), 27+g.IntN(6)).Masked()
	}
	set := func() *podSet {
		var addrs []netip.Addr
		for _, a := range all {
			if !g.one(3) {
				addrs = append(addrs, a)
			}
		}
		s := podSetOf(slices.Clone(addrs))
		if got := members(all, s.contains); !slices.Equal(got, addrs) {
			t.Fatalf("%v has %v, want %v", s.nets, got, addrs)
		}
		for i, p := range s.nets[1:] {
			if s.nets[i].Bits() == p.Bits() && netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked() == netip.PrefixFrom(s.nets[i].Addr(), p.Bits()-1).Masked() {
				t.Fatalf("%v and %v are one network", s.nets[i], p)
			}
		}
		return s
	}
	anyBlock := func() block {
		for {
			var except []netip.Prefix
			for range g.IntN(3) {
				except = append(except, network())
			}
			if b, ok := blockOf(network(), except); ok {
				return b
			}
		}
	}
	same := func(name string, got, want func(netip.Addr) bool) {
		t.Helper()
		if a, b := members(all, got), members(all, want); !slices.Equal(a, b) {
			t.Fatalf("%s has %v, want %v", name, a, b)
		}
	}
	for range 3000 {
		s, u, b, c, p := set(), set(), anyBlock(), anyBlock(), network()
		both := s.intersect(u)
		same("intersect", both.contains, func(a netip.Addr) bool { return s.contains(a) && u.contains(a) })
		in := s.within([]block{b, c})
		same("within", in.contains, func(a netip.Addr) bool { return s.contains(a) && (b.contains(a) || c.contains(a)) })
		for _, nets := range [][]netip.Prefix{both.nets, in.nets} {
			for i := range len(nets) - 1 {
				if nets[i].Overlaps(nets[i+1]) || !nets[i].Addr().Less(nets[i+1].Addr()) {
					t.Fatalf("%v is out of order", nets)
				}
			}
		}
		cut := b.cut(p)
		same("cut", func(a netip.Addr) bool {
			return slices.ContainsFunc(cut, func(p netip.Prefix) bool { return p.Contains(a) })
		}, func(a netip.Addr) bool { return p.Contains(a) && b.contains(a) })
		for _, opens := range []bool{false, true} {
			parts := common(b, c, opens)
			same("common", func(a netip.Addr) bool {
				return slices.ContainsFunc(parts, func(b block) bool { return b.contains(a) })
			},
				func(a netip.Addr) bool { return b.contains(a) && c.contains(a) })
			for _, part := range parts {
				if opens && part.cidr != b.cidr {
					t.Fatalf("a part of %v that opens is of %v", b.cidr, part.cidr)
				}
				for _, e := range part.except {
					if !prefix.Covers(part.cidr, e) || e == part.cidr {
						t.Fatalf("%v is excepted of %v", e, part.cidr)
					}
				}
			}
		}
	}
}

func (s *podSet) contains(a netip.Addr) bool {
	return slices.ContainsFunc(s.nets, func(p netip.Prefix) bool { return p.Contains(a) })
}

func members(all []netip.Addr, has func(netip.Addr) bool) (out []netip.Addr) {
	for _, a := range all {
		if has(a) {
			out = append(out, a)
		}
	}
	return out
}
