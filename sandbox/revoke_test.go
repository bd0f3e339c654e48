package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/tun"
)

// inForce is how soon a policy has to be in force.
const inForce = 2 * time.Second

var closedParams = api.PolicySetParams{Name: "closed", Source: closedPolicy}

// sent sends a signal; nothing has to be stopped afterwards. When it returns, a process that should
// stop has stopped: until one of its threads has taken the signal, the others go on.
func sent(t *testing.T, sig syscall.Signal, pids ...int) (stop func()) {
	t.Helper()
	for _, pid := range pids {
		testutil.Must(t, syscall.Kill(pid, sig))
		if sig == syscall.SIGSTOP {
			testutil.Eventually(t, fmt.Sprintf("process %d stops", pid), func() bool { return isStopped(pid) })
		}
	}
	return func() {}
}

// TestAPolicyIsInForceWhateverBecomesOfTheProcesses sets a policy that denies everything, while the
// processes that have to apply it are stopped or killed.
func TestAPolicyIsInForceWhateverBecomesOfTheProcesses(t *testing.T) {
	for _, row := range []struct {
		name string
		do   func(t *testing.T, monitor, worker int) (stop func())
		dies bool // the monitor dies
	}{
		{"the worker is stopped", func(t *testing.T, _, worker int) func() { return sent(t, syscall.SIGSTOP, worker) }, false},
		{"the worker is killed", func(t *testing.T, _, worker int) func() { return sent(t, syscall.SIGKILL, worker) }, false},
		{"the monitor is stopped", func(t *testing.T, monitor, _ int) func() { return sent(t, syscall.SIGSTOP, monitor) }, false},
		{"both are stopped", func(t *testing.T, monitor, worker int) func() { return sent(t, syscall.SIGSTOP, worker, monitor) }, false},
		{"the monitor is stopped again and again", func(t *testing.T, monitor, _ int) func() {
			testutil.Must(t, syscall.Kill(monitor, syscall.SIGSTOP))
			var wg sync.WaitGroup
			over := make(chan struct{})
			wg.Go(func() { // ends with the row
				for {
					select {
					case <-over:
						return
					default:
						_ = syscall.Kill(monitor, syscall.SIGSTOP)
					}
				}
			})
			return func() {
				close(over)
				wg.Wait()
				_ = syscall.Kill(monitor, syscall.SIGCONT) // it may be gone
			}
		}, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := newPod(t, tun.TAP)
			cfg := p.config(t)
			cfg.Keep = filepath.Join(t.TempDir(), "set.json")
			monitor, client := attach(t, cfg)
			talks := []*talk{
				newTalk(t, p.inside, p.outside, outside4), newTalk(t, p.inside, p.outside, outside6),
				newTalk(t, p.outside, p.inside, podAddr4.Addr().String()), newTalk(t, p.outside, p.inside, podAddr6.Addr().String()),
			}
			var info api.Info
			call(t, client, api.MethodInfo, nil, &info)
			stop := row.do(t, monitor, info.WorkerPID)
			start := time.Now()
			err := SetPolicy(t.Context(), client, closedParams)
			if took := time.Since(start); took > inForce {
				t.Errorf("it took %v", took)
			}
			stop()
			if err != nil && !(row.dies && errors.Is(err, errMonitorStopped)) {
				t.Fatalf("the policy was not set: %v", err)
			}
			for i, k := range talks {
				k.patience = 300 * time.Millisecond
				if k.say() == nil {
					t.Errorf("connection %d of those that the policy denies still talks", i)
				}
			}
			if err != nil {
				isGone(t, info.WorkerPID)
				// The next monitor, which repairs the pod, starts with the new policy.
				testutil.Must(t, StopAttachment(context.Background(), cfg.RuntimeDir, cfg.Name))
				_, client = attach(t, cfg)
				call(t, client, api.MethodInfo, nil, &info)
			}
			// The next worker brings back nothing older either.
			testutil.Eventually(t, "a worker serves", func() bool {
				call(t, client, api.MethodInfo, nil, &info)
				return info.State == api.StateRunning && info.Flows >= 0
			})
			for _, to := range []string{outside4, outside6} {
				if _, err := p.inside.dial("tcp", net.JoinHostPort(to, "9")); err == nil {
					t.Errorf("the pod reaches %s", to)
				}
			}
			var now api.PolicyResult
			if call(t, client, api.MethodPolicyShow, nil, &now); now.Name != "closed" || now.Generation != 1 {
				t.Errorf("the policy is %+v", now)
			}
		})
	}
}

// TestAPolicyIsKeptBeforeTheWorkerHearsOfIt kills the monitor while it waits for the worker.
func TestAPolicyIsKeptBeforeTheWorkerHearsOfIt(t *testing.T) {
	p := newPod(t, tun.TAP)
	cfg := p.config(t)
	cfg.Keep = filepath.Join(t.TempDir(), "set.json")
	monitor, client := attach(t, cfg)
	var info api.Info
	call(t, client, api.MethodInfo, nil, &info)
	testutil.Must(t, syscall.Kill(info.WorkerPID, syscall.SIGSTOP))
	set := make(chan error, 1)
	go func() { set <- client.Call(t.Context(), api.MethodPolicySet, closedParams, nil) }()
	testutil.Within(t, 3*time.Second, func() (bool, string) {
		b, err := os.ReadFile(cfg.Keep)
		return err == nil && strings.Contains(string(b), "closed"), "the policy is not kept while the worker is asked"
	})
	testutil.Must(t, syscall.Kill(monitor, syscall.SIGKILL))
	<-set
	isGone(t, monitor)
	testutil.Must(t, StopAttachment(context.Background(), cfg.RuntimeDir, cfg.Name))
	_, client = attach(t, cfg)
	var now api.PolicyResult
	if call(t, client, api.MethodPolicyShow, nil, &now); now.Name != "closed" {
		t.Errorf("after the crash the policy is %s", now.Name)
	}
}

func TestAWorkerThatHangsIsFoundAndKilled(t *testing.T) {
	t.Run("by the next question whether its packets move", func(t *testing.T) {
		l, _ := startFake(t, "serves")
		<-l.Ready
		over := make(chan struct{})
		go func() { defer close(over); l.Watch(10*time.Millisecond, 200*time.Millisecond) }()
		testutil.Must(t, syscall.Kill(l.P.Cmd.Pid, syscall.SIGSTOP))
		<-l.Ended()
		<-over
		if why := l.Reason(); !strings.Contains(why, "did not confirm ping") {
			t.Errorf("it says %q", why)
		}
	})
	t.Run("by new rules that it does not confirm", func(t *testing.T) {
		l, _ := startFake(t, "serves")
		<-l.Ready
		if err := l.RequestWithin(50*time.Millisecond, channel.MsgRules, nil); !errors.Is(err, process.ErrWorkerGone) {
			t.Errorf("the request ended with %v", err)
		}
		<-l.Ended()
	})
	t.Run("by messages that it does not take", func(t *testing.T) {
		l, _ := startFake(t, "serves")
		<-l.Ready
		testutil.Must(t, syscall.Kill(l.P.Cmd.Pid, syscall.SIGSTOP))
		start := time.Now()
		for {
			if err := l.Post(channel.MsgUpstreams, strings.Repeat("x", 10<<10)); err != nil {
				if !errors.Is(err, process.ErrWorkerGone) {
					t.Errorf("the message was not sent: %v", err)
				}
				break
			}
		}
		if took := time.Since(start); took > 2*channel.SendTimeout+process.KillPatience {
			t.Errorf("it took %v", took)
		}
		<-l.Ended()
	})
}

// TestASendToWhoDoesNotReadFails has the other end of a channel stand still, then go on.
func TestASendToWhoDoesNotReadFails(t *testing.T) {
	ends, err := channel.Socketpair(syscall.SOCK_SEQPACKET)
	testutil.Must(t, err)
	a, b := channel.New(ends[0], false), channel.New(ends[1], false)
	defer a.Close()
	defer b.Close()
	sent := 0
	for err == nil {
		if err = a.Send(channel.MsgGrant, 0, strings.Repeat("x", 1<<10)); err == nil {
			sent++
		}
	}
	if !errors.Is(err, channel.ErrStuck) {
		t.Fatalf("the send failed by %v", err)
	}
	start := time.Now()
	for range 100 {
		if err := a.Send(channel.MsgGrant, 0, strings.Repeat("x", 1<<10)); !errors.Is(err, channel.ErrStuck) {
			t.Fatalf("without room a send ends with %v", err)
		}
	}
	if took := time.Since(start); took > channel.SendTimeout {
		t.Errorf("100 further sends took %v", took)
	}
	for range sent {
		_, _, err := b.Receive()
		testutil.Must(t, err)
	}
	testutil.Must(t, a.Send(channel.MsgGrant, 0, "again"))
	if m, _, err := b.Receive(); err != nil || string(m.Body) != `"again"` {
		t.Errorf("after that came %s, %v", m.Body, err)
	}
}
