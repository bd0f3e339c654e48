package e2e

// What must return to its starting point after a test: descriptors and goroutines in a sandbox that
// still runs its flows; processes, mounts, interfaces and files after it.

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// usage is what a sandbox holds at one moment.
type usage struct {
	goroutines int
	monitorFDs int
	workerFDs  int
	workerPid  int
	workerRSS  int // KiB of memory not shared with the binary's file
	flows      int
}

func (sb *sandbox) usage(t *testing.T) usage {
	t.Helper()
	u := usage{workerPid: sb.worker(), flows: len(sb.flows(t))}
	if g, ok := number(sb.stats(t), "goroutines"); ok {
		u.goroutines = int(g)
	} else {
		t.Errorf("sluice stats -o json has no number %q: %s", "goroutines", sb.host.sluiceRun(t, "stats", "-o", "json", sb.name))
	}
	u.monitorFDs, u.workerFDs = descriptors(sb.run.pid), descriptors(u.workerPid)
	fmt.Sscanf(status(u.workerPid)["RssAnon"], "%d", &u.workerRSS)
	return u
}

// settled returns the usage once the number of descriptors is stable: a worker with published ports
// gets a stock of sockets after its command has started.
func (sb *sandbox) settled(t *testing.T) (u usage) {
	t.Helper()
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		before := u
		u = sb.usage(t)
		return u.workerFDs == before.workerFDs && u.monitorFDs == before.monitorFDs, fmt.Sprintf("the sandbox's descriptors do not come to rest: %+v, then %+v", before, u)
	})
	return u
}

func descriptors(pid int) int { return len(descriptorList(pid)) }

func descriptorList(pid int) (all []string) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		target, _ := os.Readlink(filepath.Join(dir, e.Name()))
		all = append(all, e.Name()+"→"+target)
	}
	return all
}

// checkGivenBack checks that the sandbox, whose programs have ended, holds no more than at its
// start. The control connection that asks costs a goroutine or two and a descriptor, both times.
func (sb *sandbox) checkGivenBack(t *testing.T) {
	t.Helper()
	// UDP and ICMP have no close; this saves half a minute in each test.
	w := []string{"sysctl", sb.name}
	for _, s := range []string{"udp_timeout", "udp_timeout_stream", "icmp_timeout", "icmpv6_timeout", "tcp_timeout_syn_sent"} {
		w = append(w, "nf_conntrack_"+s+"=1")
	}
	sb.host.sluiceOK(t, w...)
	var now usage
	testutil.Within(t, 15*time.Second, func() (bool, string) {
		now = sb.usage(t)
		if t.Failed() {
			return true, ""
		}
		good := now.flows == 0 && now.goroutines <= sb.before.goroutines+2 && now.monitorFDs <= sb.before.monitorFDs &&
			(now.workerPid != sb.before.workerPid || now.workerFDs <= sb.before.workerFDs)
		return good, "the sandbox does not give back what it used: " + fmt.Sprintf("%+v at the start, %+v now\n  monitor's descriptors %v\n  worker's descriptors %v",
			sb.before, now, descriptorList(sb.run.pid), descriptorList(now.workerPid))
	})
}

// leavesNothing checks, after the test's whole clean-up, that nothing is left.
func leavesNothing(t *testing.T) {
	t.Helper()
	mounts := mountLines()
	t.Cleanup(func() {
		testutil.Within(t, 5*time.Second, func() (bool, string) {
			var left []int
			for _, pid := range processes() {
				if pid != 1 && pid != os.Getpid() {
					left = append(left, pid)
				}
			}
			return len(left) == 0, fmt.Sprintf("processes left behind: %q", describe(left))
		})
		for line := range mountLines() {
			if !mounts[line] {
				t.Errorf("a mount is left behind: %s", line)
			}
		}
		if left := stateFiles(); len(left) > 0 {
			t.Errorf("state files are left behind: %q", left)
			for _, f := range left {
				os.RemoveAll(f)
			}
		}
	})
}

func mountLines() map[string]bool {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	lines := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		lines[strings.TrimSpace(line)] = true
	}
	return lines
}

// stateFiles lists what sandboxes left in the runtime directory.
func stateFiles() (left []string) {
	for _, dir := range []string{os.Getenv("XDG_RUNTIME_DIR"), "/run"} {
		root := filepath.Join(dir, "sluice")
		filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			// Locks and the directory itself may stay; a sandbox's own files may not.
			if err == nil && path != root && (d.Type()&fs.ModeSocket != 0 || filepath.Dir(path) == root && d.IsDir()) {
				left = append(left, path)
			}
			return nil
		})
	}
	return left
}
