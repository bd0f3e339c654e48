package sandbox

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/host"
	"sluice.dev/sluice/sandbox/internal/worker"
)

func TestTheNextWorkerHasTheGrants(t *testing.T) {
	now := time.Now()
	addr, other := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	monitors := channel.NewKeptGrants()
	table := worker.NewNames(map[string][]netip.Addr{"pinned.test": {other}}, map[string][]netip.Addr{"callers.test": {addr}}, nil, slog.New(slog.DiscardHandler))
	table.Configure(policy.NamesConfig{TTLFloor: time.Minute, TTLCap: time.Hour})
	told := worker.ToldGrants{Names: table, Tell: func(g channel.GrantMessage) error { return g.Take(monitors, now) }}
	for name, ttl := range map[string]time.Duration{"short.test": 0, "long.test": 48 * time.Hour} {
		if err := told.Grant(name, []netip.Addr{addr, other}, ttl, now); err != nil {
			t.Fatal(err)
		}
	}
	if told.Grant("Not.Normal", []netip.Addr{addr}, time.Hour, now) == nil {
		t.Error("a name that is none is granted")
	}
	if !table.Holds("callers.test", addr, now.Add(1000*time.Hour)) || table.Holds("callers.test", other, now) {
		t.Error("the caller's hosts are not granted for good")
	}
	kept := channel.KeptGrants(monitors, now)
	if len(kept) != 4 {
		t.Errorf("%d grants are kept, not 4: %+v", len(kept), kept)
	}
	next := worker.NewNames(nil, nil, channel.KeptGrants(monitors, now.Add(30*time.Second)), slog.New(slog.DiscardHandler))
	for _, row := range []struct {
		name string
		in   time.Duration
		want bool
	}{
		// Half a minute had passed when the next one began.
		{"short.test", 25 * time.Second, true}, {"short.test", 35 * time.Second, false},
		{"long.test", 59 * time.Minute, true}, {"long.test", time.Hour, false},
		{"pinned.test", 0, false}, // each pins its own
	} {
		if got := next.Holds(row.name, other, time.Now().Add(row.in)); got != row.want {
			t.Errorf("%s after %v: granted %v", row.name, row.in, got)
		}
	}
}

func TestTheCallersHostsAreGranted(t *testing.T) {
	entry := func(addr string, names ...string) guest.HostEntry {
		return guest.HostEntry{Addr: netip.MustParseAddr(addr), Names: names}
	}
	entries := []guest.HostEntry{
		entry("198.51.100.1", "DB.corp", "db"), entry("2001:db8::1", "db.corp"), entry("198.51.100.1", "db.corp"),
		entry("0.0.0.0", "ads.test"), entry("127.0.0.1", "tracker.test"), entry("::1", "six.test"), entry("ff02::1", "ip6-allnodes"),
		entry("fe80::1%eth0", "router.lan"), entry("198.51.100.2", "no name", "127.1"),
	}
	got, left := host.HostsToGrant(entries)
	want := map[string][]netip.Addr{
		"db.corp": {netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8::1")}, "db": {netip.MustParseAddr("198.51.100.1")},
	}
	if left != 0 || !maps.EqualFunc(got, want, slices.Equal) {
		t.Errorf("%v, %d left", got, left)
	}
	for i := range 2 * host.MaxCallersHosts {
		entries = append(entries, entry("198.51.100.3", fmt.Sprintf("n%d.test", i)))
	}
	if got, left := host.HostsToGrant(entries); len(got) > host.MaxCallersHosts || left < host.MaxCallersHosts {
		t.Errorf("%d names of a long file, %d left", len(got), left)
	}
}

func TestGrantsOfAWorkerAreLookedAt(t *testing.T) {
	for _, row := range []struct {
		about, body string
		killed      bool
	}{
		{"a grant is remembered", `{"name":"a.test","addrs":["192.0.2.1"],"ttl":60000000000}`, false},
		{"one of no name is not", `{"name":"A..test","addrs":["192.0.2.1"],"ttl":60000000000}`, true},
		{"nor one of no address", `{"name":"a.test","addrs":[],"ttl":60000000000}`, true},
		{"nor one of no time", `{"name":"a.test","addrs":["192.0.2.1"],"ttl":-1}`, true},
		{"nor what is none", `[1]`, true},
	} {
		t.Run(row.about, func(t *testing.T) {
			l, _ := startFake(t, "grants "+row.body)
			if row.killed {
				<-l.Ended()
			} else {
				<-l.Ready
			}
			want := 1
			if row.killed {
				want = 0
			}
			if s := l.Grants.Stats(); s.Grants != want {
				t.Errorf("%d grants", s.Grants)
			}
		})
	}
}
