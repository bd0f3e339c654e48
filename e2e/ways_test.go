package e2e

// Ways out of a sandbox that do not use the network: other sandboxes' control sockets, the
// terminal, address families that no namespace confines, IPC.

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

// elsewhere makes the runtime directory visible at a second path, which no sandbox covers, as a
// volume in a container would.
func elsewhere(t *testing.T, n *netns) string {
	t.Helper()
	// It is short, so that a unix socket's path fits.
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
	// attack gives orders to the victim and to the attacker's own monitor.
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
		testutil.Within(t, 10*time.Second, func() (bool, string) {
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

// insides are the flags of the kinds of sandbox from which a way out is tried.
var insides = [][]string{nil, {rootInside}, {"--pid"}, {rootInside, "--pid"}}

// tries parses the output of `peer ways`.
func tries(t *testing.T, r result) map[string]string {
	t.Helper()
	var v map[string]string
	for line := range strings.Lines(r.out) {
		if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &v) == nil {
			return v
		}
	}
	t.Fatalf("no attempts\n%s", r)
	return nil
}

func TestTerminalAndFamiliesAreNoWayOut(t *testing.T) {
	area(t, "ways.calls", "script")
	w := newPair(t)
	for _, flags := range insides {
		t.Run(fmt.Sprint(flags), func(t *testing.T) {
			// The sandbox's own terminal is the controlling one of everything that script starts.
			line := shellQuote(append(append([]string{sluiceBin(), "run"}, flags...), "--", peerBin(), "ways"))
			p := w.host.startPlain(t, "script", "-qec", line, "/dev/null")
			r := p.wait(t, 20*time.Second).wantStatus(t, 0)
			got := tries(t, r)
			for name, want := range map[string]string{
				"unix": "done", "inet": "done", "inet6": "done", "netlink": "done",
				"vsock": "EAFNOSUPPORT", "vsock with high bits": "EAFNOSUPPORT", "alg": "EAFNOSUPPORT", "tipc": "EAFNOSUPPORT", "bluetooth": "EAFNOSUPPORT",
				"io_uring": "ENOSYS", "TIOCSTI": "EPERM", "TIOCSTI with high bits": "EPERM", "TIOCLINUX": "EPERM",
			} {
				if got[name] != want {
					t.Errorf("%s: %q, want %q\n%s", name, got[name], want, r)
				}
			}
		})
	}
	t.Run("whoever may be traced inside is filtered too", func(t *testing.T) {
		sb := w.host.sandbox(t, rootInside)
		seen := 0
		for _, pid := range descendants(sb.run.pid) {
			if !inside(t, sb, pid) {
				continue
			}
			seen++
			if s := status(pid); s["Seccomp"] != "2" {
				t.Errorf("process %d has Seccomp %s\n%s", pid, s["Seccomp"], describe([]int{pid}))
			}
		}
		if seen < 2 {
			t.Errorf("%d processes are inside, not the stage and the agent", seen)
		}
	})
}

func TestIPCIsTheSandboxesOwn(t *testing.T) {
	area(t, "ways.ipc", "ipcmk", "ipcs", "ipcrm")
	w := newPair(t)
	r := run(t, w.host, 5*time.Second, "ipcmk", "-M", "4096").wantStatus(t, 0)
	id := strings.TrimSpace(r.out[strings.LastIndex(r.out, ":")+1:])
	defer run(t, w.host, 5*time.Second, "ipcrm", "-m", id)
	ok(t, w.host, 5*time.Second, "ipcs", "-m", "-i", id)
	for _, flags := range insides {
		sb := w.host.sandbox(t, flags...)
		if r := run(t, sb, 5*time.Second, "ipcs", "-m"); r.status != 0 || containsWord(r.out, "4096") {
			t.Errorf("flags %v: the caller's shared memory is seen inside\n%s", flags, r)
		}
	}
}
