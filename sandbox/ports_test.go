package sandbox

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/host"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/ports"
)

func port(t *testing.T, spec string) api.Port {
	t.Helper()
	p, err := ports.ParsePort(spec)
	testutil.Must(t, err)
	return p
}

// nullOpen stands in for ListenOn: it opens no port, and refuses the given ones.
func nullOpen(refuse ...uint16) func(string, netip.AddrPort) (int, netip.AddrPort, error) {
	return func(_ string, at netip.AddrPort) (int, netip.AddrPort, error) {
		if slices.Contains(refuse, at.Port()) {
			return -1, at, errTaken
		}
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if at.Port() == 0 {
			at = netip.AddrPortFrom(at.Addr(), 50000)
		}
		return fd, at, err
	}
}

func TestPortTable(t *testing.T) {
	before := testutil.Descriptors(t, os.Getpid())
	table := ports.PortTable{Open: nullOpen(8005)}
	t.Run("without an address, one socket for each family of the guest", func(t *testing.T) {
		for _, row := range []struct {
			v4, v6 bool
			want   string
		}{{true, true, "[0.0.0.0:1 [::]:1]"}, {true, false, "[0.0.0.0:1]"}, {false, true, "[[::]:1]"}} {
			made, err := table.Add(port(t, "1:1"), row.v4, row.v6)
			testutil.Must(t, err)
			var at []netip.AddrPort
			for _, l := range made[0].Listeners {
				at = append(at, l.Host)
			}
			if fmt.Sprint(at) != row.want {
				t.Errorf("v4=%v v6=%v: %v, want %s", row.v4, row.v6, at, row.want)
			}
			gone, err := table.Remove(port(t, "1:1"))
			testutil.Must(t, err)
			ports.ClosePublished(gone)
		}
	})
	t.Run("the kernel's choice is the same for both families", func(t *testing.T) {
		made, err := table.Add(port(t, "0:80"), true, true)
		testutil.Must(t, err)
		if made[0].Port.HostPort != 50000 || made[0].Listeners[1].Host.Port() != 50000 {
			t.Errorf("got %+v", made)
		}
		gone, err := table.Remove(port(t, "50000:80"))
		testutil.Must(t, err)
		ports.ClosePublished(gone)
	})
	t.Run("a range of which one port is taken leaves none open", func(t *testing.T) {
		n := testutil.Descriptors(t, os.Getpid())
		if _, err := table.Add(port(t, "8000-8009:80-89"), true, true); !errors.Is(err, errTaken) {
			t.Errorf("got %v", err)
		}
		if len(table.List()) != 0 || testutil.Descriptors(t, os.Getpid()) != n {
			t.Errorf("%d ports, %d descriptors instead of %d", len(table.List()), testutil.Descriptors(t, os.Getpid()), n)
		}
	})
	t.Run("a part of a range can be removed, what is not there cannot", func(t *testing.T) {
		_, err := table.Add(port(t, "127.0.0.1:9000-9003:1-4"), true, true)
		testutil.Must(t, err)
		gone, err := table.Remove(port(t, "127.0.0.1:9001-9002:2-3"))
		testutil.Must(t, err)
		ports.ClosePublished(gone)
		var e *api.Error
		if _, err := table.Remove(port(t, "127.0.0.1:9000-9001:1-2")); !errors.As(err, &e) || e.Code != api.CodeNotFound {
			t.Errorf("got %v, want not-found", err)
		}
		if len(table.List()) != 2 {
			t.Errorf("%v", ports.ApiPorts(table.List()))
		}
		for _, wrong := range []string{"9000:1", "127.0.0.1:9000:7", "127.0.0.1:9000:1/udp"} {
			if _, err := table.Remove(port(t, wrong)); err == nil {
				t.Errorf("%s removed another port", wrong)
			}
		}
	})
	t.Run("the table is bounded", func(t *testing.T) {
		full := ports.PortTable{Open: nullOpen(), Ports: make([]ports.Published, ports.MaxPublished)}
		if _, err := full.Add(port(t, "1:1"), true, false); err == nil || !strings.Contains(err.Error(), "limit") {
			t.Errorf("got %v", err)
		}
	})
	table.CloseAll()
	if after := testutil.Descriptors(t, os.Getpid()); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestListenErrorsNameCauseAndCure(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	testutil.Must(t, err)
	defer taken.Close()
	at := netip.MustParseAddrPort(taken.Addr().String())
	_, _, err = ports.ListenOn("tcp", at)
	if err = ports.Explain(err); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), at.String()) ||
		!strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("taken: %v; want the port and who has it", err)
	}
	_, _, err = ports.ListenOn("udp", netip.MustParseAddrPort("192.0.2.99:1234"))
	if err = ports.Explain(err); !errors.Is(err, unix.EADDRNOTAVAIL) || !strings.Contains(err.Error(), "no interface of this host has the address 192.0.2.99") {
		t.Errorf("not ours: %v", err)
	}
	err = ports.Explain(&ports.BindFailure{Proto: "tcp", At: netip.MustParseAddrPort("0.0.0.0:80"), Err: unix.EACCES})
	if !strings.Contains(err.Error(), "ip_unprivileged_port_start") {
		t.Errorf("low port: %v", err)
	}
}

func TestListenOnKeepsFamiliesApart(t *testing.T) {
	fd4, at4, err := ports.ListenOn("tcp", netip.MustParseAddrPort("0.0.0.0:0"))
	testutil.Must(t, err)
	defer unix.Close(fd4)
	fd6, at6, err := ports.ListenOn("tcp", netip.AddrPortFrom(netip.IPv6Unspecified(), at4.Port()))
	if err != nil {
		t.Skipf("no IPv6 here: %v", err)
	}
	defer unix.Close(fd6)
	if at4.Port() == 0 || at6.Port() != at4.Port() {
		t.Errorf("%s and %s", at4, at6)
	}
}

// TestPortOfTheKernelsChoiceIsFreeInBothFamilies leaves one of the kernel's four ports to one
// family, or to both. The kernel asks one family only, so most of its choices are taken in the
// other.
func TestPortOfTheKernelsChoiceIsFreeInBothFamilies(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root to make network namespaces")
	}
	const free = 40003
	for _, row := range []struct {
		what   string
		v4, v6 []uint16 // held by another program
	}{
		{"IPv6 has one port", nil, []uint16{40000, 40001, 40002}},
		{"IPv4 has one port", []uint16{40000, 40001, 40002}, nil},
		{"they have one in common", []uint16{40000}, []uint16{40001, 40002}},
	} {
		for _, proto := range []string{"tcp", "udp"} {
			t.Run(row.what+", "+proto, func(t *testing.T) {
				// The thread is in a namespace of its own and dies with the goroutine.
				runtime.LockOSThread()
				testutil.Must(t, unix.Unshare(unix.CLONE_NEWNET))
				testutil.Must(t, os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40003"), 0))
				hold := func(a netip.Addr, taken []uint16) {
					for _, p := range taken {
						fd, _, err := ports.ListenOn(proto, netip.AddrPortFrom(a, p))
						testutil.Must(t, err)
						t.Cleanup(func() { unix.Close(fd) })
					}
				}
				hold(netip.IPv4Unspecified(), row.v4)
				hold(netip.IPv6Unspecified(), row.v6)
				before := testutil.Descriptors(t, os.Getpid())
				table := ports.PortTable{Open: ports.ListenOn}
				for range 16 { // the kernel's choice is random
					made, err := table.Add(port(t, "0:80/"+proto), true, true)
					testutil.Must(t, err)
					if l := made[0].Listeners; len(l) != 2 || l[0].Host.Port() != free || l[1].Host.Port() != free || made[0].Port.HostPort != free {
						t.Fatalf("got %+v", made)
					}
					table.CloseAll()
				}
				if after := testutil.Descriptors(t, os.Getpid()); after != before {
					t.Errorf("%d descriptors before, %d after", before, after)
				}
			})
		}
	}
}

func TestPublishAutoFollowsTheSandbox(t *testing.T) {
	var log []string
	table := ports.PortTable{Open: nullOpen(8081)}
	others := map[ports.HeldPort]bool{{Proto: "tcp", Port: 8082}: true, {Proto: "udp", Port: 8080}: true}
	a := &autoPublisher{
		made: make(map[ports.AutoPort]api.Port), refused: make(map[ports.AutoPort]bool), taken: table.Find, held: func() map[ports.HeldPort]bool { return others },
		publish: func(p api.Port) ([]ports.Published, error) {
			made, err := table.Add(p, true, true)
			if err == nil {
				log = append(log, "+"+ports.FormatPort(p))
			} else {
				log = append(log, "!"+ports.FormatPort(p))
			}
			return made, err
		},
		remove: func(p api.Port) ([]ports.Published, error) {
			gone, err := table.Remove(p)
			ports.ClosePublished(gone)
			log = append(log, "-"+ports.FormatPort(p))
			return gone, err
		},
		log: logring.NewLogRing(time.Now, nil),
	}
	defer table.CloseAll()
	by := func(s string) ports.AutoPort { return ports.AutoPort{Proto: "tcp", Host: netip.MustParseAddrPort(s)} }
	for _, row := range []struct {
		name string
		now  []ports.AutoPort
		want string
	}{
		{"what listens is published", []ports.AutoPort{by("127.0.0.1:8080")}, "+127.0.0.1:8080:8080"},
		{"once", []ports.AutoPort{by("127.0.0.1:8080")}, ""},
		{"what is taken on the host is left out", []ports.AutoPort{by("127.0.0.1:8080"), by("127.0.0.1:8081")}, "!127.0.0.1:8081:8081"},
		{"what is gone is withdrawn", []ports.AutoPort{by("[::1]:8080")}, "-127.0.0.1:8080:8080 +[::1]:8080:8080"},
		{"all of it", nil, "-[::1]:8080:8080"},
		{"a port below 1024 is not taken", []ports.AutoPort{by("127.0.0.1:80"), by("[::1]:1023")}, ""},
		{"nor a well-known one", []ports.AutoPort{by("127.0.0.1:5432"), by("[::1]:6379"), by("127.0.0.1:27017")}, ""},
		{"nor one that another has in either family", []ports.AutoPort{by("[::1]:8082")}, ""},
	} {
		log = nil
		set := make(map[ports.AutoPort]bool)
		for _, k := range row.now {
			set[k] = true
		}
		a.update(set)
		if got := strings.Join(log, " "); got != row.want {
			t.Errorf("%s: %q, want %q", row.name, got, row.want)
		}
	}
	hand := port(t, "127.0.0.1:9090:9090")
	_, err := table.Add(hand, true, true)
	testutil.Must(t, err)
	log = nil
	a.update(map[ports.AutoPort]bool{by("127.0.0.1:9090"): true})
	a.update(nil)
	if len(log) != 0 || !table.Find(hand) {
		t.Errorf("a port published by hand was touched: %v", log)
	}
}

func TestAutoHosts(t *testing.T) {
	for _, row := range []struct {
		inside string
		dual   bool
		at     string
		want   string
	}{
		{"127.0.0.1", false, "127.0.0.1", "[127.0.0.1:80]"},
		{"0.0.0.0", false, "127.0.0.1", "[127.0.0.1:80]"},
		{"::1", false, "127.0.0.1", "[[::1]:80]"},
		{"::", true, "127.0.0.1", "[127.0.0.1:80 [::1]:80]"},
		{"::", false, "0.0.0.0", "[[::]:80]"},
		{"::", true, "192.0.2.1", "[192.0.2.1:80]"},
		{"::1", false, "192.0.2.1", "[]"},
		{"0.0.0.0", false, "::1", "[127.0.0.1:80]"},
	} {
		p := guest.Port{Network: "tcp", Addr: netip.MustParseAddr(row.inside), Port: 80, DualStack: row.dual}
		if got := fmt.Sprint(autoHosts(p, netip.MustParseAddr(row.at))); got != row.want {
			t.Errorf("%s (dual %v) at %s: %s, want %s", row.inside, row.dual, row.at, got, row.want)
		}
	}
}

func TestCgroupMemory(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		testutil.Must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		testutil.Must(t, os.WriteFile(path, []byte(text), 0o644))
		return path
	}
	v2 := write("mounts-v2", "30 23 0:26 / "+dir+"/v2 rw - cgroup2 cgroup rw\n")
	v1 := write("mounts-v1", "31 23 0:27 / "+dir+"/v1 rw - cgroup cgroup rw,memory\n32 23 0:28 / "+dir+"/cpu rw - cgroup cgroup rw,cpu\n")
	in := write("cgroup", "5:memory:/a/b\n0::/a/b\n")
	write("v2/memory.max", "max\n")
	write("v2/a/memory.max", "1000\n")
	write("v2/a/b/memory.max", "2000\n")
	write("v1/memory.limit_in_bytes", "9223372036854771712\n")
	if got := host.CgroupMemoryAt(v2, in); got != 1000 {
		t.Errorf("v2: %d, want the parent's 1000", got)
	}
	if got := host.CgroupMemoryAt(v1, in); got != 0 {
		t.Errorf("v1 without a limit: %d", got)
	}
	write("v1/memory.limit_in_bytes", "500\n") // our own group, as a container sees it
	if got := host.CgroupMemoryAt(v1, in); got != 500 {
		t.Errorf("v1: %d, want 500", got)
	}
	if got := host.CgroupMemoryAt(dir+"/missing", in); got != 0 {
		t.Errorf("without /proc: %d", got)
	}
}

func TestDescribesAddresses(t *testing.T) {
	c, err := Config{}.withDefaults()
	testutil.Must(t, err)
	if c.Guest.Gateway4.String() != "10.0.2.2" || c.DNS4.String() != "10.0.2.3" || c.Guest.Addr4.String() != "10.0.2.100/24" {
		t.Errorf("IPv4: %+v", c.Guest)
	}
	for _, row := range []struct{ addr, gateway, dns, want string }{
		{"10.1.0.9/16", "", "", "10.1.0.2 10.1.0.3"},
		{"10.1.0.9/29", "", "", "10.1.0.10 10.1.0.11"},
		{"10.1.0.9/30", "", "", "too small"},
		{"10.1.0.9/24", "10.2.0.1", "", "not in the sandbox's prefix"},
		{"10.1.0.2/24", "", "", "cannot be its gateway"},
		{"10.1.0.9/24", "10.1.0.3", "", "cannot both be"},
		{"fd00::9/64", "", "", "fd00::2 fd00::3"},
	} {
		addr := netip.MustParsePrefix(row.addr)
		var gw, dns netip.Addr
		if row.gateway != "" {
			gw = netip.MustParseAddr(row.gateway)
		}
		err := plan(&addr, &gw, &dns, false, netip.Prefix{})
		got := fmt.Sprint(gw, " ", dns)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, row.want) {
			t.Errorf("%s: %s, want %s", row.addr, got, row.want)
		}
	}
	if _, err := (Config{NoIPv4: true, NoIPv6: true}).withDefaults(); err == nil {
		t.Error("a sandbox without addresses was accepted")
	}
}
