package e2e

// A new policy that a program inside would like to delay.

import (
	"bytes"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

// revocation is a policy under which TCP, UDP and echo requests of both families reach far's other
// addresses, and one that denies them.
type revocation struct {
	open, narrow string // files
	watch        *watcher
}

// newRevocation starts far's servers and watches what arrives there.
func newRevocation(t *testing.T, far *netns) *revocation {
	t.Helper()
	serve(t, far)
	return &revocation{
		open:   policyFile(t, "defaultAction: allow"),
		narrow: policyFile(t, fmt.Sprintf("defaultAction: drop\negress:\n- action: allow\n  to: [{cidr: %s/32}, {cidr: \"%s/128\"}]", far4, far6)),
		watch:  far.watch(t, "f0"),
	}
}

// moves returns the protocols in which something that the narrow policy denies has come since from.
// The kernel's own attempts to continue a connection do not count.
func (r *revocation) moves(from int) (protos map[int]bool) {
	protos = make(map[int]bool)
	for _, p := range r.watch.since(from) {
		if a := p.dst.String(); (a == other4 || a == other6) && (p.proto != unix.IPPROTO_TCP || p.payload > 0) && !p.neighbour {
			protos[p.proto] = true
		}
	}
	return protos
}

// busy makes a place use everything that the narrow policy denies, and waits until it moves.
func (r *revocation) busy(t *testing.T, in place) (busy []*proc) {
	t.Helper()
	from := r.watch.count()
	for _, f := range families {
		busy = append(busy,
			in.start(t, "bash", "-c", fmt.Sprintf("exec cat /dev/zero >/dev/tcp/%s/%d", f.other, portWatch)),
			in.start(t, "sh", "-c", fmt.Sprintf("while :; do %s udp -count 20 -expect 21 -timeout 100ms %s; done >/dev/null 2>&1", peerBin(), at(f.other, portEcho))),
			in.start(t, "ping", "-q", "-i", "0.2", f.other))
	}
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		m := r.moves(from)
		return m[unix.IPPROTO_TCP] && m[unix.IPPROTO_UDP] && m[unix.IPPROTO_ICMP] && m[unix.IPPROTO_ICMPV6], fmt.Sprintf("of the protocols only %v move", m)
	})
	return busy
}

// inTime sets a policy, which must be in force within two seconds. It returns the position in the
// watch from which nothing may move any more.
func (r *revocation) inTime(t *testing.T, set func()) (mark int) {
	t.Helper()
	start := time.Now()
	set()
	took := time.Since(start)
	if took > 2*time.Second {
		t.Errorf("setting the policy took %v", took)
	}
	time.Sleep(2*time.Second - took) // the promised bound
	return r.watch.count()
}

// holds checks that the narrow policy is in force in a place, and has been since mark.
func (r *revocation) holds(t *testing.T, in place, mark int) {
	t.Helper()
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		d, r := dial(t, in, "-timeout", "1s", at(far4, portWhoami))
		return d.Error == "", "what the new policy allows does not work\n" + r.String()
	})
	for _, f := range families {
		if d, r := dial(t, in, "-timeout", "500ms", at(f.other, portWhoami)); d.Error == "" {
			t.Errorf("%s: what the new policy denies works\n%s", f.name, r)
		}
	}
	r.still(t, mark)
}

// still checks that nothing that the narrow policy denies has come since mark.
func (r *revocation) still(t *testing.T, mark int) {
	t.Helper()
	if m := r.moves(mark); len(m) > 0 {
		t.Errorf("of what the new policy denies the protocols %v still move", m)
	}
}

// obstacles are what an attacker may do to the processes that have to apply a policy.
var obstacles = []struct {
	what string
	do   func(t *testing.T, monitor, worker int)
}{
	{"nothing happens", func(*testing.T, int, int) {}},
	{"the worker is stopped", func(t *testing.T, _, worker int) { stopProcess(t, worker) }},
	{"the worker is killed", func(_ *testing.T, _, worker int) { syscall.Kill(worker, syscall.SIGKILL) }},
	{"the monitor is stopped", func(t *testing.T, monitor, _ int) { stopProcess(t, monitor) }},
	{"both are stopped", func(t *testing.T, monitor, worker int) {
		stopProcess(t, worker)
		stopProcess(t, monitor)
	}},
}

// stopProcess returns when the process has stopped: until one of its threads has taken the signal,
// the others go on.
func stopProcess(t *testing.T, pid int) {
	t.Helper()
	syscall.Kill(pid, syscall.SIGSTOP)
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		return bytes.Contains(status, []byte("\nState:\tT")), fmt.Sprintf("process %d does not stop (%v)\n%s", pid, err, status)
	})
}

// TestPolicySetCannotBePutOff denies what TCP, UDP and echo requests of both families are using,
// while the processes that have to apply the policy are stopped or killed.
func TestPolicySetCannotBePutOff(t *testing.T) {
	area(t, "policy.revoke", "bash", "ping")
	w := newPair(t)
	r := newRevocation(t, w.far)
	for _, o := range obstacles {
		t.Run(o.what, func(t *testing.T) {
			sb := w.host.sandbox(t, rootInside, "--policy", r.open)
			busy := r.busy(t, sb)
			o.do(t, sb.run.pid, sb.worker())
			mark := r.inTime(t, func() { w.host.sluiceOK(t, "policy", "set", sb.name, r.narrow) })
			r.holds(t, sb, mark)
			endAll(t, busy)
			sb.close(t)
		})
	}
}

// endAll kills what only kept a place busy.
func endAll(t *testing.T, procs []*proc) {
	t.Helper()
	for _, p := range procs {
		p.signal(syscall.SIGKILL)
		p.wait(t, 5*time.Second)
	}
}
