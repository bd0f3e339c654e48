package guest

import (
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/fork"
)

// Starting CMD. One goroutine keeps one thread for it. The thread drops the capabilities that the
// stage holds (ambient and inheritable), forks, and stays until CMD has ended, because CMD's
// parent-death signal is tied to it.

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

type command struct {
	pid    int                  // also its process group
	pidfd  int                  // a signal through it never reaches another process
	states chan unix.WaitStatus // any number of stops, then CMD's end, once

	mu   sync.Mutex
	over bool // CMD has been waited for; guarded by mu
}

// signal passes on a signal that the monitor received. One that a terminal would have sent goes to
// CMD's process group, as the terminal's would have.
func (c *command) signal(sig syscall.Signal) {
	switch sig {
	case unix.SIGINT, unix.SIGQUIT, unix.SIGTSTP, unix.SIGCONT:
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.over {
			_ = unix.Kill(-c.pid, sig)
		}
		return
	}
	if sig > 0 && sig <= 64 {
		_ = unix.PidfdSendSignal(c.pidfd, sig, nil, 0)
	}
}

func startCommand(spec stageSpec, front bool) (*command, *ExecError) {
	type result struct {
		cmd *command
		err *ExecError
	}
	up := make(chan result)
	go func() {
		// The thread's credentials are of no use for anything else, so it is never unlocked and the
		// runtime ends it with the goroutine.
		runtime.LockOSThread()
		if err := dropInherited(); err != nil {
			up <- result{nil, &ExecError{StatusOurs, "dropping capabilities: " + err.Error()}}
			return
		}
		if err := spec.Config.Signals.block(); err != nil {
			up <- result{nil, &ExecError{StatusOurs, "blocking the caller's signals: " + err.Error()}}
			return
		}
		// Before there is a child, so that no signal about it is missed.
		changed := make(chan os.Signal, 1)
		signal.Notify(changed, unix.SIGCHLD)
		pid, err := forkCommand(spec, front)
		if err != nil {
			up <- result{nil, err}
			return
		}
		cmd := &command{pid: pid, states: make(chan unix.WaitStatus, 1)}
		var perr error
		if cmd.pidfd, perr = unix.PidfdOpen(pid, 0); perr != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			fork.Reap(pid)
			up <- result{nil, &ExecError{StatusOurs, "watching the command: " + perr.Error()}}
			return
		}
		up <- result{cmd, nil}
		cmd.collect(changed, spec.Config.PIDNamespace)
	}()
	r := <-up
	return r.cmd, r.err
}

// dropInherited keeps CMD from inheriting the stage's capabilities across exec. If CMD is uid 0
// inside, exec gives it all of the namespace's capabilities anyway.
func dropInherited() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return err
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	return unix.Capset(&hdr, &data[0])
}

// collect reports CMD's stops and its end. As a PID namespace's init it also reaps the orphans,
// which are all its children, and goes on until none is left. It waits for SIGCHLD, because a
// blocking system call would hold one of the runtime's processors.
func (c *command) collect(changed <-chan os.Signal, init bool) {
	whom := c.pid
	if init {
		whom = -1
	}
	for {
		var ws unix.WaitStatus
		c.mu.Lock() // so that signal never hits a process that got the same number
		got, err := unix.Wait4(whom, &ws, unix.WNOHANG|unix.WUNTRACED, nil)
		ended := got == c.pid && !ws.Stopped()
		c.over = c.over || ended
		c.mu.Unlock()
		if err == nil && got == c.pid {
			c.states <- ws
		}
		switch {
		case err == unix.EINTR:
		case err != nil, ended && !init:
			return
		case got == 0:
			<-changed
		}
	}
}

func forkCommand(spec stageSpec, front bool) (int, *ExecError) {
	name := spec.Config.Command[0]
	files := []uintptr{0, 1, 2}
	for i := range spec.Files {
		files = append(files, uintptr(firstFileFD+i))
	}
	attr := &syscall.ProcAttr{
		Env: spec.Config.Env, Files: files,
		Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true},
	}
	if fd, found := firstTerminal(); found && front {
		attr.Sys.Foreground, attr.Sys.Ctty = true, fd
	}
	worst := error(unix.ENOENT)
	for _, path := range candidates(name, spec.Config.Env) {
		// Most directories of PATH have no such file, and a fork for each of them would take longer
		// than everything else.
		if unix.Faccessat(unix.AT_FDCWD, path, unix.F_OK, 0) == unix.ENOENT {
			continue
		}
		pid, err := syscall.ForkExec(path, spec.Config.Command, attr)
		if errors.Is(err, unix.ENOEXEC) {
			// execvp(3): a file without a magic number is a shell script.
			argv := append([]string{"/bin/sh", path}, spec.Config.Command[1:]...)
			pid, err = syscall.ForkExec("/bin/sh", argv, attr)
		}
		switch {
		case err == nil:
			return pid, nil
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ESTALE):
			if _, serr := os.Stat(path); serr == nil {
				return 0, &ExecError{StatusNotFound, name + ": its interpreter or loader does not exist"}
			}
		case errors.Is(err, unix.EACCES):
			// Like a shell, and unlike execvp(3): a directory of PATH that this user may not search
			// says nothing about the name.
			st, serr := os.Stat(path)
			if strings.Contains(name, "/") || (serr == nil && !st.IsDir()) {
				worst = err
			}
		default:
			return 0, &ExecError{StatusNotExecutable, name + ": " + err.Error()}
		}
	}
	if worst == error(unix.ENOENT) {
		if strings.Contains(name, "/") {
			return 0, &ExecError{StatusNotFound, name + ": no such file or directory"}
		}
		return 0, &ExecError{StatusNotFound, name + ": command not found"}
	}
	return 0, &ExecError{StatusNotExecutable, name + ": " + worst.Error()}
}

// candidates returns the paths to try, in the order of CMD's own PATH.
func candidates(name string, env []string) []string {
	if strings.Contains(name, "/") {
		return []string{name}
	}
	path := defaultPath
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	var out []string
	for dir := range strings.SplitSeq(path, ":") {
		if dir == "" {
			dir = "."
		}
		p := filepath.Join(dir, name)
		if !strings.Contains(p, "/") {
			p = "./" + p
		}
		out = append(out, p)
	}
	return out
}
