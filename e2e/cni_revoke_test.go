package e2e

// A new policy for a pod that would like to delay it: it is in force within two seconds, and no
// older one ever returns, whatever repairs the pod afterwards.

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// revokedPod is a pod that starts with what r opens; its configuration keeps saying so.
func revokedPod(t *testing.T, n *node, r *revocation) *pod {
	t.Helper()
	return n.add(t, n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, alone: true, sluice: map[string]any{"policy": r.open}}))
}

// repaired kills what serves the pod and has the runtime start it again.
func (p *pod) repaired(t *testing.T) {
	t.Helper()
	kill(t, p.attachment(t).PID)
	if err := p.n.gc(t.Context(), p.list, p); err != nil {
		t.Fatalf("GC: %v", err)
	}
}

// TestCNIPolicySetCannotBePutOff is TestPolicySetCannotBePutOff in a pod, whose monitor can be
// killed without ending the pod.
func TestCNIPolicySetCannotBePutOff(t *testing.T) {
	cniArea(t, "cni.revoke", "bash", "ping")
	n := newNode(t)
	r := newRevocation(t, n.far)
	for _, o := range obstacles {
		t.Run(o.what, func(t *testing.T) {
			p := revokedPod(t, n, r)
			a := p.attachment(t)
			busy := r.busy(t, p)
			o.do(t, a.PID, a.Worker)
			mark := r.inTime(t, func() { n.sluice(t, "policy", "set", a.Name, r.narrow) })
			r.holds(t, p, mark)
			if err := p.check(); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			p.repaired(t)
			r.holds(t, p, mark)
			endAll(t, busy)
		})
	}
	t.Run("the monitor is stopped for good", func(t *testing.T) {
		p := revokedPod(t, n, r)
		a := p.attachment(t)
		busy := r.busy(t, p)
		letGo := holdStill(t, a.PID)
		mark := r.inTime(t, func() {
			if set := n.sluiceCtl(t, "policy", "set", a.Name, r.narrow); set.status == 0 || !strings.Contains(set.err, "puts this policy in force") {
				t.Errorf("a monitor that nothing makes go on took the policy, or what became of it is not said\n%s", set)
			}
		})
		letGo()
		for _, f := range families {
			if d, r := dial(t, p, "-timeout", "500ms", at(f.far, portWhoami)); d.Error == "" {
				t.Errorf("%s: the pod has a network without a monitor\n%s", f.name, r)
			}
		}
		if err := p.check(); err == nil || !strings.Contains(err.Error(), "nothing serves the pod") {
			t.Errorf("CHECK says %v", err)
		}
		r.still(t, mark)
		if err := n.gc(t.Context(), p.list, p); err != nil {
			t.Fatalf("GC: %v", err)
		}
		r.holds(t, p, mark)
		p.repaired(t)
		r.holds(t, p, mark)
		endAll(t, busy)
	})
}

// holdStill stops every thread of a process as a debugger does. Only the process's death ends that,
// as if it were stopped again each time it is continued.
func holdStill(t *testing.T, pid int) (letGo func()) {
	t.Helper()
	held, enough := make(chan error), make(chan struct{})
	go func() { // ends when it is let go
		runtime.LockOSThread() // never unlocked: the end of the tracer lets go
		held <- stopThreads(pid)
		<-enough
	}()
	if err := <-held; err != nil {
		close(enough)
		t.Fatalf("stopping process %d: %v", pid, err)
	}
	letGo = sync.OnceFunc(func() { close(enough) })
	t.Cleanup(letGo)
	return letGo
}

// stopThreads makes the calling thread trace and stop a process's threads, until no other thread is
// left.
func stopThreads(pid int) error {
	stopped := make(map[int]bool)
	for {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		more := false
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil || stopped[tid] {
				continue
			}
			more, stopped[tid] = true, true
			if err = unix.PtraceSeize(tid); err == nil {
				err = unix.PtraceInterrupt(tid)
			}
			if err == nil {
				_, err = unix.Wait4(tid, nil, unix.WALL, nil)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) { // a thread may have ended
				return err
			}
		}
		if !more {
			return nil
		}
	}
}
