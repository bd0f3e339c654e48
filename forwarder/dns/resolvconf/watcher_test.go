package resolvconf

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/internal/testutil"
)

// watching runs a Watcher on path and returns its first result and a function that awaits the next
// one.
func watching(t *testing.T, path string) (first dns.Upstreams, next func(want string) error, firstErr error) {
	t.Helper()
	w, err := NewWatcher(path)
	if err != nil {
		t.Fatal(err)
	}
	type word struct {
		u   dns.Upstreams
		err error
	}
	words := make(chan word, 16)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx, func(u dns.Upstreams, err error) { words <- word{u, err} }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		if len(words) != 0 {
			t.Errorf("and then %v", <-words)
		}
		if err := w.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	first, firstErr = w.Upstreams()
	return first, func(want string) error {
		t.Helper()
		select {
		case got := <-words:
			var have string
			for _, s := range got.u.Servers {
				have += s.Addr().String()
			}
			if have != want {
				t.Fatalf("got %q (%v), want %q", have, got.err, want)
			}
			return got.err
		case <-time.After(10 * time.Second):
			t.Fatalf("nothing seen, want %q", want)
			return nil
		}
	}, firstErr
}

func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

const (
	conf1 = "nameserver 192.0.2.1\n"
	conf2 = "nameserver 192.0.2.2\n"
	conf3 = "nameserver 192.0.2.3\n"
)

var serverOf1 = netip.MustParseAddrPort("192.0.2.1:53")

func TestWatcherFollowsAPlainFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	put(t, path, conf1)
	first, next, err := watching(t, path)
	if err != nil || !slices.Equal(first.Servers, []netip.AddrPort{serverOf1}) {
		t.Fatalf("at first %v, %v", first, err)
	}
	put(t, path, conf2) // in place
	next("192.0.2.2")

	put(t, path+".new", conf3) // replaced
	testutil.Must(t, os.Rename(path+".new", path))
	next("192.0.2.3")
	put(t, path, conf1) // the new file is watched, too
	next("192.0.2.1")

	testutil.Must(t, os.Remove(path)) // missing
	if err := next(""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the error is %v", err)
	}
	put(t, path, conf2) // and back
	if err := next("192.0.2.2"); err != nil {
		t.Errorf("the error stays: %v", err)
	}
	put(t, path, "# nothing\n") // empty is no error
	if err := next(""); err != nil {
		t.Errorf("the error is %v", err)
	}
	put(t, path, conf1)
	next("192.0.2.1")
	testutil.Must(t, os.Remove(path)) // a FIFO must not hang us
	testutil.Must(t, syscall.Mkfifo(path, 0o644))
	if err := next(""); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("the error is %v", err)
	}
}

// /etc/resolv.conf → ../run/link → resolve/stub.conf, where every part can move.
func TestWatcherFollowsSymlinksAndTheirDirectories(t *testing.T) {
	dir := t.TempDir()
	at := func(p string) string { return filepath.Join(dir, p) }
	for _, d := range []string{"etc", "run/resolve"} {
		testutil.Must(t, os.MkdirAll(at(d), 0o755))
	}
	put(t, at("run/resolve/stub.conf"), conf1)
	testutil.Must(t, os.Symlink("resolve/stub.conf", at("run/link")))
	testutil.Must(t, os.Symlink("../run/link", at("etc/resolv.conf")))
	first, next, _ := watching(t, at("etc/resolv.conf"))
	if !slices.Equal(first.Servers, []netip.AddrPort{serverOf1}) {
		t.Fatalf("at first %v", first)
	}

	put(t, at("run/resolve/tmp"), conf2) // the file replaced at the end of the chain
	testutil.Must(t, os.Rename(at("run/resolve/tmp"), at("run/resolve/stub.conf")))
	next("192.0.2.2")

	put(t, at("run/resolve/full.conf"), conf3) // the link in the middle switched
	testutil.Must(t, os.Symlink("resolve/full.conf", at("run/tmp")))
	testutil.Must(t, os.Rename(at("run/tmp"), at("run/link")))
	next("192.0.2.3")

	testutil.Must(t, os.RemoveAll(at("run/resolve"))) // the directory gone with its daemon
	next("")
	testutil.Must(t, os.MkdirAll(at("run/resolve"), 0o755)) // and made anew
	put(t, at("run/resolve/full.conf"), conf1)
	next("192.0.2.1")

	testutil.Must(t, os.Rename(at("run"), at("elsewhere"))) // a directory moved away from above
	next("")
	testutil.Must(t, os.Rename(at("elsewhere"), at("run")))
	next("192.0.2.1")

	put(t, at("etc/tmp"), conf2) // the first link replaced by a file
	testutil.Must(t, os.Rename(at("etc/tmp"), at("etc/resolv.conf")))
	next("192.0.2.2")
}

func TestWatcherSaysNothingOfChangesWithoutMeaning(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	put(t, path, conf1)
	_, next, _ := watching(t, path)
	put(t, path, "# a comment\n"+conf1)
	put(t, filepath.Join(filepath.Dir(path), "other"), conf3)
	testutil.Must(t, os.Remove(path)) // a moment without a file is not a loss
	put(t, path, conf1)
	put(t, path, conf2)
	next("192.0.2.2") // and the cleanup finds nothing else
}

func TestResolveChain(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	testutil.Must(t, err)
	testutil.Must(t, os.Symlink("loop", filepath.Join(dir, "loop")))
	if _, err := resolveChain(filepath.Join(dir, "loop")); !errors.Is(err, errLinkLoop) {
		t.Errorf("a loop: %v", err)
	}
	ch, err := resolveChain(filepath.Join(dir, "missing/below"))
	if err != nil || ch.file != filepath.Join(dir, "missing/below") || !ch.entries[dir]["missing"] || ch.entries[filepath.Join(dir, "missing")] != nil {
		t.Errorf("a missing directory: %v, %v", ch, err)
	}
	testutil.Must(t, os.Symlink(dir+"/../"+filepath.Base(dir)+"/./real", filepath.Join(dir, "abs")))
	put(t, filepath.Join(dir, "real"), "")
	if ch, err := resolveChain(filepath.Join(dir, "abs")); err != nil || ch.file != filepath.Join(dir, "real") {
		t.Errorf("an absolute link with dots: %v, %v", ch.file, err)
	}
}

func TestParseResolvConf(t *testing.T) {
	ap := func(s ...string) (out []netip.AddrPort) {
		for _, a := range s {
			out = append(out, netip.AddrPortFrom(netip.MustParseAddr(a), 53))
		}
		return out
	}
	rows := []struct {
		about, file string
		want        dns.Upstreams
	}{
		{"nothing", "", dns.Upstreams{}},
		{"comments and blank lines are skipped", "# nameserver 1.1.1.1\n; nameserver 1.1.1.1\n\n", dns.Upstreams{}},
		{"servers keep their order, each once", "nameserver 192.0.2.2\nnameserver 192.0.2.1 # first\nnameserver 192.0.2.2\n", dns.Upstreams{Servers: ap("192.0.2.2", "192.0.2.1")}},
		{"the last line needs no end", "nameserver 192.0.2.1", dns.Upstreams{Servers: ap("192.0.2.1")}},
		{"Windows line ends do no harm", "nameserver 192.0.2.1\r\nsearch a.example\r\n", dns.Upstreams{Servers: ap("192.0.2.1"), Search: []string{"a.example"}}},
		{"IPv6 servers may have a zone", "nameserver fe80::1%eth0\nnameserver ::1\n", dns.Upstreams{Servers: ap("fe80::1%eth0", "::1")}},
		{"mapped servers are unmapped", "nameserver ::ffff:192.0.2.1\n", dns.Upstreams{Servers: ap("192.0.2.1")}},
		{"the stub of systemd-resolved is a server like any other", "nameserver 127.0.0.53\noptions edns0 trust-ad\n", dns.Upstreams{Servers: ap("127.0.0.53"), StubOptions: []string{"edns0", "trust-ad"}}},
		{"what is no address is skipped", "nameserver example.com\nnameserver\nnameserver 1.2.3\n", dns.Upstreams{}},
		{"the last search list wins", "search a b\ndomain c d\nsearch e. f\n", dns.Upstreams{Search: []string{"e.", "f"}}},
		{"domain is a search list of one", "search a b\ndomain c d\n", dns.Upstreams{Search: []string{"c"}}},
		{"an empty search list clears it", "domain c\nsearch\n", dns.Upstreams{}},
		{"what is no domain is not searched", "search . a..b ok\n", dns.Upstreams{Search: []string{"ok"}}},
		{"options of ours are taken", "options timeout:3 attempts:4 rotate use-vc\n", dns.Upstreams{Timeout: 3 * time.Second, Attempts: 4, Rotate: true, UseVC: true}},
		{"options of the library are kept, the last of a kind", "options ndots:5 edns0\noptions ndots:2\n", dns.Upstreams{StubOptions: []string{"edns0", "ndots:2"}}},
		{"options beyond their bounds are capped", "options timeout:999999999999 attempts:99 timeout:99999 ndots:99\n", dns.Upstreams{Timeout: 30 * time.Second, Attempts: 5, StubOptions: []string{"ndots:15"}}},
		{"nonsense options are skipped", "options timeout:-1 attempts:0 ndots: debug :\nwhatever\n", dns.Upstreams{}},
	}
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			if got := dns.ParseResolvConf([]byte(row.file)); !got.Equal(row.want) {
				t.Errorf("got %+v, want %+v", got, row.want)
			}
		})
	}
	if got := dns.ParseResolvConf([]byte(strings.Repeat("nameserver 192.0.2.1\nnameserver 192.0.2.2\n", 3) + strings.Repeat(conf3, 3))); len(got.Servers) != 3 {
		t.Errorf("%v", got.Servers)
	}
}

func TestResolvConfForTheSandbox(t *testing.T) {
	u := dns.ParseResolvConf([]byte("nameserver 192.0.2.1\nsearch a.example b.example\noptions ndots:5 timeout:9 trust-ad\n"))
	got := string(u.ResolvConf(netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("fd00::3")))
	want := "search a.example b.example\nnameserver 10.0.2.3\nnameserver fd00::3\noptions ndots:5 trust-ad\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if got := string(dns.Upstreams{}.ResolvConf(netip.MustParseAddr("10.0.2.3"))); got != "nameserver 10.0.2.3\n" {
		t.Errorf("got %q", got)
	}
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nsearch a b\noptions ndots:5 timeout:9 attempts:2 rotate\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		u := dns.ParseResolvConf(data)
		if len(u.Servers) > dns.MaxServers || len(u.Search) > dns.MaxSearch || u.Timeout > dns.MaxTimeout || u.Attempts > dns.MaxAttempts {
			t.Fatalf("beyond bounds: %+v", u)
		}
		// The options passed on read back the same.
		v := dns.ParseResolvConf(u.ResolvConf())
		if !slices.Equal(v.Search, u.Search) || !slices.Equal(v.StubOptions, u.StubOptions) {
			t.Fatalf("%+v became %+v", u, v)
		}
	})
}

// TestWatcherFollowsWithoutInotify runs TestWatcherFollowsAPlainFile in a user namespace whose
// users may have no inotify instance.
func TestWatcherFollowsWithoutInotify(t *testing.T) {
	cmd := exec.Command("sh", "-ec", `echo 0 > /proc/sys/user/max_inotify_instances; exec "$0" -test.run '^TestWatcherFollowsAPlainFile$' -test.v`, os.Args[0])
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestWatcherFollowsAPlainFile") {
		t.Errorf("%v\n%s", err, out)
	}
}
