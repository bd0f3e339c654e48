package e2e

// Sockets with a path: no network namespace confines them, and the files in a sandbox are the
// caller's.

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// listenPath opens a socket in a namespace that answers no client.
func listenPath(t *testing.T, n *netns, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	var err error
	open := func() { l, err = net.Listen("unix", path) }
	if n == nil {
		open()
	} else {
		n.do(open)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

// hostSockets opens sockets in every kind of place, and returns them by purpose.
func hostSockets(t *testing.T, w *world) map[string]string {
	t.Helper()
	at := func(elements ...string) string { return filepath.Join(append([]string{workDir()}, elements...)...) }
	sockets := map[string]string{
		"a daemon in /run":                        "/run/daemon/d.sock",
		"the session's bus":                       filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "bus"),
		"one that the kernel lists":               at("home", "a", "b", "listed"),
		"one that a variable names, of elsewhere": at("home", "c", "d", "named"),
	}
	for what, path := range sockets {
		n := w.host
		if strings.HasSuffix(what, "elsewhere") {
			n = nil
		}
		listenPath(t, n, path)
	}
	t.Cleanup(func() { os.RemoveAll("/run/daemon"); os.RemoveAll(at("home", "a")); os.RemoveAll(at("home", "c")) })
	w.host.env = append(w.host.env, "DOCKER_HOST=unix://"+sockets["one that a variable names, of elsewhere"])
	return sockets
}

func paths(sockets map[string]string) (all []string) {
	for _, path := range sockets {
		all = append(all, path)
	}
	slices.Sort(all)
	return all
}

// uncover holds attempts to see what is covered, made before a command that needs it.
var uncover = []string{
	`umount -l %[1]s; umount -R %[2]s`,
	`umount -l /run; umount -l %[2]s`,
	`unshare -Urm sh -c 'umount -l /run; umount -l %[2]s; umount -l %[1]s; exec "$0" "$@"' "$@"; exit`,
	`mkdir -p /tmp/u$$ && mount --bind /run /tmp/u$$ && mount --move /tmp/u$$ /run`,
	`mount -o remount,rw,bind %[1]s`,
	`nsenter -t %[3]d -m -- "$@"; exit`,
	`nsenter -t %[3]d -U -m --preserve-credentials -- "$@"; exit`,
	`nsenter -t 1 -m -- "$@"; exit`,
}

func TestHostsSocketsAreOutOfReach(t *testing.T) {
	area(t, "ways.sockets", "umount", "mount", "unshare", "nsenter")
	w := newPair(t)
	sockets := hostSockets(t, w)
	all := paths(sockets)
	closed := policyFile(t, "defaultAction: reject")
	const later = "/run/later.sock"
	connect := func(t *testing.T, in place, argv ...string) map[string]string {
		t.Helper()
		return tries(t, run(t, in, 10*time.Second, argv...))
	}
	ask := func(paths ...string) []string { return append([]string{peerBin(), "ways"}, paths...) }
	for path, got := range connect(t, w.host, ask(all...)...) {
		if got != "done" {
			t.Fatalf("outside, %s is answered %s", path, got)
		}
	}
	for _, flags := range insides {
		t.Run(fmt.Sprint(flags), func(t *testing.T) {
			sb := w.host.sandbox(t, append(flags, "--policy", closed)...)
			listenPath(t, w.host, later)
			aliases := append(slices.Clone(all), later)
			for _, path := range all {
				aliases = append(aliases, fmt.Sprintf("/proc/%d/root%s", sb.run.pid, path), "/proc/1/root"+path)
			}
			none := func(how string, got map[string]string) {
				t.Helper()
				for path, result := range got {
					if result == "done" {
						t.Errorf("%s: %s is reached", how, path)
					}
				}
			}
			none("as it is", connect(t, sb, ask(aliases...)...))
			for _, attempt := range uncover {
				for _, path := range all {
					script := fmt.Sprintf(attempt, path, filepath.Dir(path), sb.run.pid) + "\nexec \"$@\""
					r := run(t, sb, 10*time.Second, append([]string{"sh", "-c", script, "sh"}, ask(aliases...)...)...)
					if strings.HasPrefix(r.out, "{") { // otherwise it did not get that far
						none(script, tries(t, r))
					}
				}
			}
			if r := run(t, sb, 5*time.Second, "sh", "-c", `umount -l "$1"; mount -o remount,rw,bind "$1"; echo x >>"$1"`, "sh", closed); r.status == 0 {
				t.Errorf("the policy's file can be written\n%s", r)
			}
			if got := sb.run.result("").err; strings.Count(got, "out of its reach: other sandboxes") != 1 || !strings.Contains(got, "sockets of the host") || strings.Count(got, "\n") != 1 {
				t.Errorf("it does not say in a line what is covered: %q", got)
			}
		})
	}
	t.Run("one is left by --allow-socket", func(t *testing.T) {
		for _, left := range []string{sockets["a daemon in /run"], sockets["one that the kernel lists"]} {
			sb := w.host.sandbox(t, "--policy", closed, "--allow-socket", left)
			for path, got := range connect(t, sb, ask(all...)...) {
				if (got == "done") != (path == left) {
					t.Errorf("with %s left, %s is answered %s", left, path, got)
				}
			}
		}
	})
	t.Run("all are left by --host-sockets, and without a policy", func(t *testing.T) {
		for _, flags := range [][]string{{"--policy", closed, "--host-sockets"}, nil} {
			sb := w.host.sandbox(t, flags...)
			for path, got := range connect(t, sb, ask(all...)...) {
				if got != "done" {
					t.Errorf("flags %v: %s is answered %s", flags, path, got)
				}
			}
		}
	})
	t.Run("--quiet says nothing", func(t *testing.T) {
		r := w.host.sluiceOK(t, "run", "--quiet", "--policy", closed, "--", "true")
		if r.err != "" {
			t.Errorf("it says something\n%s", r)
		}
	})
	t.Run("programs have a runtime directory to write in", func(t *testing.T) {
		sb := w.host.sandbox(t, "--policy", closed)
		ok(t, sb, 5*time.Second, "sh", "-c", `mkdir "$XDG_RUNTIME_DIR/mine" && touch "$XDG_RUNTIME_DIR/mine/x"`)
		if _, err := os.Stat(filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "mine")); err == nil {
			t.Error("what is written there shows outside")
		}
	})
}

// glibc asks the host's resolver daemons before DNS, unless told otherwise. Their answers are no
// grant.
func TestResolverDaemonsOfTheHostAreNotAsked(t *testing.T) {
	area(t, "ways.names", "getent")
	w := newPair(t)
	w.host.file(t, "/etc/nsswitch.conf", "passwd: files\n hosts: mymachines resolve [!UNAVAIL=return] mdns4_minimal files myhostname dns\nservices: files\n")
	listenPath(t, w.host, "/run/nscd/socket")
	listenPath(t, w.host, "/run/systemd/resolve/io.systemd.Resolve")
	t.Cleanup(func() { os.RemoveAll("/run/nscd"); os.RemoveAll("/run/systemd/resolve") })
	for _, flags := range append(insides, []string{"--policy", policyFile(t, "defaultAction: reject")}) {
		sb := w.host.sandbox(t, flags...)
		r := ok(t, sb, 5*time.Second, "cat", "/etc/nsswitch.conf")
		if !strings.Contains(r.out, "\nhosts: files dns\n") || strings.Contains(r.out, "resolve") || !strings.Contains(r.out, "passwd: files\nservices: files") {
			t.Errorf("flags %v: names come from elsewhere\n%s", flags, r)
		}
		for path, got := range tries(t, run(t, sb, 5*time.Second, peerBin(), "ways", "/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve")) {
			if got == "done" {
				t.Errorf("flags %v: %s is reached", flags, path)
			}
		}
		// If a client of nscd finds it, it waits for an answer that does not come.
		ok(t, sb, 3*time.Second, "getent", "hosts", "localhost")
	}
}
