package guest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/fork"
)

// StageCommand is the hidden subcommand for which this binary must run Main.
const StageCommand = "guest"

// Descriptors of a stage, after 0, 1 and 2. Config.Files follow.
const (
	channelFD   = 3
	planFD      = 4
	innerFD     = 5 // the outer stage sends the inner one's process ID on it
	firstFileFD = 6
)

// stageCaps are kept across the stage's exec in the ambient set. They are what it takes to
// configure the network, to mount, and to clean up after CMD. They apply in the sandbox's user
// namespace only. (Root needs the two DAC ones to enter a working directory that is not its own.)
var stageCaps = []uintptr{
	unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN, unix.CAP_KILL, unix.CAP_SYS_PTRACE,
	unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH,
}

// outerCaps are the outer stage's. It also writes the id maps of the inner one's user namespace,
// which may map root.
var outerCaps = append([]uintptr{unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETFCAP}, stageCaps...)

// stageProcess is the running stage: first the outer one, then the inner one, once the outer one
// has started it.
type stageProcess struct {
	done    chan struct{} // closed once the stage has been waited for
	settled chan struct{} // closed when pid will not change again

	mu     sync.Mutex // guards all fields below
	pid    int
	reaped bool // from then on pid may belong to another process
	killed bool
	text   string // how it ended; written before done is closed
}

func newStageProcess() *stageProcess {
	return &stageProcess{done: make(chan struct{}), settled: make(chan struct{})}
}

func (p *stageProcess) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.killed = true
	if !p.reaped {
		_ = unix.Kill(p.pid, unix.SIGKILL)
	}
}

func (p *stageProcess) number() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pid
}

func (p *stageProcess) become(pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pid = pid; p.killed {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

func (p *stageProcess) state() string { return p.text }

// collect reaps the zombie that fork.Await saw. It keeps kill from signalling a pid that has been
// reused.
func (p *stageProcess) collect(wait func() string) {
	p.mu.Lock()
	p.reaped = true
	p.text = wait()
	p.mu.Unlock()
	close(p.done)
}

// cloneStage starts the outer stage in new namespaces. The stage's parent-death signal comes when
// the forking thread ends, not the process, so one goroutine keeps that thread until the stage is
// over. The inner stage is that thread's child as well.
func cloneStage(flags uintptr, cfg Config, files []*os.File) (*stageProcess, error) {
	inner, said, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer said.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"sluice", StageCommand}
	cmd.Env = []string{}
	streams := cfg.streams()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = streams[0], streams[1], streams[2]
	cmd.ExtraFiles = append(append(files, said), cfg.Files...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  flags,
		AmbientCaps: outerCaps,
		Pdeathsig:   parentDeath(cfg.PIDNamespace),
	}
	p := newStageProcess()
	up := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			p.pid = cmd.Process.Pid
		}
		up <- err
		if err != nil {
			_ = inner.Close()
			return
		}
		fork.Await(p.pid)
		// The outer stage's end of the pipe is closed by now, and the inner stage has executed.
		pid := readInner(inner)
		_ = inner.Close()
		if pid != 0 {
			p.become(pid)
		}
		close(p.settled)
		if pid == 0 {
			p.collect(func() string { _ = cmd.Wait(); return cmd.ProcessState.String() })
			return
		}
		_ = cmd.Wait()
		fork.Await(pid)
		p.collect(func() string { return describe(fork.Reap(pid)) })
	}()
	if err := <-up; err != nil {
		return nil, err
	}
	return p, nil
}

// parentDeath returns the signal that a stage gets when its monitor dies. A PID namespace's init is
// killed and takes every process in it along. Any other stage has to clean up first, which the
// channel's end tells it to do. The signal only wakes it, in case job control had stopped it.
func parentDeath(init bool) syscall.Signal {
	if init {
		return unix.SIGKILL
	}
	return unix.SIGCONT
}

// describe says in words how a reaped process ended.
func describe(ws unix.WaitStatus) string {
	if ws.Signaled() {
		return fmt.Sprintf("signal: %v", ws.Signal())
	}
	return fmt.Sprintf("exit status %d", ws.ExitStatus())
}
