package sandbox

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/tun"
)

// What was set in a killed monitor is in force in its replacement, which has the earlier
// configuration.
func TestWhatWasSetOutlivesTheMonitor(t *testing.T) {
	p := newPod(t, tun.TAP)
	cfg := p.config(t)
	dir := t.TempDir()
	cfg.Keep = filepath.Join(dir, "set.json")
	pid, client := attach(t, cfg)
	p.exchange(t, "tcp", p.inside, p.outside, outside4, podAddr4.Addr().String())
	call(t, client, api.MethodPolicySet, api.PolicySetParams{Name: "closed", Source: closedPolicy}, nil)
	call(t, client, api.MethodSysctlSet, api.SysctlParams{Name: "nf_conntrack_udp_timeout", Value: "17"}, nil)
	// A refused change is not kept.
	ctx := context.Background()
	if err := client.Call(ctx, api.MethodPolicySet, api.PolicySetParams{Name: "bad", Source: "kind: Nonsense\n"}, nil); err == nil {
		t.Error("a policy that makes no sense was taken")
	}
	if err := client.Call(ctx, api.MethodSysctlSet, api.SysctlParams{Name: "nf_conntrack_udp_timeout", Value: "soon"}, nil); err == nil {
		t.Error("a tunable that makes no sense was taken")
	}
	again := func(pid int) (int, api.Client) {
		t.Helper()
		testutil.Must(t, syscall.Kill(pid, syscall.SIGKILL))
		isGone(t, pid)
		testutil.Must(t, StopAttachment(ctx, cfg.RuntimeDir, cfg.Name))
		return attach(t, cfg)
	}
	for range 2 { // the second has set nothing itself
		pid, client = again(pid)
		var now api.PolicyResult
		call(t, client, api.MethodPolicyShow, nil, &now)
		if now.Name != "closed" || now.Source != closedPolicy || now.Generation != 1 {
			t.Errorf("the policy is %+v", now)
		}
		var ctl api.SysctlResult
		call(t, client, api.MethodSysctl, api.SysctlParams{Name: "nf_conntrack_udp_timeout"}, &ctl)
		if ctl.Values["nf_conntrack_udp_timeout"] != "17" {
			t.Errorf("the tunable is %v", ctl.Values)
		}
		if _, err := p.inside.dial("tcp", net.JoinHostPort(outside4, "9")); err == nil {
			t.Error("the pod reaches what is denied")
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("beside what is kept there is %v", entries)
	}
	// What was set is never guessed: a damaged file does not open a pod.
	testutil.Must(t, os.Truncate(cfg.Keep, 10))
	testutil.Must(t, syscall.Kill(pid, syscall.SIGKILL))
	isGone(t, pid)
	_, _, err := LaunchAttachment(ctx, "", cfg)
	if err == nil || !strings.Contains(err.Error(), "remove "+cfg.Keep) {
		t.Errorf("with a damaged file: %v", err)
	}
}

// A change that cannot be kept is not made.
func TestAChangeThatCannotBeKeptIsRefused(t *testing.T) {
	p := newPod(t, tun.TAP)
	cfg := p.config(t)
	dir := t.TempDir()
	cfg.Keep = filepath.Join(dir, "set.json")
	_, client := attach(t, cfg)
	testutil.Must(t, unix.Mount("none", dir, "tmpfs", unix.MS_RDONLY, ""))
	t.Cleanup(func() { testutil.Must(t, unix.Unmount(dir, 0)) })
	err := client.Call(context.Background(), api.MethodPolicySet, api.PolicySetParams{Name: "closed", Source: closedPolicy}, nil)
	if err == nil || !strings.Contains(err.Error(), "keep the settings") {
		t.Errorf("it says %v", err)
	}
	var now api.PolicyResult
	call(t, client, api.MethodPolicyShow, nil, &now)
	if now.Name != policy.BuiltinName || now.Generation != 0 {
		t.Errorf("the policy is %+v", now)
	}
}
