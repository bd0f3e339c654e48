package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/registry"
	"sluice.dev/sluice/tun"
)

func call(t *testing.T, c api.Client, method string, params, result any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := c.Call(ctx, method, params, result); err != nil {
		t.Fatalf("%s: %v", method, err)
	}
}

// isGone waits until a process has been collected.
func isGone(t *testing.T, pid int) {
	t.Helper()
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		_, err := processStart(pid)
		return err != nil, fmt.Sprintf("process %d is still there", pid)
	})
}

// talk is a connection whose server echoes.
type talk struct {
	net.Conn
	server net.Conn
	said   int
	// patience is how long say waits; 0 means as long as it takes.
	patience time.Duration
}

func newTalk(t *testing.T, from, to namespace, at string) *talk {
	t.Helper()
	l := to.listen(net.JoinHostPort(at, "0"))
	t.Cleanup(func() { l.Close() })
	c, err := from.dial("tcp", l.Addr().String())
	testutil.Must(t, err)
	t.Cleanup(func() { c.Close() })
	s, err := l.Accept()
	testutil.Must(t, err)
	t.Cleanup(func() { s.Close() })
	go func() { _, _ = io.Copy(s, s) }()
	k := &talk{Conn: c, server: s}
	testutil.Must(t, k.say())
	return k
}

// say sends something and expects it back.
func (k *talk) say() error {
	k.said++
	word := fmt.Sprintf("word %d", k.said)
	_ = k.SetDeadline(time.Now().Add(cmp.Or(k.patience, 10*time.Second)))
	if _, err := io.WriteString(k, word); err != nil {
		return err
	}
	b := make([]byte, len(word))
	if _, err := io.ReadFull(k, b); err != nil {
		return err
	}
	if string(b) != word {
		return fmt.Errorf("heard %q, said %q", b, word)
	}
	return nil
}

// isReset expects the connection to end by a reset, soon.
func (k *talk) isReset(t *testing.T, what string) {
	t.Helper()
	_ = k.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := k.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%s: %v, want a reset", what, err)
	}
}

const closedPolicy = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: closed}
spec: {defaultAction: reject}
`

func TestAttachmentObeysItsPolicy(t *testing.T) {
	p := newPod(t, tun.TAP)
	cfg := p.config(t)
	_, client := attach(t, cfg)
	in := newTalk(t, p.outside, p.inside, podAddr4.Addr().String())
	out := newTalk(t, p.inside, p.outside, outside4)
	var was api.PolicyResult
	call(t, client, api.MethodPolicyShow, nil, &was)
	if was.Name != policy.BuiltinName || !strings.Contains(was.Source, "link-local") {
		t.Errorf("the policy of a pod without one is %s:\n%s", was.Name, was.Source)
	}
	call(t, client, api.MethodPolicySet, api.PolicySetParams{Name: "closed", Source: closedPolicy}, nil)
	in.isReset(t, "from outside")
	out.isReset(t, "to outside")
	for _, at := range []string{podAddr4.Addr().String(), podAddr6.Addr().String()} {
		if _, err := p.outside.dial("tcp", net.JoinHostPort(at, "80")); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a port that is rejected: %v", err)
		}
	}
	call(t, client, api.MethodPolicySet, api.PolicySetParams{Name: "open", Source: was.Source}, nil)
	p.exchange(t, "tcp", p.outside, p.inside, podAddr4.Addr().String(), outside4)
	err := client.Call(context.Background(), api.MethodPortsAdd, api.PortsParams{Spec: "8080:80"}, nil)
	if err == nil || !strings.Contains(err.Error(), "need no publishing") {
		t.Errorf("publishing a pod's port: %v", err)
	}
}

func TestAttachmentOutlivesItsWorker(t *testing.T) {
	p := newPod(t, tun.TAP)
	cfg := p.config(t)
	pid, client := attach(t, cfg)
	in := newTalk(t, p.outside, p.inside, podAddr4.Addr().String())
	serving := newTalk(t, p.outside, p.inside, podAddr6.Addr().String())
	var before, after api.Info
	call(t, client, api.MethodInfo, nil, &before)
	testutil.Must(t, syscall.Kill(before.WorkerPID, syscall.SIGKILL))
	// The pod speaks first: its segment may be the first that the new worker sees.
	go func() { _, _ = serving.server.Write([]byte("first")) }()
	_ = serving.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 5)
	if _, err := io.ReadFull(serving, b); err != nil || string(b) != "first" {
		t.Errorf("what the pod said while there was no worker: %q, %v", b, err)
	}
	testutil.Must(t, in.say())
	testutil.Must(t, serving.say())
	// A new worker serves before the monitor has recorded it.
	testutil.Eventually(t, "a new worker serves", func() bool {
		call(t, client, api.MethodInfo, nil, &after)
		return after.State == api.StateRunning
	})
	if after.PID != pid || after.WorkerPID == before.WorkerPID || after.Restarts != 1 || after.State != api.StateRunning {
		t.Errorf("the monitor was %d; now it is %+v", pid, after)
	}
	p.exchange(t, "tcp", p.inside, p.outside, outside4, podAddr4.Addr().String())
}

// installed copies the test's own binary to a place where a plugin could be.
func installed(t *testing.T, mode os.FileMode) string {
	t.Helper()
	dir := testutil.ShortDir(t)
	testutil.Must(t, os.Chmod(dir, 0o755))
	own, err := os.ReadFile("/proc/self/exe")
	testutil.Must(t, err)
	path := filepath.Join(dir, "sluice-cni")
	testutil.Must(t, os.WriteFile(path, own, mode))
	return path
}

func TestAttachmentIsUpgraded(t *testing.T) {
	p := newPod(t, tun.TAP)
	cfg := p.config(t)
	pid, client := attach(t, cfg)
	in := newTalk(t, p.outside, p.inside, podAddr4.Addr().String())
	serving := newTalk(t, p.outside, p.inside, podAddr6.Addr().String())
	out := newTalk(t, p.inside, p.outside, outside4)
	var was api.PolicyResult
	call(t, client, api.MethodPolicyShow, nil, &was)
	call(t, client, api.MethodPolicySet, api.PolicySetParams{Name: "mine", Source: was.Source}, nil)
	call(t, client, api.MethodSysctlSet, api.SysctlParams{Name: "nf_conntrack_udp_timeout", Value: "17"}, nil)

	path := installed(t, 0o755)
	var info api.Info
	call(t, client, api.MethodUpgrade, api.UpgradeParams{Binary: path}, &info)
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || exe != path || info.PID != pid || info.Policy != "mine" || info.State != api.StateRunning {
		t.Errorf("%s (%v) says %+v", exe, err, info)
	}
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", info.WorkerPID)); err != nil || exe != path {
		t.Errorf("the worker is %s, %v", exe, err)
	}
	out.isReset(t, "a connection of the pod's")
	_, _ = serving.server.Write([]byte("first"))
	b := make([]byte, 5)
	_ = serving.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(serving, b); err != nil {
		t.Errorf("what the pod says first after the upgrade: %v", err)
	}
	testutil.Must(t, in.say())
	testutil.Must(t, serving.say())
	p.exchange(t, "tcp", p.inside, p.outside, outside4, podAddr4.Addr().String())
	var now api.PolicyResult
	call(t, client, api.MethodPolicyShow, nil, &now)
	if now.Generation != 1 || now.Name != "mine" || now.Source != was.Source {
		t.Errorf("the policy is %+v", now)
	}
	var ctl api.SysctlResult
	call(t, client, api.MethodSysctl, api.SysctlParams{Name: "nf_conntrack_udp_timeout"}, &ctl)
	if ctl.Values["nf_conntrack_udp_timeout"] != "17" {
		t.Errorf("the tunable is %v", ctl.Values)
	}
	var logs api.LogsResult
	call(t, client, api.MethodLogs, nil, &logs)
	if text := fmt.Sprint(logs.Lines); !strings.Contains(text, "policy mine is in force") || !strings.Contains(text, "has taken over") {
		t.Errorf("the log is %s", text)
	}
	// The default is the binary that is now at its own path.
	testutil.Must(t, os.Rename(installed(t, 0o755), path))
	call(t, client, api.MethodUpgrade, nil, &info)
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || exe != path || info.PID != pid {
		t.Errorf("%s (%v) says %+v", exe, err, info)
	}
	testutil.Must(t, in.say())
}

func TestAnUpgradeThatFailsChangesNothing(t *testing.T) {
	p := newPod(t, tun.TAP)
	cfg := p.config(t)
	pid, client := attach(t, cfg)
	in := newTalk(t, p.outside, p.inside, podAddr4.Addr().String())
	out := newTalk(t, p.inside, p.outside, outside4)
	dir := testutil.ShortDir(t)
	script := func(name, text string) string {
		path := filepath.Join(dir, name)
		testutil.Must(t, os.WriteFile(path, []byte(text), 0o755))
		return path
	}
	broken := installed(t, 0o700) // its workers, which run as nobody, cannot execute it
	own, err := os.Readlink("/proc/self/exe")
	testutil.Must(t, err)
	for _, test := range []struct{ name, binary, want string }{
		{"there is none", filepath.Join(dir, "none"), "there is no binary"},
		{"a relative path", "sluice", "want an absolute path"},
		{"not a program of ours", "/bin/true", "cannot take over"},
		{"only root may read it", broken, "chmod 755"},
		{"a directory", dir, "no regular file"},
		{"one that cannot be executed after all", script("vanishing", "#!/bin/sh\n[ \"$2\" = --version ] && echo "+takeoverVersion+" && rm $0\n"), "execute"},
		{"one that crashes before it serves", script("crashing", "#!/bin/sh\n[ \"$2\" = --version ] && echo "+takeoverVersion+" && exit\nkill -9 $$\n"), "it ended without a word: the old binary serves again"},
		{"one whose worker does not start", script("failing", "#!/bin/sh\n[ \"$2\" = --version ] && echo "+takeoverVersion+" && exit\nexec "+broken+" \"$@\"\n"), "the old binary serves again"},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			err := client.Call(ctx, api.MethodUpgrade, api.UpgradeParams{Binary: test.binary}, nil)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("it says %v, want %q", err, test.want)
			}
			testutil.Must(t, AttachmentAlive(ctx, cfg.RuntimeDir, cfg.Name))
			testutil.Must(t, in.say())
			var info api.Info
			call(t, client, api.MethodInfo, nil, &info)
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", info.PID)); err != nil || exe != own {
				t.Errorf("the monitor is %s, %v", exe, err)
			}
			if back := strings.Contains(test.want, "serves again"); back == (info.PID == pid) {
				t.Errorf("the monitor was %d and is %d", pid, info.PID)
			}
			pid = info.PID
			if test.want != "execute" && !strings.Contains(test.want, "serves again") {
				testutil.Must(t, out.say())
			}
		})
	}
}

func TestALaunchThatFailsSaysWhyAndLeavesNothing(t *testing.T) {
	p := newPod(t, tun.TAP)
	for _, test := range []struct {
		name   string
		change func(*AttachmentConfig)
		want   string
	}{
		{"a bad policy", func(c *AttachmentConfig) { c.Policy = unparsed(t, "kind: Nonsense\n") }, "Nonsense"},
		{"no policy, and not said that there is none", func(c *AttachmentConfig) { c.Policy = policy.Source{} }, policy.ErrNoSource.Error()},
		{"no uplink", func(c *AttachmentConfig) { c.UplinkNetNS = "/run/netns/none" }, "uplink network namespace"},
		{"a bad tunable", func(c *AttachmentConfig) { c.Sysctls = map[string]string{"nonsense": "1"} }, "nonsense"},
		{"devices the wrong way round", func(c *AttachmentConfig) { c.Device[0], c.In0 = c.In0, c.Device[0] }, "queue"},
		{"no address", func(c *AttachmentConfig) { c.Addrs = nil }, "address"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := p.config(t)
			test.change(&cfg)
			_, _, err := LaunchAttachment(context.Background(), "", cfg)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("it says %v, want %q", err, test.want)
			}
			if entries, _ := os.ReadDir(cfg.RuntimeDir); len(entries) > 0 {
				t.Errorf("it left %v", entries)
			}
			testutil.Must(t, StopAttachment(context.Background(), cfg.RuntimeDir, cfg.Name))
			if err := AttachmentAlive(context.Background(), cfg.RuntimeDir, cfg.Name); !errors.Is(err, registry.ErrNoSandbox) {
				t.Errorf("alive: %v", err)
			}
		})
	}
}

func TestAKilledMonitorTakesItsWorkerAlong(t *testing.T) {
	p := newPod(t, tun.TAP)
	cfg := p.config(t)
	pid, client := attach(t, cfg)
	var info api.Info
	call(t, client, api.MethodInfo, nil, &info)
	// A process that cannot answer is not gone.
	testutil.Must(t, syscall.Kill(pid, syscall.SIGSTOP))
	if gone, err := AttachmentGone(cfg.RuntimeDir, cfg.Name); gone || err != nil {
		t.Errorf("a stopped monitor: gone %v, %v", gone, err)
	}
	testutil.Must(t, syscall.Kill(pid, syscall.SIGKILL))
	isGone(t, pid)
	isGone(t, info.WorkerPID)
	if gone, err := AttachmentGone(cfg.RuntimeDir, cfg.Name); !gone || err != nil {
		t.Errorf("a killed monitor: gone %v, %v", gone, err)
	}
	if err := AttachmentAlive(context.Background(), cfg.RuntimeDir, cfg.Name); !errors.Is(err, registry.ErrNoSandbox) {
		t.Errorf("alive: %v", err)
	}
	if _, err := p.outside.dial("tcp", netip.AddrPortFrom(podAddr4.Addr(), 80).String()); err == nil || errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a pod without its monitor is reached: %v", err)
	}
}

// A process that comes after a killed launcher must see either its lock or the monitor.
func TestAMonitorHoldsItsLaunchersLockUntilItCanBeFound(t *testing.T) {
	p := newPod(t, tun.TAP)
	path := filepath.Join(t.TempDir(), "lock")
	hold := func() (*os.File, error) {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		testutil.Must(t, err)
		t.Cleanup(func() { _ = f.Close() })
		return f, unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}

	slow := filepath.Join(t.TempDir(), "slow")
	testutil.Must(t, os.WriteFile(slow, []byte("#!/bin/sh\nexec sleep 60\n"), 0o700))
	cfg := p.config(t)
	var err error
	cfg.Lock, err = hold()
	testutil.Must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	launched := make(chan error)
	go func() { // ends with cancel, and is waited for
		_, _, err := LaunchAttachment(ctx, slow, cfg)
		launched <- err
	}()
	time.Sleep(100 * time.Millisecond)
	testutil.Must(t, cfg.Lock.Close())
	if _, err := hold(); err != unix.EWOULDBLOCK {
		t.Errorf("beside a monitor that has only begun: %v, want %v", err, unix.EWOULDBLOCK)
	}
	cancel()
	if err := <-launched; err == nil {
		t.Error("a monitor that does nothing is said to serve")
	}

	cfg = p.config(t)
	cfg.Lock, err = hold()
	testutil.Must(t, err)
	attach(t, cfg)
	testutil.Must(t, cfg.Lock.Close())
	if _, err := hold(); err != nil {
		t.Errorf("beside a monitor that serves: %v", err)
	}
}
