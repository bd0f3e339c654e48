package cni

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sluice.dev/sluice/internal/testutil"
)

func TestResolversAreOfWhoIsTrustedMost(t *testing.T) {
	const (
		configured = `"resolvers": ["10.96.0.10", "169.254.20.10", "::ffff:10.96.0.10"]`
		runtime    = `"runtimeConfig": {"dns": {"Servers": ["10.0.0.1", "127.0.0.53", "fd00::53", "10.88.0.2", "fd88::2"], "searches": ["svc.test"], "options": ["ndots:5"]}}`
		plugin     = `"prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.88.0.2/16"}], "dns": {"nameservers": ["9.9.9.9", "ns.test"]}}`
		nothing    = `"runtimeConfig": {"dns": {"servers": []}}, "prevResult": {"cniVersion": "1.0.0", "ips": []}`
		useless    = `"runtimeConfig": {"dns": {"servers": ["127.0.0.53"]}}, ` + plugin
	)
	own := []netip.Prefix{netip.MustParsePrefix("10.88.0.2/16"), netip.MustParsePrefix("fd88::2/64")}
	for _, row := range []struct {
		name, members, servers string
		says                   []string
	}{
		{"the configuration", configured + "," + runtime + "," + plugin, "10.96.0.10 169.254.20.10", []string{"from the network configuration"}},
		{"the runtime, which decodes its names in any case", runtime + "," + plugin, "10.0.0.1 fd00::53",
			[]string{"from the runtime", `"127.0.0.53": a loopback address`, `"10.88.0.2": the pod's own address`, `"fd88::2": the pod's own`}},
		{"the main plugin", plugin, "9.9.9.9", []string{"from the main plugin", `"ns.test": not an IP address`}},
		{"nobody", nothing, "", []string{"neither the network configuration nor the runtime"}},
		{"one that names only what cannot be asked is not passed over", useless, "", []string{"from the runtime; left out"}},
		{"an empty word of the runtime", `"runtimeConfig": {"dns": null}, ` + plugin, "9.9.9.9", nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			c, err := loadConfig(conf(row.members))
			testutil.Must(t, err)
			r, err := c.resolversFor(c.prevResult, own)
			testutil.Must(t, err)
			var got []string
			for _, a := range r.Servers {
				got = append(got, a.String())
			}
			if strings.Join(got, " ") != row.servers {
				t.Errorf("%q, want %q", got, row.servers)
			}
			for _, says := range row.says {
				if !strings.Contains(r.Note, says) {
					t.Errorf("noted %q, not %q", r.Note, says)
				}
			}
		})
	}
	c, err := loadConfig(conf(`"runtimeConfig": {"dns": {"servers": "10.0.0.1"}}`))
	testutil.Must(t, err)
	if r, err := c.resolversFor(nil, own); err == nil {
		t.Errorf("a runtime that names no list: %+v", r)
	}
	many := strings.TrimSuffix(strings.Repeat(`"127.0.0.1", "not `+strings.Repeat("x", 1000)+`",`, 100), ",")
	c, err = loadConfig(conf(`"runtimeConfig": {"dns": {"servers": [` + many + `]}}`))
	testutil.Must(t, err)
	if r, err := c.resolversFor(nil, own); err != nil || len(r.Servers) > 0 || len(r.Note) > 4000 {
		t.Errorf("a note of %d bytes, %v", len(r.Note), err)
	}
}

func TestResolversOfTheConfigurationMustBeServers(t *testing.T) {
	for _, list := range []string{
		`"10.0.0.1"`, `[]`, `[1]`, `["ns.test"]`, `["10.0.0.1:53"]`, `["127.0.0.1"]`, `["::1"]`, `["::ffff:127.0.0.1"]`, `["0.0.0.0"]`, `["::"]`,
		`["224.0.0.1"]`, `["ff02::1"]`, `["255.255.255.255"]`, `["240.0.0.1"]`, `["fe80::1"]`, `["fe80::1%eth0"]`, `["fd00::1%eth0"]`,
		`["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4", "1.1.1.5", "1.1.1.6", "1.1.1.7", "1.1.1.8", "1.1.1.9"]`,
	} {
		if c, err := loadConfig(conf(`"resolvers": ` + list)); err == nil || !strings.Contains(err.Error(), "resolvers") {
			t.Errorf("%s: %v, %v", list, c.Resolvers, err)
		}
	}
}

// A monitor that replaces a dead one is told the same, and a record from before there
// were resolvers is one without.
func TestResolversAreInTheRecord(t *testing.T) {
	n := newNode(t)
	testutil.Must(t, n.add(`"resolvers": ["10.96.0.10"]`))
	path := filepath.Join(n.state, attachmentsDir, n.name(), recordFile)
	recorded := func() Resolvers {
		t.Helper()
		b, err := os.ReadFile(path)
		testutil.Must(t, err)
		var a Attachment
		testutil.Must(t, json.Unmarshal(b, &a))
		return a.Launch.Resolvers
	}
	if r := recorded(); !slices.Equal(r.Servers, []netip.Addr{netip.MustParseAddr("10.96.0.10")}) {
		t.Errorf("recorded %+v", r)
	}
	n.procs.told.Clear()
	endProcess(n.procs.pid(n.name()))
	testutil.Must(t, n.status())
	told := func() Resolvers {
		t.Helper()
		spec, _ := n.procs.told.Load(n.name())
		return spec.(LaunchSpec).Resolvers
	}
	if r := told(); len(r.Servers) != 1 || r.Note == "" {
		t.Errorf("the next monitor is told %+v", r)
	}

	b, err := os.ReadFile(path)
	testutil.Must(t, err)
	var old map[string]any
	testutil.Must(t, json.Unmarshal(b, &old))
	launch := old["launch"].(map[string]any)
	if launch["resolvers"] == nil {
		t.Fatal("the record has no resolvers to take away")
	}
	delete(launch, "resolvers")
	b, err = json.Marshal(old)
	testutil.Must(t, err)
	testutil.Must(t, os.WriteFile(path, b, 0o600))
	endProcess(n.procs.pid(n.name()))
	testutil.Must(t, errors.Join(n.status(), n.check()))
	if r := told(); len(r.Servers) != 0 {
		t.Errorf("of an old record: %+v", r)
	}
	testutil.Must(t, n.del())
	n.clean()
}
