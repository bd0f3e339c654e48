package host

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/nldump"
	"sluice.dev/sluice/policy"
)

// The addresses that the host's kernel takes for its own, so that a connection to them ends at the
// host:
//
//	the addresses of its interfaces, including those that are down
//	routes of type local: AnyIP, as made by `ip route add local 203.0.113.0/24 dev lo`
//	routes of type anycast, and the subnet-router anycast address of each IPv6 prefix
//	(RFC 4291 section 2.6.1), which the kernel answers as soon as it forwards
//	routes of type broadcast
//
// A routing table counts unless only marks lead to it, as transparent proxies set it up: `local
// default dev lo` in such a table says nothing about packets without the mark.

// errTooManyHost means that the list is too long to make rules of it.
var errTooManyHost = fmt.Errorf("the host has more than %d addresses and local routes", policy.MaxHostRanges)

// ownRoutes are the types of routes that end at the host.
var ownRoutes = []int{unix.RTN_LOCAL, unix.RTN_ANYCAST, unix.RTN_BROADCAST}

// HostRanges returns the ranges that the caller's network namespace takes for its own, except
// loopback.
func HostRanges() ([]netip.Prefix, error) { return nldump.Steady(listHost) }

func listHost() ([]netip.Prefix, error) {
	seen := make(map[netip.Prefix]struct{})
	add := func(p netip.Prefix) {
		if a := p.Addr(); p.IsValid() && !a.IsLoopback() && !(a.IsUnspecified() && p.IsSingleIP()) {
			seen[p] = struct{}{}
		}
	}
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	for _, a := range list {
		p := prefixFrom(a.IPNet)
		if !p.IsValid() {
			continue
		}
		add(netip.PrefixFrom(p.Addr(), p.Addr().BitLen()))
		if p.Addr().Is6() {
			add(netip.PrefixFrom(p.Masked().Addr(), 128))
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		marked, err := markedTables(family)
		if err != nil {
			return nil, err
		}
		all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		err = netlink.RouteListFilteredIter(family, all, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			if !marked[r.Table] && slices.Contains(ownRoutes, r.Type) {
				p := prefixFrom(r.Dst)
				if r.Dst == nil {
					p = wholeFamily(family)
				}
				add(p.Masked())
			}
			return len(seen) <= policy.MaxHostRanges
		})
		if err != nil {
			return nil, fmt.Errorf("list the host's routes: %w", err)
		}
	}
	if len(seen) > policy.MaxHostRanges {
		return nil, errTooManyHost
	}
	out := make([]netip.Prefix, 0, len(seen))
	for p := range seen {
		out = append(out, p)
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out, nil
}

// markedTables returns the routing tables that only rules with a mark lead to.
func markedTables(family int) (map[int]bool, error) {
	rules, err := netlink.RuleList(family)
	if err != nil {
		return nil, fmt.Errorf("list the host's routing rules: %w", err)
	}
	marked := make(map[int]bool)
	for _, r := range rules {
		// A rule for mark 0 is one for packets without a mark.
		only, before := marked[r.Table]
		marked[r.Table] = r.Mark != 0 && !r.Invert && (only || !before)
	}
	return marked, nil
}

// prefixFrom converts an address with its prefix length. For nil it returns the zero Prefix.
func prefixFrom(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones)
}

func wholeFamily(family int) netip.Prefix {
	if family == netlink.FAMILY_V4 {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}
