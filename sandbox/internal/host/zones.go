package host

import (
	"net"
	"net/netip"
	"slices"
	"strconv"

	"sluice.dev/sluice/forwarder/dns"
)

// Zones of link-local resolvers. Router advertisements (RFC 8106) and DHCPv6 give a host such
// servers: `nameserver fe80::1%eth0`. Looking up an interface's name takes netlink, which the
// worker does not have, so it is told the index. An interface that is removed and made again gets
// another index, so the names are kept and looked up again after each change of the host's
// addresses.

// WithIndexes returns u with each zone replaced by its interface's index. A zone that names no
// interface stays, and its server cannot be asked until the interface exists; missing lists these
// zones.
func WithIndexes(u dns.Upstreams, indexOf func(string) (int, bool)) (_ dns.Upstreams, missing []string) {
	if !slices.ContainsFunc(u.Servers, func(s netip.AddrPort) bool { return s.Addr().Zone() != "" }) {
		return u, nil
	}
	var servers []netip.AddrPort
	for _, s := range u.Servers {
		if zone := s.Addr().Zone(); zone != "" {
			if i, ok := indexOf(zone); ok {
				s = netip.AddrPortFrom(s.Addr().WithZone(strconv.Itoa(i)), s.Port())
			} else if _, err := strconv.ParseUint(zone, 10, 31); err != nil {
				missing = append(missing, zone)
			}
		}
		if !slices.Contains(servers, s) {
			servers = append(servers, s)
		}
	}
	u.Servers = servers
	return u, missing
}

// InterfaceIndex returns the index of an interface in the caller's network namespace.
func InterfaceIndex(name string) (int, bool) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return 0, false
	}
	return i.Index, true
}
