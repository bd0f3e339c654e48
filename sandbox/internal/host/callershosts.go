package host

import (
	"net/netip"
	"slices"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/guest"
)

// MaxCallersHosts bounds how many addresses of the caller's hosts file are granted: files with more
// are block lists.
const MaxCallersHosts = 1024

// HostsToGrant returns the entries of a hosts file that lead out of the sandbox and have a name
// that a rule can have. left counts those beyond MaxCallersHosts.
func HostsToGrant(entries []guest.HostEntry) (hosts map[string][]netip.Addr, left int) {
	hosts = make(map[string][]netip.Addr)
	taken := 0
	for _, e := range entries {
		if e.Addr.IsLoopback() || e.Addr.IsUnspecified() || e.Addr.IsMulticast() || e.Addr.Zone() != "" {
			continue
		}
		for _, n := range e.Names {
			name, err := policy.NormalizeName(n)
			switch {
			case err != nil || slices.Contains(hosts[name], e.Addr):
			case taken == MaxCallersHosts:
				left++
			default:
				hosts[name] = append(hosts[name], e.Addr)
				taken++
			}
		}
	}
	return hosts, left
}
