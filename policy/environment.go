package policy

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"sluice.dev/sluice/internal/prefix"
)

// Environment describes the machine that the rules run on. Prefixes have no host bits set; IPv4
// ones are not in 4-in-6 form.
type Environment struct {
	Gateway4 netip.Addr   `json:"gateway4,omitzero"`
	Gateway6 netip.Addr   `json:"gateway6,omitzero"`
	DNS4     netip.Addr   `json:"dns4,omitzero"`
	DNS6     netip.Addr   `json:"dns6,omitzero"`
	Guest    []netip.Addr `json:"guest,omitempty"`

	// Host lists the addresses that the host's kernel treats as its own: those of its interfaces,
	// AnyIP and anycast ranges, broadcast addresses. HostUnknown is set if the list could not be
	// read in full. The rules then deny everything, as they do with more than MaxHostRanges.
	Host        []netip.Prefix `json:"host,omitempty"`
	HostUnknown bool           `json:"hostUnknown,omitempty"`
	// HostClients puts clients at the host's addresses into entity world as well. In a pod they are
	// not only the node itself: the node forwards other clients' connections under its own address.
	HostClients bool `json:"hostClients,omitempty"`
	// OpenIngress leaves ingress open under a policy that has egress rules and no ingress key. As
	// in Kubernetes, such a policy says nothing about a pod's ingress, probes included.
	OpenIngress  bool `json:"openIngress,omitempty"`
	HostLoopback bool `json:"hostLoopback,omitempty"` // the gateway address stands for the host's loopback

	// Metadata are the operator's own metadata services, NAT64 the prefixes of the network's
	// translators. Both can only close addresses: see ParseMetadata and ParseNAT64 for what they
	// may contain.
	Metadata []netip.Prefix `json:"metadata,omitempty"`
	NAT64    []netip.Prefix `json:"nat64,omitempty"`
}

// Bounds on an Environment's lists.
const (
	MaxHostRanges = 1 << 14
	MaxMetadata   = 64
	MaxNAT64      = 8
)

// ParseMetadata parses the addresses of metadata services, or small networks of them.
func ParseMetadata(list []string) ([]netip.Prefix, error) {
	if len(list) > MaxMetadata {
		return nil, fmt.Errorf("%d of them: the limit is %d", len(list), MaxMetadata)
	}
	return parsePrefixes(list, checkMetadata)
}

// ParseNAT64 parses the prefixes of translators: IPv6 networks of the lengths of RFC 6052 section
// 2.2.
func ParseNAT64(list []string) ([]netip.Prefix, error) {
	if len(list) > MaxNAT64 {
		return nil, fmt.Errorf("%d of them: the limit is %d", len(list), MaxNAT64)
	}
	return parsePrefixes(list, checkNAT64)
}

func parsePrefixes(list []string, check func(netip.Prefix) error) (out []netip.Prefix, err error) {
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			a, addrErr := netip.ParseAddr(s)
			if addrErr != nil || a.Zone() != "" {
				return nil, fmt.Errorf("%q: want an address or a network", s)
			}
			a = a.Unmap()
			p = netip.PrefixFrom(a, a.BitLen())
		}
		if err := check(p); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func checkMetadata(p netip.Prefix) error {
	switch {
	case checkPrefix(p) != nil:
		return checkPrefix(p)
	case p.Addr().Is4() && p.Bits() < 24, p.Addr().Is6() && p.Bits() < 64:
		return fmt.Errorf("%v: want a network no wider than a /24 or, for IPv6, a /64", p)
	}
	for c := range numClasses {
		if !c.yields(metadata) && slices.ContainsFunc(classes[c].ranges, p.Overlaps) {
			return fmt.Errorf("%v: such addresses are closed by %s as it is", p, classes[c].rule)
		}
	}
	return nil
}

// nat64Lengths are those of RFC 6052.
var nat64Lengths = []int{32, 40, 48, 56, 64, 96}

func checkNAT64(p netip.Prefix) error {
	switch {
	case checkPrefix(p) != nil:
		return checkPrefix(p)
	case p.Addr().Is4() || !slices.Contains(nat64Lengths, p.Bits()):
		return fmt.Errorf("%v: want an IPv6 prefix of 32, 40, 48, 56, 64 or 96 bits (RFC 6052)", p)
	}
	return nil
}

// check validates what an operator configured.
func (env *Environment) check() error {
	if len(env.Metadata) > MaxMetadata || len(env.NAT64) > MaxNAT64 {
		return fmt.Errorf("%d metadata addresses and %d NAT64 prefixes: the limits are %d and %d", len(env.Metadata), len(env.NAT64), MaxMetadata, MaxNAT64)
	}
	var errs []error
	for _, p := range env.Metadata {
		errs = append(errs, checkMetadata(p))
	}
	for _, p := range env.NAT64 {
		errs = append(errs, checkNAT64(p))
	}
	return errors.Join(errs...)
}

// boundaries returns every special range, with the environment's last. Each range is listed once;
// the strictest class claims it first.
func (env *Environment) boundaries(ingress bool) map[netip.Prefix]class {
	out := make(map[netip.Prefix]class)
	for c := range numClasses {
		for _, p := range classes[c].ranges {
			out[p] = c
		}
	}
	table := maps.Clone(out)
	for _, p := range env.Metadata {
		surround(out, table, metadata, p)
	}
	claim := func(c class, addrs ...netip.Addr) {
		for _, a := range addrs {
			if a = a.Unmap().WithZone(""); !a.IsValid() {
				continue
			}
			p := netip.PrefixFrom(a, a.BitLen())
			if _, taken := out[p]; !taken {
				out[p] = c
			}
		}
	}
	if !ingress {
		gw := gateway
		if env.HostLoopback {
			gw = hostLoopback
		}
		claim(gw, env.Gateway4, env.Gateway6)
		claim(dnsServer, env.DNS4, env.DNS6)
		claim(guest, env.Guest...)
	}
	table = maps.Clone(out)
	for _, p := range env.Host {
		surround(out, table, host, p)
	}
	return out
}

// surround gives a range of the environment to class c, together with the ranges of table inside it
// that yield to c. Inside a range that does not yield, it has no effect.
func surround(out, table map[netip.Prefix]class, c class, p netip.Prefix) {
	var inside []netip.Prefix
	for q, was := range table {
		switch {
		case !was.yields(c) && prefix.Covers(q, p):
			return
		case was.yields(c) && prefix.Covers(p, q):
			inside = append(inside, q)
		}
	}
	for _, q := range append(inside, halves(p)...) {
		out[q] = c
	}
}

// yields reports whether a range of class c that the environment assigns to class to, as a whole or
// in part, becomes that class: the stricter reading wins.
func (c class) yields(to class) bool {
	return classes[c].lock == open || to == metadata && (c == linkLocal || c == reserved || c == metadata)
}

// halves returns the range itself or, for all addresses of a family, its two halves, so that a rule
// for everything names nothing special.
func halves(p netip.Prefix) []netip.Prefix {
	if p.Bits() > 0 {
		return []netip.Prefix{p}
	}
	lower, upper := prefix.Halves(p)
	return []netip.Prefix{lower, upper}
}
