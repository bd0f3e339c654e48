package e2e

// Names: dig and the C library against the sandbox's resolver, whose upstream is in the
// far namespace.

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

func TestDigIsAnswered(t *testing.T) {
	area(t, "dig", "dig")
	w := newWorld(t)
	w.nameServer(t, "far", far4)
	sb := w.host.sandbox(t)
	for _, row := range []struct {
		what string
		argv string
		want []string
	}{
		{"A over UDP", "dig +short +notcp web.test A", []string{far4}},
		{"AAAA over UDP", "dig +short +notcp web.test AAAA", []string{far6}},
		{"A over TCP", "dig +short +tcp web.test A", []string{far4}},
		{"without EDNS", "dig +noedns web.test A", []string{"status: NOERROR", far4}},
		{"a long answer, truncated, then whole over TCP", "dig +noedns big.test TXT", []string{"Truncated, retrying in TCP mode", "\"39-xxx"}},
		{"a long answer in one large datagram", "dig +bufsize=8000 +ignore big.test TXT", []string{"\"39-xxx", "(UDP)"}},
		{"a truncated answer says so", "dig +noedns +ignore big.test TXT", []string{" tc "}},
		{"a name that does not exist", "dig none.test A", []string{"status: NXDOMAIN"}},
	} {
		t.Run(row.what, func(t *testing.T) {
			r := ok(t, sb, 15*time.Second, append(strings.Fields(row.argv), "+time=3", "+tries=1")...)
			for _, want := range row.want {
				r.wantOut(t, want)
			}
		})
	}
	t.Run("by the C library", func(t *testing.T) {
		ok(t, sb, 10*time.Second, "getent", "ahosts", "web.test").wantOut(t, far4).wantOut(t, far6)
	})
	t.Run("a hundred questions at once", func(t *testing.T) {
		argv := []string{"dig", "+short"}
		for range 100 {
			argv = append(argv, "web.test", "A")
		}
		r := ok(t, sb, 20*time.Second, argv...)
		if n := strings.Count(r.out, far4); n != 100 {
			t.Errorf("%d answers of 100\n%s", n, r)
		}
	})
	t.Run("the resolver's address stands in resolv.conf", func(t *testing.T) {
		ok(t, sb, 5*time.Second, "cat", "/etc/resolv.conf").wantOut(t, "nameserver 10.0.2.3")
	})
}

func TestResolverFollowsTheHost(t *testing.T) {
	area(t, "dns.follow", "dig")
	w := newWorld(t)
	w.nameServer(t, "first", far4)
	w.nameServer(t, "second", other4)
	w.nameServer(t, "third", far6)
	// Some machines have a resolv.conf that is a link into /run, as with systemd-resolved.
	etc := filepath.Join(w.host.dir, "linked-etc")
	for _, f := range []string{"passwd", "group", "nsswitch.conf", "hosts", "services", "protocols", "host.conf"} {
		b, err := os.ReadFile(filepath.Join("/etc", f))
		if err != nil {
			continue
		}
		if err := os.MkdirAll(etc, 0o755); err != nil {
			t.Fatal(err)
		}
		os.WriteFile(filepath.Join(etc, f), b, 0o644)
	}
	stub := filepath.Join(w.host.dir, "stub")
	os.MkdirAll(stub, 0o755)
	replace := func(text string) {
		t.Helper()
		next := filepath.Join(stub, "next")
		if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(stub, "resolv.conf")); err != nil {
			t.Fatal(err)
		}
	}
	replace("nameserver " + far4 + "\nsearch one.test\n")
	if err := os.Symlink(filepath.Join(stub, "resolv.conf"), filepath.Join(etc, "resolv.conf")); err != nil {
		t.Fatal(err)
	}
	var err error
	w.host.do(func() {
		unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH)
		err = unix.Mount(etc, "/etc", "", unix.MS_BIND, "")
	})
	if err != nil {
		t.Fatal(err)
	}
	sb := w.host.sandbox(t)
	answers := func(tag string) {
		t.Helper()
		testutil.Within(t, 5*time.Second, func() (bool, string) {
			r := run(t, sb, 10*time.Second, "dig", "+short", "+time=1", "+tries=1", "tag.test", "TXT")
			return strings.Contains(r.out, tag), "the resolver does not ask the server with " + tag + "\n" + r.String()
		})
	}
	answers("first")
	replace("nameserver " + other4 + "\n")
	answers("second")
	replace("nameserver " + far6 + "\n")
	answers("third")
	replace("# nobody\n")
	replace("nameserver " + far4 + "\n")
	answers("first")
}

func TestDNSFlags(t *testing.T) {
	area(t, "dns.flags", "dig")
	w := newWorld(t)
	w.nameServer(t, "chosen", other4)
	sb := w.host.sandbox(t, "--dns", other4, "--dns-search", "test", "--add-host", "printer.lan:198.51.100.10", "--add-host", "six.lan:2001:db8:2::10")
	ok(t, sb, 10*time.Second, "dig", "+short", "tag.test", "TXT").wantOut(t, "chosen")
	ok(t, sb, 10*time.Second, "getent", "ahosts", "web").wantOut(t, far4)
	ok(t, sb, 10*time.Second, "getent", "ahosts", "printer.lan").wantOut(t, "198.51.100.10")
	ok(t, sb, 10*time.Second, "getent", "ahosts", "six.lan").wantOut(t, "2001:db8:2::10")
	ok(t, sb, 10*time.Second, "cat", "/etc/resolv.conf").wantOut(t, "search test")
	ok(t, sb, 10*time.Second, "cat", "/etc/hosts").wantOut(t, "printer.lan")
}

// TestLinkLocalResolver has what router advertisements give every home network: a resolver at a
// link-local address, with its interface.
func TestLinkLocalResolver(t *testing.T) {
	area(t, "dns.zone", "dig")
	w := newPair(t)
	const router = "fe80::53"
	w.far.ip(t, "addr add "+router+"/64 dev f0 nodad")
	w.host.ip(t, "addr add fe80::2/64 dev h0 nodad")
	w.nameServer(t, "router", router+"%f0")
	w.nameServer(t, "plain", far4)
	index := func() string {
		i, _, _ := strings.Cut(ok(t, w.host, 5*time.Second, "ip", "-o", "link", "show", "h0").out, ":")
		return i
	}
	conf := func(servers ...string) {
		t.Helper()
		w.host.file(t, "/etc/resolv.conf", "nameserver "+strings.Join(servers, "\nnameserver ")+"\n")
	}
	conf(router + "%h0")
	answers := func(t *testing.T, in place, tag string) {
		t.Helper()
		testutil.Within(t, 10*time.Second, func() (bool, string) {
			r := run(t, in, 10*time.Second, "dig", "+short", "+time=1", "+tries=1", "tag.test", "TXT")
			return strings.Contains(r.out, tag), "the server with the tag " + tag + " is not asked\n" + r.String()
		})
		ok(t, in, 10*time.Second, "getent", "ahosts", "web.test").wantOut(t, far4).wantOut(t, far6)
	}
	answers(t, w.host, "router") // direct
	sb := w.host.sandbox(t)
	worker := sb.worker()
	answers(t, sb, "router")
	ok(t, sb, 10*time.Second, "dig", "+tcp", "+short", "web.test").wantOut(t, far4)
	ok(t, sb, 10*time.Second, "dig", "+noedns", "big.test", "TXT").wantOut(t, "Truncated, retrying in TCP mode").wantOut(t, "\"39-xxx")
	for _, row := range []struct {
		what    string
		servers []string
		tag     string
	}{
		{"by its index", []string{router + "%" + index()}, "router"},
		{"second, behind one that refuses", []string{pair4, router + "%h0"}, "router"},
		{"first, on an interface that there is not", []string{router + "%usb0", far4}, "plain"},
		{"as before", []string{router + "%h0"}, "router"},
	} {
		t.Run(row.what, func(t *testing.T) {
			conf(row.servers...)
			answers(t, sb, row.tag)
		})
	}
	t.Run("on an interface that is made anew", func(t *testing.T) {
		before := index()
		w.host.ip(t, "link del h0")
		w.host.ip(t, "link add h1 type veth peer name h2") // takes the index
		w.host.ip(t, fmt.Sprintf("link add h0 type veth peer name f0 netns %d\naddr add fe80::2/64 dev h0 nodad\nlink set h0 up", w.far.tid))
		w.far.ip(t, "addr add "+router+"/64 dev f0 nodad\nlink set f0 up")
		w.nameServer(t, "anew", "-port", "53", router+"%f0")
		if now := index(); now == before {
			t.Fatalf("the interface has the index %s again", now)
		}
		testutil.Within(t, 10*time.Second, func() (bool, string) {
			r := run(t, sb, 10*time.Second, "dig", "+short", "+time=1", "+tries=1", "tag.test", "TXT")
			return strings.Contains(r.out, "anew"), "the server is not asked\n" + r.String()
		})
	})
	if now := sb.worker(); now != worker {
		t.Errorf("the worker ended: %d became %d", worker, now)
	}
}
