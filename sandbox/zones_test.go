package sandbox

import (
	"net/netip"
	"slices"
	"testing"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/sandbox/internal/host"
)

func servers(list ...string) (u dns.Upstreams) {
	for _, s := range list {
		u.Servers = append(u.Servers, netip.AddrPortFrom(netip.MustParseAddr(s), 53))
	}
	return u
}

func TestZonesBecomeIndexes(t *testing.T) {
	index := map[string]int{"eth0": 2, "wlan0": 7}
	for _, row := range []struct {
		name        string
		given, want []string
		missing     []string
	}{
		{name: "no zone", given: []string{"192.0.2.1", "2001:db8::1"}, want: []string{"192.0.2.1", "2001:db8::1"}},
		{name: "by name", given: []string{"fe80::1%eth0", "192.0.2.1"}, want: []string{"fe80::1%2", "192.0.2.1"}},
		{name: "by index", given: []string{"fe80::1%7"}, want: []string{"fe80::1%7"}},
		{name: "both ways to say the same", given: []string{"fe80::1%eth0", "fe80::1%2", "fe80::1%wlan0"}, want: []string{"fe80::1%2", "fe80::1%7"}},
		{name: "no such interface", given: []string{"fe80::1%usb0", "fe80::1%eth0"}, want: []string{"fe80::1%usb0", "fe80::1%2"}, missing: []string{"usb0"}},
	} {
		got, missing := host.WithIndexes(servers(row.given...), func(name string) (int, bool) { i, ok := index[name]; return i, ok })
		if !slices.Equal(got.Servers, servers(row.want...).Servers) || !slices.Equal(missing, row.missing) {
			t.Errorf("%s: %v, missing %q", row.name, got.Servers, missing)
		}
	}
}
