package guest

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice/forwarder/sandbox/fork"
)

// Starting CMD. One goroutine keeps one thread for it: the thread gives up what
// the stage holds (ambient and inheritable capabilities), forks, and stays
// until CMD has ended, because CMD's parent-death signal is tied to it.

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

type command struct {
	pidfd int                  // signals through it cannot meet a stranger
	ended chan unix.WaitStatus // one value
}

func (c *command) signal(sig syscall.Signal) {
	if sig > 0 && sig <= 64 {
		_ = unix.PidfdSendSignal(c.pidfd, sig, nil, 0)
	}
}

func startCommand(spec stageSpec) (*command, *ExecError) {
	type result struct {
		cmd *command
		err *ExecError
	}
	up := make(chan result)
	go func() {
		// The thread's credentials are spoilt for anything else: it is never
		// unlocked, so the runtime ends it with the goroutine.
		runtime.LockOSThread()
		if err := dropInherited(); err != nil {
			up <- result{nil, &ExecError{StatusOurs, "dropping capabilities: " + err.Error()}}
			return
		}
		pid, err := forkCommand(spec)
		if err != nil {
			up <- result{nil, err}
			return
		}
		cmd := &command{ended: make(chan unix.WaitStatus, 1)}
		var perr error
		if cmd.pidfd, perr = unix.PidfdOpen(pid, 0); perr != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			fork.Reap(pid)
			up <- result{nil, &ExecError{StatusOurs, "watching the command: " + perr.Error()}}
			return
		}
		up <- result{cmd, nil}
		if !spec.Config.PIDNamespace {
			fork.Await(pid)
			cmd.ended <- fork.Reap(pid)
			return
		}
		reapAll(pid, cmd.ended)
	}()
	r := <-up
	return r.cmd, r.err
}

// dropInherited keeps CMD from inheriting the stage's capabilities over exec.
// If CMD is uid 0 inside, exec gives it all of the namespace's anyway.
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

// reapAll is the duty of a PID namespace's init: every orphan is its child. It
// ends when nobody is left.
func reapAll(pid int, ended chan<- unix.WaitStatus) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return
		case got == pid:
			ended <- ws
		}
	}
}

func forkCommand(spec stageSpec) (int, *ExecError) {
	name := spec.Config.Command[0]
	files := []uintptr{0, 1, 2}
	for i := range spec.Files {
		files = append(files, uintptr(firstFileFD+i))
	}
	attr := &syscall.ProcAttr{
		Env: spec.Config.Env, Files: files,
		Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
	worst := error(unix.ENOENT)
	for _, path := range candidates(name, spec.Config.Env) {
		// Most of PATH has no such file, and to fork for each would take longer than
		// all else does.
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
			// As a shell, unlike execvp(3): a directory of PATH that is closed
			// to this user says nothing about the name.
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

// candidates are the paths to try, in the order of CMD's own PATH.
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
