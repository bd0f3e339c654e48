package kube

import (
	"net/netip"
	"slices"

	"sluice.dev/sluice/internal/prefix"
	"sluice.dev/sluice/policy"
)

// Sets of addresses. A selector's set is exact: it holds the addresses that pods have at this
// moment, joined into a network only if the set has all addresses of the network, because an
// address that no pod has now may belong to another pod a moment later. A policy's network stays as
// it was written, because that decides which special addresses an allow rule opens (package
// policy).

// podSet is a set of pods' addresses.
type podSet struct {
	nets  []netip.Prefix // disjoint, sorted
	peers []policy.Peer  // the same, shared by all rules with this set
}

func newPodSet(nets []netip.Prefix) *podSet {
	s := &podSet{nets: nets, peers: make([]policy.Peer, len(nets))}
	for i, p := range nets {
		s.peers[i].CIDR = p
	}
	return s
}

// podSetOf returns the set of some addresses.
func podSetOf(addrs []netip.Addr) *podSet {
	slices.SortFunc(addrs, netip.Addr.Compare)
	addrs = slices.Compact(addrs)
	var nets []netip.Prefix
	for _, a := range addrs {
		p := netip.PrefixFrom(a, a.BitLen())
		// Two halves of a network are the network.
		for len(nets) > 0 {
			last := nets[len(nets)-1]
			wider := netip.PrefixFrom(last.Addr(), last.Bits()-1)
			if last.Bits() != p.Bits() || !wider.Contains(p.Addr()) {
				break
			}
			nets, p = nets[:len(nets)-1], wider
		}
		nets = append(nets, p)
	}
	return newPodSet(slices.Clip(nets))
}

// intersect returns the addresses in both sets.
func (s *podSet) intersect(t *podSet) *podSet {
	var out []netip.Prefix
	for i, j := 0, 0; i < len(s.nets) && j < len(t.nets); {
		a, b := s.nets[i], t.nets[j]
		switch {
		case prefix.Covers(a, b):
			out = append(out, b)
			j++
		case prefix.Covers(b, a):
			out = append(out, a)
			i++
		case a.Addr().Less(b.Addr()):
			i++
		default:
			j++
		}
	}
	return newPodSet(out)
}

// within returns the addresses of s that are in one of the blocks.
func (s *podSet) within(blocks []block) *podSet {
	var out []netip.Prefix
	for _, p := range s.nets {
		for _, b := range blocks {
			out = append(out, b.cut(p)...)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	out = slices.Compact(out)
	// Blocks may overlap: a network inside the previous one adds nothing.
	disjoint := out[:0]
	for _, p := range out {
		if n := len(disjoint); n == 0 || !prefix.Covers(disjoint[n-1], p) {
			disjoint = append(disjoint, p)
		}
	}
	return newPodSet(disjoint)
}

// block is a network less its exceptions, which are all inside it.
type block struct {
	cidr   netip.Prefix
	except []netip.Prefix
}

// cidr parses a network as the API writes it.
func cidr(s string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, false
	}
	if a := p.Addr(); a.Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, false
		}
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p.Masked(), true
}

// blockOf returns a network less its exceptions. It fails if an exception covers the whole network;
// an exception outside the network has no effect.
func blockOf(network netip.Prefix, except []netip.Prefix) (b block, ok bool) {
	b.cidr = network
	for _, e := range except {
		if prefix.Covers(e, network) {
			return block{}, false
		}
		if prefix.Covers(network, e) {
			b.except = append(b.except, e)
		}
	}
	return b, true
}

// contains reports whether an address is in the block.
func (b block) contains(a netip.Addr) bool {
	return b.cidr.Contains(a) && !slices.ContainsFunc(b.except, func(e netip.Prefix) bool { return e.Contains(a) })
}

// cut returns the parts of a network that are in the block.
func (b block) cut(p netip.Prefix) []netip.Prefix {
	switch {
	case prefix.Covers(p, b.cidr):
		p = b.cidr
	case !prefix.Covers(b.cidr, p):
		return nil
	}
	split := false
	for _, e := range b.except {
		if prefix.Covers(e, p) {
			return nil
		}
		split = split || prefix.Covers(p, e)
	}
	if !split {
		return []netip.Prefix{p}
	}
	lower, upper := prefix.Halves(p)
	return append(b.cut(lower), b.cut(upper)...)
}

// part returns the addresses in both a network and b, written as b with more exceptions: an allow
// rule then opens only the special addresses that it opens by b.
func (b block) part(p netip.Prefix) (out block, ok bool) {
	if prefix.Covers(p, b.cidr) {
		return b, true
	}
	if !prefix.Covers(b.cidr, p) {
		return block{}, false
	}
	out.cidr = b.cidr
	for _, e := range b.except {
		if prefix.Covers(e, p) {
			return block{}, false
		}
		if prefix.Covers(p, e) {
			out.except = append(out.except, e)
		}
	}
	for around := b.cidr; around.Bits() < p.Bits(); {
		lower, upper := prefix.Halves(around)
		if around = lower; prefix.Covers(upper, p) {
			around, upper = upper, lower
		}
		out.except = append(out.except, upper)
	}
	return out, true
}

func (b block) peer() policy.Peer { return policy.Peer{CIDR: b.cidr, Except: b.except} }
