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

// StageCommand is the hidden subcommand of this binary that must run Main.
const StageCommand = "guest"

// Descriptors of a stage, after 0, 1 and 2; Config.Files follow.
const (
	channelFD   = 3
	planFD      = 4
	innerFD     = 5 // the outer stage says on it which process the inner one is
	firstFileFD = 6
)

// stageCaps are kept over the stage's exec in the ambient set: what it takes to
// configure the network, to mount, and to clear up whatever CMD leaves. They
// count in the sandbox's user namespace only.
// (Root needs the two DAC ones to enter a working directory that is not its own.)
var stageCaps = []uintptr{
	unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN, unix.CAP_KILL, unix.CAP_SYS_PTRACE,
	unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH,
}

// outerCaps are the outer stage's: it writes the id maps of the inner one's user
// namespace too, which may have root in it.
var outerCaps = append([]uintptr{unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETFCAP}, stageCaps...)

// stageProcess is the running stage: the outer one, and from then on that has made it the
// inner one.
type stageProcess struct {
	done    chan struct{} // closed when it has been waited for
	settled chan struct{} // closed when pid changes no more

	mu     sync.Mutex // guards all below
	pid    int
	reaped bool // from then on pid may be somebody else's
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

// collect reaps the zombie that fork.Await saw; kill never meets a pid that was
// given to somebody else.
func (p *stageProcess) collect(wait func() string) {
	p.mu.Lock()
	p.reaped = true
	p.text = wait()
	p.mu.Unlock()
	close(p.done)
}

// cloneStage starts the outer stage in new namespaces. Its parent-death signal comes
// when the forking thread ends, not the process, so one goroutine keeps that
// thread until the stage is over. The inner stage is that thread's child as well.
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
		// Its end of the pipe is closed by now, and the inner stage has executed.
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

// parentDeath is what a stage gets when its monitor dies. As a namespace's
// init it is killed and takes everybody along. Otherwise it has to clear up
// first, which the channel's end tells it to; the signal only wakes it, in case
// job control had stopped it.
func parentDeath(init bool) syscall.Signal {
	if init {
		return unix.SIGKILL
	}
	return unix.SIGCONT
}

// describe is how a collected process ended, in words.
func describe(ws unix.WaitStatus) string {
	if ws.Signaled() {
		return fmt.Sprintf("signal: %v", ws.Signal())
	}
	return fmt.Sprintf("exit status %d", ws.ExitStatus())
}
