package policy

import (
	"net/netip"
	"slices"

	"sluice.dev/sluice/internal/prefix"
)

// What the twin knows of its environment beyond single addresses.

// embedded adds what the environment says: it spells bits, and shifts nothing.
func (w twin) embedded(a netip.Addr) []netip.Addr {
	list := twinEmbedded(a)
	if a.Is4() {
		return list
	}
	c, _ := w.class(a, true)
	b, local := a.As16(), netip.MustParsePrefix("fc00::/7").Contains(a) || netip.MustParsePrefix("fe80::/10").Contains(a)
	last := netip.AddrFrom4([4]byte(b[12:]))
	if c == metadata && local {
		list = nil
		if isatap := twinEmbedded(netip.AddrFrom16([16]byte(append([]byte{0x26, 0, 0, 0, 0, 0, 0, 0}, b[8:]...)))); len(isatap) > 0 {
			list = isatap
		}
	}
	if c != metadata && local && slices.Contains(w.env.Metadata, netip.PrefixFrom(last, 32)) {
		list = append(list, last)
	}
	for _, p := range w.env.NAT64 {
		if !p.Contains(a) {
			continue
		}
		without := append(append([]byte{}, b[:8]...), b[9:]...) // the octet u
		list = append(list, netip.AddrFrom4([4]byte(map[int][]byte{
			32: without[4:8], 40: without[5:9], 48: without[6:10], 56: without[7:11], 64: without[8:12], 96: b[12:],
		}[p.Bits()])))
	}
	return list
}

// within reports whether a range of the environment's is around an address, which need not
// be of its class: the range itself is, unless it lies in a stricter one.
func (w twin) within(to class, list []netip.Prefix, a netip.Addr, ingress bool) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool {
		if !p.Contains(a) {
			return false
		}
		for c, info := range classes {
			yields := info.lock == open || to == metadata && (class(c) == linkLocal || class(c) == reserved || class(c) == metadata)
			if !yields && slices.ContainsFunc(info.ranges, func(q netip.Prefix) bool { return prefix.Covers(q, p) }) {
				return false
			}
		}
		if to == metadata {
			return true
		}
		one, _ := w.class(a, ingress)
		return !slices.ContainsFunc(w.env.Metadata, func(q netip.Prefix) bool {
			return prefix.Covers(q, p) && w.within(metadata, []netip.Prefix{q}, a, ingress)
		}) &&
			(!p.IsSingleIP() || one == host)
	})
}

// environment adds what only some hosts have to the little world's.
func (d dice) environment() Environment {
	env := twinEnv
	env.HostLoopback, env.HostClients = d(2) == 0, d(2) == 0
	some := func(from []netip.Prefix) (out []netip.Prefix) {
		for range d(3) {
			out = append(out, from[d(len(from))])
		}
		return out
	}
	env.Host = append(some(twinAnyIP), twinEnv.Host...)
	env.Metadata, env.NAT64 = some(twinMetadata), some(twinNAT64)
	return env
}

var (
	twinAnyIP = prefixes("0.0.0.0/0", "::/0", "10.0.0.0/8", "192.168.1.0/24", "192.168.0.0/16", "fd00::/8", "64:ff9b::/96", "2001:db8::/64", "2002::/16",
		"169.254.0.0/24", "127.0.0.0/8", "2600::/128", "1.1.1.1/32", "10.0.2.0/30", "8.0.0.0/6", "100.64.0.1/32")
	twinMetadata = prefixes("1.1.1.1/32", "10.0.2.2/32", "10.0.2.0/24", "192.168.1.0/24", "fd00::/64", "fd00::7/128", "169.254.1.0/24", "169.254.20.10/32", "240.0.0.0/24",
		"2002:808:808::/64", "64:ff9b::/64", "fe80::/64", "172.16.0.1/32")
	twinNAT64 = prefixes("2600::/32", "2600:64::/40", "2600:64::/48", "2001:db8::/56", "2001:db8::/64", "2001:db8:64::/96", "fd00::/64", "::/64", "64:ff9b::/64", "2002::/32", "fe80::/96")
)
