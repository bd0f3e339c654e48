package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// These tests use real namespaces, a real device and a real worker: the test process is the
// monitor.

// inside is the command of the sandboxes below. It waits for its standard input to end, so that the
// test decides when.
var inside = []string{"sh", "-c", "cat >/dev/null; exit 7"}

type running struct {
	client api.Client
	info   api.Info
	end    func() (int, error) // ends the command and returns Run's results
	stderr *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start runs a sandbox until the test ends.
func start(t *testing.T, cfg Config) *running {
	t.Helper()
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("no device to be had: %v", err)
	}
	dir := testutil.RuntimeDir(t)
	r, w, err := os.Pipe()
	testutil.Must(t, err)
	defer r.Close()
	if cfg.Guest.Command == nil {
		cfg.Guest.Command = inside
	}
	cfg.Quiet = true
	if cfg.Policy.IsZero() {
		cfg.Policy = policy.NotGiven(policy.Builtin{})
	}
	run := &running{stderr: new(lockedBuffer)}
	cfg.Guest.Stdin, cfg.Stderr = r, run.stderr
	ready := make(chan api.Info, 1)
	cfg.Ready = func(i api.Info) error { ready <- i; return nil }
	type result struct {
		exit int
		err  error
	}
	over := make(chan result, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		exit, err := Run(ctx, cfg)
		over <- result{exit, err}
	}()
	var once sync.Once
	var got result
	run.end = func() (int, error) {
		once.Do(func() {
			w.Close()
			select {
			case got = <-over:
			case <-time.After(20 * time.Second):
				t.Error("the sandbox does not end")
				cancel()
				got = <-over
			}
			cancel()
		})
		return got.exit, got.err
	}
	t.Cleanup(func() { _, _ = run.end() })
	select {
	case run.info = <-ready:
	case got = <-over:
		once.Do(func() { w.Close(); cancel() })
		t.Fatalf("the sandbox does not start: %v", got.err)
	}
	run.client.Path = filepath.Join(dir, "sluice", run.info.Name, registry.SocketFile)
	return run
}

func (r *running) call(t *testing.T, method string, params, result any) {
	t.Helper()
	if err := r.client.Call(t.Context(), method, params, result); err != nil {
		t.Fatalf("%s: %v", method, err)
	}
}

func TestRunLeavesNothingBehind(t *testing.T) {
	// Start one first, for the runtime's own descriptors and threads.
	first := start(t, Config{})
	if exit, err := first.end(); exit != 7 || err != nil {
		t.Fatalf("exit %d, %v; want 7", exit, err)
	}
	before := testutil.Holds(t)

	r := start(t, Config{Ports: []api.Port{{Proto: "tcp", GuestPort: 80}}, PublishAuto: true})
	if exit, err := r.end(); exit != 7 || err != nil {
		t.Fatalf("exit %d, %v; want 7", exit, err)
	}
	if s := r.stderr.String(); s != "" {
		t.Errorf("it was not quiet: %q", s)
	}
	if _, err := os.Stat(filepath.Dir(r.client.Path)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the state directory is still there: %v", err)
	}
	for _, pid := range []int{r.info.WorkerPID, r.info.GuestPID} {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is still there: %v", pid, err)
		}
	}
	// The netlink library's goroutines end a moment after they are told to.
	before.CheckReleased(t)
}

func TestWorkerIsReplacedWithAllItHad(t *testing.T) {
	r := start(t, Config{Ports: []api.Port{{Proto: "tcp", GuestPort: 80}}})
	closed := "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: closed}\nspec: {defaultAction: drop, limits: {flows: 99}}\n"
	r.call(t, api.MethodPolicySet, api.PolicySetParams{Name: "closed.yaml", Source: closed}, nil)
	r.call(t, api.MethodSysctlSet, api.SysctlParams{Name: "nf_conntrack_udp_timeout", Value: "5"}, nil)
	var ports api.PortsResult
	r.call(t, api.MethodPortsAdd, api.PortsParams{Spec: "127.0.0.1:0:81"}, &ports)

	testutil.Must(t, syscall.Kill(r.info.WorkerPID, syscall.SIGKILL))
	var info api.Info
	testutil.Eventually(t, "a new worker", func() bool {
		r.call(t, api.MethodInfo, nil, &info)
		return info.Restarts > 0 && info.WorkerPID != 0 && info.Flows >= 0
	})
	if info.WorkerPID == r.info.WorkerPID || info.Restarts != 1 || !strings.Contains(info.LastFailure, "SIGKILL") || info.Policy != "closed.yaml" {
		t.Errorf("info %+v", info)
	}
	var sysctls api.SysctlResult
	r.call(t, api.MethodSysctl, nil, &sysctls)
	if sysctls.Values["nf_conntrack_udp_timeout"] != "5" || sysctls.Values["nf_conntrack_max"] != "99" {
		t.Errorf("tunables after the restart: %v", sysctls.Values)
	}
	// The ports are served: a client is accepted, and then judged by the policy.
	at := fmt.Sprintf("127.0.0.1:%d", ports.Ports[0].HostPort)
	c, err := net.Dial("tcp", at)
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) {
		t.Errorf("a client that the policy denies got %v", err)
	}
	var flows api.FlowsResult
	testutil.Eventually(t, "a flow has ended", func() bool {
		r.call(t, api.MethodFlows, api.FlowsParams{Ended: true}, &flows)
		return len(flows.Ended) > 0
	})
	if len(flows.Ended) != 1 || flows.Ended[0].TrafficDirection != api.Ingress || flows.Ended[0].Verdict == api.VerdictForwarded {
		t.Errorf("records %+v, want one refusal", flows.Ended)
	}
	var logs api.LogsResult
	r.call(t, api.MethodLogs, nil, &logs)
	if text := fmt.Sprint(logs.Lines); !strings.Contains(text, "the worker ended: killed by SIGKILL") {
		t.Errorf("the log does not tell: %s", text)
	}
	if s := r.stderr.String(); strings.Count(s, "\n") != 1 || !strings.HasPrefix(s, "sluice: the worker ended") {
		t.Errorf("standard error %q, want the one line", s)
	}
}

func TestPolicyWithErrorsChangesNothing(t *testing.T) {
	r := start(t, Config{})
	var before, after api.PolicyResult
	r.call(t, api.MethodPolicyShow, nil, &before)
	err := r.client.Call(t.Context(), api.MethodPolicySet, api.PolicySetParams{Name: "p.yaml", Source: "kind: Pod\n"}, nil)
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeInvalid || !strings.Contains(e.Message, "p.yaml:1:") || !strings.Contains(e.Message, "still default") {
		t.Errorf("got %v", err)
	}
	if r.call(t, api.MethodPolicyShow, nil, &after); before != after || after.Generation != 0 {
		t.Errorf("the policy changed: %+v", after)
	}
}

func TestControlMethodsOfTheWorker(t *testing.T) {
	r := start(t, Config{})
	var stats api.StatsResult
	r.call(t, api.MethodStats, nil, &stats)
	for _, part := range []string{"link", "table", "dns", "names", "forwarder", "log"} {
		if !json.Valid(stats.Stats[part]) {
			t.Errorf("stats have no %s: %v", part, stats.Stats)
		}
	}
	var flows api.FlowsResult
	r.call(t, api.MethodFlows, nil, &flows)
	for _, row := range []struct {
		method string
		params any
		code   api.Code
	}{
		{api.MethodSysctl, api.SysctlParams{Name: "nf_nothing"}, api.CodeNotFound},
		{api.MethodSysctlSet, api.SysctlParams{Name: "nf_conntrack_max", Value: "many"}, api.CodeInvalid},
		{api.MethodFlows, map[string]int{"x": 1}, api.CodeBadRequest},
		{api.MethodCapture, api.CaptureParams{SnapLen: -1}, api.CodeBadRequest},
		{api.MethodPortsRm, api.PortsParams{Spec: "1:1"}, api.CodeNotFound},
		{api.MethodPortsAdd, api.PortsParams{Spec: "nonsense"}, api.CodeInvalid},
		{"reboot", nil, api.CodeBadRequest},
	} {
		var e *api.Error
		if err := r.client.Call(t.Context(), row.method, row.params, nil); !errors.As(err, &e) || e.Code != row.code {
			t.Errorf("%s %v: %v, want code %s", row.method, row.params, err, row.code)
		}
	}
	s, err := r.client.Open(t.Context(), api.MethodCapture, api.CaptureParams{}, nil)
	testutil.Must(t, err)
	testutil.Must(t, s.CloseWrite())
	b, err := io.ReadAll(s)
	if err != nil || len(b) < 28 || !bytes.Equal(b[:4], []byte{0x0a, 0x0d, 0x0d, 0x0a}) {
		t.Errorf("a capture of %d bytes, %v; want a pcapng file", len(b), err)
	}
	testutil.Must(t, s.Close())
	watch, err := r.client.Open(t.Context(), api.MethodFlowsWatch, nil, nil)
	testutil.Must(t, err)
	testutil.Must(t, watch.Close())
}

func TestRunFailsWithCauseAndStatus(t *testing.T) {
	dir := testutil.RuntimeDir(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	testutil.Must(t, err)
	defer taken.Close()
	at := taken.Addr().(*net.TCPAddr).Port
	fds := testutil.Descriptors(t, os.Getpid())
	for _, row := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"a port that is taken", Config{Ports: []api.Port{port(t, fmt.Sprintf("127.0.0.1:%d:80", at))}}, "the port is taken by"},
		{"a policy with errors", Config{Policy: unparsed(t, "kind: Pod\n")}, "p.yaml:1:"},
		{"no policy, and not said that there is none", Config{}, policy.ErrNoSource.Error()},
		{"a name that cannot be", Config{Name: "a/b"}, `"a/b"`},
		{"a flow log that cannot be", Config{FlowLog: "/nonexistent/log"}, "--flow-log: open /nonexistent/log"},
		{"no address at all", Config{NoIPv4: true, NoIPv6: true}, "IPv4 or IPv6"},
	} {
		row.cfg.Guest.Command = inside
		if row.cfg.Policy.IsZero() && row.want != policy.ErrNoSource.Error() {
			row.cfg.Policy = policy.NotGiven(policy.Builtin{})
		}
		exit, err := Run(t.Context(), row.cfg)
		if exit != guest.StatusOurs || err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: exit %d, %v; want %d and %q", row.name, exit, err, guest.StatusOurs, row.want)
		}
	}
	if left, _ := filepath.Glob(dir + "/sluice/*"); len(left) != 0 || testutil.Descriptors(t, os.Getpid()) != fds {
		t.Errorf("left behind: %v; %d descriptors before, %d after", left, fds, testutil.Descriptors(t, os.Getpid()))
	}
}
