package confine

import (
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/seccomp"
)

// Config says what the process keeps.
type Config struct {
	// KeepFDs are the descriptors that stay open. Of 0, 1 and 2, those not listed become /dev/null;
	// all others are closed.
	KeepFDs []int
}

// Enter confines the calling process, with all of its threads, for good. Call it once, before
// reading anything hostile and while nothing else opens descriptors. The process must be freshly
// cloned into user and mount namespaces of its own, and be uid 0 there. After an error the process
// is half confined and must end.
//
// Enter does not restrict the process's system calls: seal does. Call it once everything that is
// handed over later has been set up, and still before reading anything hostile.
//
// GOMAXPROCS no longer changes by itself: the runtime could no longer read the cgroup's limit.
func Enter(cfg Config) (seal func() error, err error) {
	// The time zone of log lines is read from a file at first use.
	_, _ = time.Now().Zone()
	// The runtime keeps the cgroup's files open to follow its limit. Once the number is set
	// explicitly it stops looking, and they can be closed.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))

	if err := closeOthers(cfg.KeepFDs); err != nil {
		return nil, fmt.Errorf("close descriptors: %w", err)
	}
	all, err := openThreads()
	if err != nil {
		return nil, err
	}
	defer all.close()
	for _, stage := range []struct {
		what string
		do   func() error
	}{
		{"empty the root", emptyRoot},
		{"set limits", limit},
		{"drop privileges", func() error { return dropPrivileges(all) }},
		{"restrict by Landlock", func() error { return landlock(all) }},
	} {
		if err := stage.do(); err != nil {
			return nil, fmt.Errorf("%s: %w", stage.what, err)
		}
	}
	p := program(os.Getpid())
	filter, _, err := p.Build()
	if err != nil {
		return nil, fmt.Errorf("build the filter of system calls: %w", err)
	}
	return func() error {
		if err := seccomp.SetFilter(filter); err != nil {
			return fmt.Errorf("filter system calls: %w", err)
		}
		return nil
	}, nil
}

// limit sets the limits that are per process. It leaves out RLIMIT_NPROC, which counts the user's
// threads and not ours; RLIMIT_FSIZE, since the flow log and captures are files; and RLIMIT_NOFILE,
// which is the monitor's to choose.
func limit() error {
	for _, r := range []int{unix.RLIMIT_CORE, unix.RLIMIT_MSGQUEUE} {
		if err := unix.Setrlimit(r, &unix.Rlimit{}); err != nil {
			return fmt.Errorf("resource limit %d: %w", r, err)
		}
	}
	// No core dump, no ptrace, and no access to /proc/PID/mem for processes of the same uid, such
	// as those in the sandbox.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make undumpable: %w", err)
	}
	return nil
}
