package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// Handles a monitor that was stopped.
//
// Without a PID namespace of its own a sandbox's command may send signals to every process of its
// user, the monitor included. Killing the monitor gains it nothing, since the worker dies too; but
// a stopped monitor accepts no new policy while the worker enforces the old one. So the client that
// sets a policy checks whether the monitor is stopped while it owes the answer, and continues it. A
// monitor that was seen stopped and has not answered within insistPatience is killed: the sandbox
// then has no network, which is less than any policy allows. (No process of a pod can signal its
// monitor, unless it was given the host's PID namespace.)

const (
	// insistPatience is less than the two seconds within which a policy is in force.
	insistPatience = 1200 * time.Millisecond
	// insistEvery is how often the monitor is checked.
	insistEvery = 50 * time.Millisecond
	// setTimeout bounds the wait for the answer of a running monitor.
	setTimeout = 10 * time.Second
)

// errMonitorStopped is the error after a stopped monitor was killed.
var errMonitorStopped = errors.New("the sandbox's monitor was stopped and could not be made to go on: it was killed, and the sandbox has no network any more")

// SetPolicy puts a policy in force in the sandbox behind client's control socket, even if the
// monitor is stopped or kept from running.
func SetPolicy(ctx context.Context, client api.Client, p api.PolicySetParams) error {
	ctx, cancel := context.WithTimeout(ctx, setTimeout)
	defer cancel()
	answer := make(chan error, 1)
	go func() { answer <- client.Call(ctx, api.MethodPolicySet, p, nil) }() // ends with the answer, or ctx
	deadline := time.Now().Add(insistPatience)
	look := time.NewTicker(insistEvery)
	defer look.Stop()
	stopped := false
	for {
		select {
		case err := <-answer:
			return err
		case <-look.C:
		}
		s, ok := monitorState(client)
		if ok && isStopped(s.PID) {
			stopped = true
			_ = signalMonitor(s, unix.SIGCONT)
		}
		if stopped && time.Now().After(deadline) {
			if err := signalMonitor(s, unix.SIGKILL); err != nil {
				return fmt.Errorf("%w: %w", errMonitorStopped, err)
			}
			<-answer // when the monitor has ended
			return setForTheNext(s.Keep, p)
		}
	}
}

// setForTheNext sets the policy of an attachment whose monitor is gone: the monitor that repairs
// the attachment starts with it and with nothing older. Other sandboxes have no next monitor.
func setForTheNext(keep string, p api.PolicySetParams) error {
	if keep == "" {
		return errMonitorStopped
	}
	d, err := policy.NewDocument(p.Name, []byte(p.Source))
	if err == nil {
		err = keepPolicy(keep, d)
	}
	if err != nil {
		return fmt.Errorf("%w; a repair would bring the policy before this one back: %w", errMonitorStopped, err)
	}
	return fmt.Errorf("%w until it is repaired, which puts this policy in force", errMonitorStopped)
}

// monitorState reads the state file that lies beside a control socket.
func monitorState(client api.Client) (s registry.State, ok bool) {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(client.Path), registry.StateFile))
	return s, err == nil && json.Unmarshal(b, &s) == nil && s.PID > 0
}

// isStopped reports whether a process was stopped by a signal or by a tracer.
func isStopped(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	// As in processStart: the state follows the last parenthesis.
	rest := bytes.TrimLeft(b[bytes.LastIndexByte(b, ')')+1:], " ")
	return len(rest) > 0 && (rest[0] == 'T' || rest[0] == 't')
}
