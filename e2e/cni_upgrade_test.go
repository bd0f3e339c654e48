package e2e

// A new binary takes over while pods run.

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// sluiceCtl runs a control command, which finds attachments by the runtime directory.
func (n *node) sluiceCtl(t *testing.T, args ...string) result {
	t.Helper()
	return run(t, n, 20*time.Second, append([]string{"env", "XDG_RUNTIME_DIR=/run", sluiceBin()}, args...)...)
}

// network returns what the pod has of a network, as ip shows it.
func (p *pod) network(t *testing.T) string {
	t.Helper()
	var all []string
	for _, what := range []string{"link show eth0", "addr show eth0", "route show table all dev eth0", "-6 route show table all dev eth0"} {
		for line := range strings.Lines(ok(t, p, 5*time.Second, append([]string{"ip", "-o"}, strings.Fields(what)...)...).out) {
			all = append(all, line)
		}
	}
	slices.Sort(all)
	return strings.Join(all, "")
}

// lastEvent returns the last line of a `peer hold`.
func lastEvent(t *testing.T, out string) (r struct {
	Event   string
	Open    int
	Failed  map[string]int
	Seconds float64
}) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return r
}

func TestCNIUpgrade(t *testing.T) {
	cniArea(t, "cni.upgrade")
	n := newNode(t)
	serve(t, n.far)
	log := filepath.Join(n.dir, "flows.log")
	withLog := map[string]any{"flowLog": log}
	gated := map[string]any{"flowLog": log, "policy": gate["policy"]}
	shut := n.add(t, n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, alone: true, sluice: gated}))
	open := n.add(t, n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, sluice: withLog}))
	serve(t, open)
	out := n.watchFor(t, "", func(p packet) bool {
		return escapes(p) && p.src.String() != open.addr(false) && p.src.String() != open.addr(true)
	})
	for _, p := range []*pod{shut, open} {
		dial(t, p, at(far4, portWhoami))
	}
	inside := newKnocker(t, shut)
	inside.at(t, "tcp:"+at(far4, portHTTP), "tcp:"+at(far6, portDigest), "udp:"+at(far4, portEcho), "udp:"+at(far6, portWhoami), "tcp:"+at(far4, portWhoami))
	outside := newKnocker(t, n.far)
	outside.at(t, "tcp:"+at(shut.addr(false), portHTTP), "udp:"+at(shut.addr(true), portEcho))

	// The second build of the same program is where an administrator would put it.
	next := filepath.Join(n.dir, "next")
	crashing := write(t, "crashing", "#!/bin/sh\n[ \"$2\" = --version ] && exec "+os.Getenv("SLUICE_CNI_BIN")+" \"$@\"\nkill -9 $$\n")
	b, err := os.ReadFile(os.Getenv("SLUICE_CNI_FAULTS_BIN"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(next, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(crashing, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, binary string
		fails        string
		exe          string
		args         []string
	}{
		{"a second build", next, "", next, nil},
		{"one that crashes before it serves", crashing, "the old binary serves again", next, []string{shut.attachment(t).Name}},
		{"what is at its own path", "", "", next, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			before, openBefore := shut.attachment(t), open.attachment(t)
			network, openNetwork := shut.network(t), open.network(t)
			away := shut.start(t, peerBin(), "hold", "-count", "20", at(far6, portEcho))
			away.waitText(t, `"held","open":20`, 10*time.Second)
			coming := n.far.start(t, peerBin(), "hold", "-count", "20", at(open.addr(false), portEcho))
			coming.waitText(t, `"held","open":20`, 10*time.Second)
			records, _ := os.ReadFile(log)

			args := append([]string{"upgrade"}, row.args...)
			if row.binary != "" {
				args = append([]string{"upgrade", "--binary", row.binary}, row.args...)
			}
			r := n.sluiceCtl(t, args...)
			if row.fails == "" {
				r.wantStatus(t, 0)
			} else if r.status == 0 || !strings.Contains(r.err, row.fails) {
				t.Errorf("the upgrade is to fail\n%s", r)
			}
			// New flows work at once, and old ones end at once.
			if d, r := dial(t, shut, "-timeout", "1s", at(far4, portWhoami)); d.Error != "" || d.Ms > 500 {
				t.Errorf("the first new flow\n%s", r)
			}
			away.write([]byte("echo\n"))
			echo := lastEvent(t, away.waitText(t, `"echoed"`, 10*time.Second))
			if echo.Seconds > 1 || echo.Failed["ECONNRESET"]+echo.Failed["EPIPE"] != 20 {
				t.Errorf("flows that were proxied: %+v, want 20 that were reset", echo)
			}
			coming.write([]byte("echo\n"))
			if echo := lastEvent(t, coming.waitText(t, `"echoed"`, 10*time.Second)); echo.Open != 20 || echo.Seconds > 2 {
				t.Errorf("flows from outside: %+v, want 20 that go on", echo)
			}
			for _, p := range []*proc{away, coming} {
				p.stop(t, syscall.SIGKILL)
			}

			after := shut.attachment(t)
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", after.PID)); strings.TrimSuffix(exe, " (deleted)") != row.exe {
				t.Errorf("the monitor is %s", exe)
			}
			if after.Worker == before.Worker || (row.fails == "") != (after.PID == before.PID) {
				t.Errorf("before %+v, now %+v", before, after)
			}
			testutil.Within(t, 2*time.Second, func() (bool, string) {
				below := descendants(after.PID)
				return len(below) == 1 && below[0] == after.Worker, fmt.Sprintf("below the monitor there is %q", describe(below))
			})
			if now := shut.network(t); now != network {
				t.Errorf("the pod's network was\n%s\nand is\n%s", network, now)
			}
			if now := open.network(t); now != openNetwork {
				t.Errorf("the other pod's network was\n%s\nand is\n%s", openNetwork, now)
			}
			if openBefore.PID != open.attachment(t).PID {
				t.Error("the other pod's monitor has another pid")
			}
			if now, _ := os.ReadFile(log); !strings.HasPrefix(string(now), string(records)) || len(now) <= len(records) {
				t.Errorf("the flow log had %d bytes and has %d", len(records), len(now))
			}
			if err := shut.check(); err != nil {
				t.Errorf("CHECK: %v", err)
			}
		})
	}
	for door, n := range inside.end(t) {
		if door != "tcp:"+at(far4, portWhoami) {
			t.Errorf("%s was reached %d times", door, n)
		}
	}
	if got := outside.end(t); len(got) > 0 {
		t.Errorf("the pod was reached: %v", got)
	}
	got := out.since(0)
	for _, p := range got[:min(len(got), 20)] {
		t.Errorf("a packet got out: %v", p)
	}
	if lost := out.lost(t); lost != 0 {
		t.Errorf("the watch lost %d packets", lost)
	}
}
