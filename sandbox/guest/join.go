package guest

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/fork"
)

// joinStage starts the stage in the given namespaces (the user namespace first), with files as
// channelFD and planFD. The stage has no part of the caller's terminal and session, because root of
// the target's user namespace may trace it.
func joinStage(spaces []fork.Namespace, files []*os.File) (*stageProcess, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("starting the guest stage: %w", err)
	}
	defer null.Close()
	fd := int(null.Fd())
	plan := fork.Plan{
		Args: []string{"sluice", StageCommand}, Files: []int{fd, fd, fd},
		Join: spaces, Ambient: stageCaps, DeathSignal: unix.SIGKILL, Session: true,
	}
	for _, f := range files {
		plan.Files = append(plan.Files, int(f.Fd()))
	}
	p := newStageProcess()
	close(p.settled)
	up := make(chan error)
	// Keeps the forking thread, which the child's parent-death signal is tied to; ends with the
	// child.
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		pid, err := fork.Start(plan)
		p.pid = pid
		up <- explainJoin(err)
		if err != nil {
			return
		}
		fork.Await(pid)
		p.collect(func() string { return describe(fork.Reap(pid)) })
	}()
	if err := <-up; err != nil {
		return nil, err
	}
	return p, nil
}

// explainJoin explains an error of starting the stage, and says what to do about it.
func explainJoin(err error) error {
	var e *fork.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &e) && e.Errno == unix.EPERM && (e.Step == fork.StepUser || e.Step == fork.StepNet):
		return fmt.Errorf("%s: this user has no rights over it: attach as the user who made it, or as root (%w)", e.Step, e.Errno)
	}
	return fmt.Errorf("starting the guest stage: %w", err)
}
