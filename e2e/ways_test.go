package e2e

// Ways out of a sandbox that are no network: other sandboxes' control sockets.

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// elsewhere makes the runtime directory visible at a second path, which no sandbox
// covers: as a volume would be in a container.
func elsewhere(t *testing.T, n *netns) string {
	t.Helper()
	// Short, for a unix socket's path to fit.
	dir, err := os.MkdirTemp(workDir(), "x")
	if err != nil {
		t.Fatal(err)
	}
	n.do(func() { err = unix.Mount(os.Getenv("XDG_RUNTIME_DIR"), dir, "", unix.MS_BIND|unix.MS_REC, "") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.do(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		os.Remove(dir)
	})
	return dir
}

func TestSandboxesDoNotCommandEachOther(t *testing.T) {
	area(t, "control.others", "nsenter", "unshare")
	w := newPair(t)
	alias := elsewhere(t, w.host)
	closed := policyFile(t, "defaultAction: reject")
	victim := w.host.sandbox(t, "--policy", closed)
	open := policyFile(t, "defaultAction: allow")
	// attack gives orders to the victim, and to the attacker's own monitor.
	attack := func(t *testing.T, inside func(argv ...string) result, own string) {
		t.Helper()
		for _, name := range []string{victim.name, own} {
			for _, argv := range [][]string{
				{"policy", "set", name, open}, {"policy", "show", name},
				{"port", "add", name, "9321:9321"}, {"capture", "-w", filepath.Join(t.TempDir(), "c"), name}, {"flows", name},
			} {
				r := inside(append([]string{"env", "XDG_RUNTIME_DIR=" + alias, sluiceBin()}, argv...)...)
				if r.status == 0 || !strings.Contains(r.err, "refused: ") {
					t.Errorf("an order from inside is not refused\n%s", r)
				}
			}
		}
	}
	for _, flags := range [][]string{nil, {rootInside}, {rootInside, "--pid"}} {
		t.Run(fmt.Sprintf("run %v", flags), func(t *testing.T) {
			sb := w.host.sandbox(t, append(flags, "--policy", closed)...)
			attack(t, func(argv ...string) result { return run(t, sb, 10*time.Second, argv...) }, sb.name)
			attack(t, func(argv ...string) result {
				return run(t, sb, 10*time.Second, append([]string{"unshare", "-Ur"}, argv...)...)
			}, sb.name)
		})
	}
	t.Run("attach" /* as root: to a process of our own user namespace */, func(t *testing.T) {
		c := container(t, w.host)
		name := fmt.Sprintf("at%d", c.pid)
		p := w.host.sluice(t, "attach", "--name", name, fmt.Sprint(c.pid))
		eventually(t, 10*time.Second, func() (bool, string) {
			r := w.host.sluiceRun(t, "flows", name)
			return r.status == 0, "it is not attached\n" + r.String()
		})
		attack(t, func(argv ...string) result { return inContainer(t, w.host, c.pid, argv...) }, name)
		p.stop(t, syscall.SIGTERM)
	})
	if r := w.host.sluiceOK(t, "policy", "show", victim.name); !strings.Contains(r.out, "reject") {
		t.Errorf("the victim's policy has changed\n%s", r)
	}
	if r := w.host.sluiceOK(t, "port", "ls", victim.name); strings.Contains(r.out, "9321") {
		t.Errorf("the victim publishes a port\n%s", r)
	}
}
