package kube

import (
	"net/netip"
	"slices"

	"sluice.dev/sluice/internal/prefix"
	"sluice.dev/sluice/policy"
)

// A rule of any kind becomes clauses. Each clause is one set of addresses with its ports. It
// becomes one rule of package policy, so that large sets are shared and not joined.

// clause matches the addresses of whichever one of any, pods, blocks and domains is set.
type clause struct {
	any     bool
	pods    *podSet
	blocks  []block
	domains []string
	ports   []policy.Port // nil: every protocol
}

func (c *clause) empty() bool {
	return !c.any && (c.pods == nil || len(c.pods.nets) == 0) && len(c.blocks) == 0 && len(c.domains) == 0
}

// everything holds the blocks that any stands for.
var everything = []block{{cidr: netip.MustParsePrefix("0.0.0.0/0")}, {cidr: netip.MustParsePrefix("::/0")}}

// specials are the ranges that an allow rule of package policy opens only by name, but that a
// NetworkPolicy opens with every network around them. The other special ranges stay closed: see the
// package comment.
var specials = []netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10"), // a node's resolver has such an address
	netip.MustParsePrefix("240.0.0.0/4"), // and so do the pods of some clusters
}

// opening returns the networks of an egress allow rule, with the special ranges inside them added.
func opening(blocks []block, host []netip.Prefix) []block {
	out := slices.Clone(blocks)
	for _, b := range blocks {
		for _, list := range [][]netip.Prefix{specials, host} {
			for _, s := range list {
				if s == b.cidr || !prefix.Covers(b.cidr, s) {
					continue
				}
				if inner, ok := blockOf(s, b.except); ok {
					out = append(out, inner)
				}
			}
		}
	}
	return out
}

// within returns what matches both c and p, as a part of c. If c is an egress allow rule, the
// result opens no special addresses that c does not open. A name that c matches counts only if p
// matches every address, because the addresses of a name become known only later.
func (c *clause) within(p *clause, opens bool, host []netip.Prefix) (out clause, ok bool) {
	if out.ports, ok = intersectPorts(c.ports, p.ports); !ok {
		return clause{}, false
	}
	switch {
	case p.any:
		out.any, out.pods, out.blocks, out.domains = c.any, c.pods, c.blocks, c.domains
	case p.pods != nil && c.any:
		out.pods = p.pods
	case p.pods != nil && c.pods != nil:
		out.pods = c.pods.intersect(p.pods)
	case p.pods != nil:
		out.pods = p.pods.within(c.blocks)
	case c.pods != nil:
		out.pods = c.pods.within(p.blocks)
	case c.any || len(c.blocks) > 0:
		blocks := c.blocks
		if c.any {
			blocks = everything
			if opens {
				blocks = opening(everything, host)
			}
		}
		for _, b := range blocks {
			for _, q := range p.blocks {
				out.blocks = append(out.blocks, common(b, q, opens)...)
			}
		}
	}
	return out, !out.empty()
}

// common returns the part of b that is also in q.
func common(b, q block, opens bool) []block {
	part, ok := b.part(q.cidr)
	if !ok {
		return nil
	}
	if !opens && prefix.Covers(b.cidr, q.cidr) {
		part.cidr, part.except = q.cidr, nil
		for _, e := range b.except {
			if prefix.Covers(q.cidr, e) {
				part.except = append(part.except, e)
			}
		}
	}
	// The exceptions of q also apply to the part.
	for _, e := range q.except {
		switch {
		case prefix.Covers(e, part.cidr):
			return nil
		case prefix.Covers(part.cidr, e):
			part.except = append(part.except, e)
		}
	}
	return []block{part}
}

// intersectPorts returns the ports in both lists; nil means every protocol.
func intersectPorts(a, b []policy.Port) (out []policy.Port, ok bool) {
	if a == nil || b == nil {
		return append(a, b...), true
	}
	for _, x := range a {
		for _, y := range b {
			if x.Protocol != y.Protocol {
				continue
			}
			xlo, xhi := portRange(x)
			ylo, yhi := portRange(y)
			if lo, hi := max(xlo, ylo), min(xhi, yhi); lo <= hi {
				out = append(out, ports(x.Protocol, lo, hi))
			}
		}
	}
	return out, len(out) > 0
}

const maxPort = 65535

func portRange(p policy.Port) (lo, hi uint16) {
	if p.Port == 0 {
		return 1, maxPort
	}
	return p.Port, max(p.Port, p.EndPort)
}

// ports writes a range in the form of package policy.
func ports(proto policy.Protocol, lo, hi uint16) policy.Port {
	switch {
	case lo <= 1 && hi == maxPort:
		return policy.Port{Protocol: proto}
	case lo == hi:
		return policy.Port{Protocol: proto, Port: lo}
	}
	return policy.Port{Protocol: proto, Port: lo, EndPort: hi}
}
