package e2e

// The deaths of the worker, of the monitor and of the command.

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

func TestWorkerKilledDuringTransfer(t *testing.T) {
	area(t, "crash.worker", "bash")
	w := newPair(t)
	serve(t, w.far)
	watch := w.far.watch(t, "f0")
	sb := w.host.sandbox(t, rootInside, "-p", "9005:"+fmt.Sprint(portWhoami), "--policy", policyFile(t, fmt.Sprintf(`
defaultAction: reject
egress:
- action: allow
  to: [{cidr: %s/32}, {cidr: "%s/128"}]
ingress:
- action: allow`, far4, far6)))
	serve(t, sb)
	// A program inside tries the denied addresses all the time.
	sb.start(t, "sh", "-c", fmt.Sprintf("while :; do %[1]s udp -count 50 -expect 51 -timeout 50ms %[2]s; %[1]s udp -count 50 -expect 51 -timeout 50ms %[3]s; done",
		peerBin(), at(other4, portEcho), at(other6, portEcho)))
	for i := range 3 {
		t.Run(fmt.Sprintf("kill %d", i+1), func(t *testing.T) {
			bulk := sb.start(t, "bash", "-c", fmt.Sprintf("exec cat /dev/zero >/dev/tcp/%s/%d", far4, portWatch))
			testutil.Within(t, 10*time.Second, func() (bool, string) {
				for _, f := range sb.flows(t) {
					if f.orig.dport == portWatch && f.orig.bytes > 1<<20 {
						return true, ""
					}
				}
				return false, "the transfer does not start\n" + bulk.result("").String()
			})
			old := sb.worker()
			killed := time.Now()
			syscall.Kill(old, syscall.SIGKILL)
			d, r := dial(t, sb, "-timeout", "5s", at(far4, portWhoami))
			if took := time.Since(killed); d.Error != "" || took > time.Second {
				t.Errorf("the next connection took %v: %q\n%s", took, d.Error, r)
			}
			sb.waitWorker(t, old, time.Second)
			if d, r := dial(t, w.far, "-timeout", "3s", at(pair4, 9005)); d.Error != "" {
				t.Errorf("the published port does not work after the restart\n%s", r)
			}
			bulk.signal(syscall.SIGKILL)
			bulk.wait(t, 5*time.Second)
		})
	}
	for _, p := range watch.since(0) {
		a, from := p.dst.String(), p.src.String()
		if a == other4 || a == other6 || p.dst.IsGlobalUnicast() && from != pair4 && from != pair6 {
			t.Errorf("a packet escaped: %v", p)
			break
		}
	}
	sb.close(t)
}

func TestMonitorKilledLeavesNothing(t *testing.T) {
	area(t, "crash.monitor")
	w := newPair(t)
	serve(t, w.far)
	sb := w.host.launch(t, "-p", "9007:9007")
	<-sb.ready
	hold := sb.start(t, peerBin(), "hold", "-count", "100", at(far4, portEcho))
	hold.waitText(t, `"held"`, 10*time.Second)
	below := descendants(sb.run.pid)
	if len(below) < 3 {
		t.Errorf("expected worker, guest and command below the monitor: %q", describe(below))
	}
	syscall.Kill(sb.run.pid, syscall.SIGKILL)
	<-sb.run.done
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		var left []int
		for _, pid := range below {
			if stat(pid) != nil {
				left = append(left, pid)
			}
		}
		return len(left) == 0, fmt.Sprintf("still running: %q", describe(left))
	})
	// The name can be used again, and the dead monitor's remains are cleared away.
	again := w.host.sluiceRun(t, "run", "--name", sb.name, "-p", "9007:9007", "--", "true")
	again.wantStatus(t, 0)
	if r := w.host.sluiceOK(t, "ps"); len(r.out) > 0 && containsWord(r.out, sb.name) {
		t.Errorf("ps still shows the dead sandbox\n%s", r)
	}
}

func TestCommandEndsWithItsChildren(t *testing.T) {
	area(t, "crash.children")
	w := newPair(t)
	// A grandchild that ignores everything must not keep the sandbox or survive it.
	r := w.host.sluiceRun(t, "run", "--pid", "--", "sh", "-c", "setsid sh -c 'trap \"\" HUP TERM INT; sleep 600' >/dev/null 2>&1 </dev/null & exit 4")
	r.wantStatus(t, 4)
}
