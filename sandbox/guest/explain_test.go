package guest

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
)

func TestBadCircumstancesNameCauseAndCure(t *testing.T) {
	needRoot(t)
	taken := baseConfig("true")
	taken.Link.Name = "lo"
	gone := baseConfig("true")
	gone.Dir = "/no/such/dir"
	for _, row := range []struct {
		name string
		s    scene
		want []string
	}{
		{"no /dev/net/tun", scene{UID: ordinary, Tun: "absent"}, []string{"/dev/net/tun", "modprobe tun", "--device"}},
		{"no permission on /dev/net/tun", scene{UID: ordinary, Tun: "locked"}, []string{"permission", "chmod 666 /dev/net/tun", "udev"}},
		{"user namespaces are off", scene{UID: ordinary, NoUserNS: true}, []string{"user namespaces are off", "sysctl user.max_user_namespaces"}},
		{"the device's name is taken", scene{UID: ordinary, Config: taken}, []string{"choose another name"}},
		{"the working directory is not there", scene{UID: ordinary, Config: gone}, []string{"working directory", "/no/such/dir"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.s.Config.Command == nil {
				row.s.Config = baseConfig("true")
			}
			got := play(t, row.s)
			if got.code != StatusOurs || strings.Count(got.stderr, "\n") != 1 {
				t.Errorf("%+v", got)
			}
			for _, w := range row.want {
				if !strings.Contains(got.stderr, w) {
					t.Errorf("no %q in %q", w, got.stderr)
				}
			}
		})
	}
}

func TestRootNeedsNoPermissionOnTheDeviceNode(t *testing.T) {
	needRoot(t)
	if got := play(t, scene{Tun: "locked", Config: baseConfig("true")}); got.code != 0 {
		t.Errorf("%+v", got)
	}
}

func TestConfigIsChecked(t *testing.T) {
	v4 := netip.MustParsePrefix("10.0.2.100/24")
	for _, row := range []struct {
		name string
		c    Config
		want string
	}{
		{"no command", Config{}, "no command to run"},
		{"a NUL in an argument", Config{Command: []string{"a", "b\x00"}}, "NUL"},
		{"an IPv4 prefix as IPv6", Config{Command: []string{"a"}, Addr6: v4}, "not an IPv6 prefix"},
		{"a gateway without an address", Config{Command: []string{"a"}, Gateway4: v4.Addr()}, "without an IPv4 address"},
		{"the gateway's own address", Config{Command: []string{"a"}, Addr4: v4, Gateway4: v4.Addr()}, "both"},
		{"a multicast MAC", Config{Command: []string{"a"}, MAC: net.HardwareAddr{1, 0, 0, 0, 0, 0}}, "not a unicast"},
		{"a search word that ends the line", Config{Command: []string{"a"}, Search: []string{"a\nnameserver 1.1.1.1"}}, "cannot stand in resolv.conf"},
		{"a host name that ends the line", Config{Command: []string{"a"}, Hosts: []HostEntry{{v4.Addr(), []string{"a\nb"}}}}, "cannot be a host name"},
		{"a host entry without a name", Config{Command: []string{"a"}, Hosts: []HostEntry{{v4.Addr(), nil}}}, "no name"},
		{"a sysctl of the whole machine", Config{Command: []string{"a"}, Sysctls: map[string]string{"kernel.core_pattern": "x"}}, "net."},
		{"a sysctl that climbs", Config{Command: []string{"a"}, Sysctls: map[string]string{"net.../kernel": "x"}}, "net."},
		{"too many name servers", Config{Command: []string{"a"}, DNS: make([]netip.Addr, maxNameservers+1)}, "name servers"},
		{"too many hosts", Config{Command: []string{"a"}, Hosts: make([]HostEntry, maxHostEntries+1)}, "host entries"},
		{"too many hidden directories", Config{Command: []string{"a"}, HideDirs: make([]string, maxHideDirs+1)}, "directories"},
		{"too many descriptors", Config{Command: []string{"a"}, Files: make([]*os.File, maxFiles+1)}, "descriptors"},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := Start(context.Background(), row.c)
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("got %v, want %q", err, row.want)
			}
		})
	}
}

func TestStartEndsWithItsContext(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Start(ctx, baseConfig("true")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
