package e2e

// A new policy that somebody inside would rather put off.

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPolicySetCannotBePutOff denies what TCP, UDP and echo requests of both families are
// busy with, while the processes that have to apply it are stopped or killed.
func TestPolicySetCannotBePutOff(t *testing.T) {
	area(t, "policy.revoke", "bash", "ping")
	w := newPair(t)
	serve(t, w.far)
	watch := w.far.watch(t, "f0")
	open := policyFile(t, "defaultAction: allow")
	narrow := policyFile(t, fmt.Sprintf("defaultAction: drop\negress:\n- action: allow\n  to: [{cidr: %s/32}, {cidr: \"%s/128\"}]", far4, far6))
	denied := func(p packet) bool { a := p.dst.String(); return a == other4 || a == other6 }
	moves := func(from int) (protos map[int]bool) {
		protos = make(map[int]bool)
		for _, p := range watch.since(from) {
			if denied(p) && (p.proto != unix.IPPROTO_TCP || p.payload > 0) && !p.neighbour {
				protos[p.proto] = true
			}
		}
		return protos
	}
	for _, row := range []struct {
		what string
		do   func(sb *sandbox)
	}{
		{"nothing happens", func(*sandbox) {}},
		{"the worker is stopped", func(sb *sandbox) { syscall.Kill(sb.worker(), syscall.SIGSTOP) }},
		{"the worker is killed", func(sb *sandbox) { syscall.Kill(sb.worker(), syscall.SIGKILL) }},
		{"the monitor is stopped", func(sb *sandbox) { syscall.Kill(sb.run.pid, syscall.SIGSTOP) }},
		{"both are stopped", func(sb *sandbox) {
			syscall.Kill(sb.worker(), syscall.SIGSTOP)
			syscall.Kill(sb.run.pid, syscall.SIGSTOP)
		}},
	} {
		t.Run(row.what, func(t *testing.T) {
			sb := w.host.sandbox(t, rootInside, "--policy", open)
			before := watch.count()
			var busy []*proc
			for _, to := range []string{other4, other6} {
				busy = append(busy,
					sb.start(t, "bash", "-c", fmt.Sprintf("exec cat /dev/zero >/dev/tcp/%s/%d", to, portWatch)),
					sb.start(t, "sh", "-c", fmt.Sprintf("while :; do %s udp -count 20 -expect 21 -timeout 100ms %s; done >/dev/null 2>&1", peerBin(), at(to, portEcho))),
					sb.start(t, "ping", "-q", "-i", "0.2", to))
			}
			eventually(t, 10*time.Second, func() (bool, string) {
				m := moves(before)
				return m[unix.IPPROTO_TCP] && m[unix.IPPROTO_UDP] && m[unix.IPPROTO_ICMP] && m[unix.IPPROTO_ICMPV6], fmt.Sprintf("of the protocols only %v move", m)
			})
			row.do(sb)
			start := time.Now()
			w.host.sluiceOK(t, "policy", "set", sb.name, narrow)
			took := time.Since(start)
			if took > 2*time.Second {
				t.Errorf("setting the policy took %v", took)
			}
			time.Sleep(2*time.Second - took) // the bound that is promised
			mark := watch.count()
			eventually(t, 10*time.Second, func() (bool, string) {
				d, r := dial(t, sb, "-timeout", "1s", at(far4, portWhoami))
				return d.Error == "", "what the new policy allows does not work\n" + r.String()
			})
			for _, f := range families {
				if d, r := dial(t, sb, "-timeout", "500ms", at(f.other, portWhoami)); d.Error == "" {
					t.Errorf("%s: what the new policy denies works\n%s", f.name, r)
				}
			}
			if m := moves(mark); len(m) > 0 {
				t.Errorf("of what the new policy denies the protocols %v still move", m)
			}
			for _, p := range busy {
				p.signal(syscall.SIGKILL)
				p.wait(t, 5*time.Second)
			}
			sb.close(t)
		})
	}
}
