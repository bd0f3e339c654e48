package host

import (
	"net"
	"net/netip"
	"slices"
	"strconv"

	"sluice.dev/sluice/forwarder/dns"
)

// Zones of link-local resolvers. Router advertisements (RFC 8106) and DHCPv6 give a host
// such servers: `nameserver fe80::1%eth0`. What an interface's name stands for is asked by
// netlink, which the worker has not; so it is told the index. An interface that is removed
// and made again has another one, so the names are kept and looked up again after each
// change of the host's addresses.

// WithIndexes is u with each zone by its interface's index. A zone that names no interface
// stays as it is, and its server cannot be asked until there is one; missing lists them.
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

// InterfaceIndex finds an interface of the caller's network namespace.
func InterfaceIndex(name string) (int, bool) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return 0, false
	}
	return i.Index, true
}
