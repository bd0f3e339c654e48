package guest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice/forwarder/sandbox/fork"
)

// StageCommand is the hidden subcommand of this binary that must run Main.
const StageCommand = "guest"

// Descriptors of a stage, after 0, 1 and 2; Config.Files follow.
const (
	channelFD   = 3
	planFD      = 4
	firstFileFD = 5
)

// stageCaps are kept over the stage's exec in the ambient set: what it takes to
// configure the network, to mount, and to clear up whatever CMD leaves. They
// count in the sandbox's user namespace only.
// (Root needs the two DAC ones to enter a working directory that is not its own.)
var stageCaps = []uintptr{
	unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN, unix.CAP_KILL, unix.CAP_SYS_PTRACE,
	unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH,
}

// stageProcess is the running stage.
type stageProcess struct {
	pid  int
	done chan struct{} // closed when it has been waited for

	mu     sync.Mutex
	reaped bool   // guarded by mu: from then on pid may be somebody else's
	text   string // how it ended; written before done is closed
}

func (p *stageProcess) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		_ = unix.Kill(p.pid, unix.SIGKILL)
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

// cloneStage starts the stage in new namespaces. Its parent-death signal comes
// when the forking thread ends, not the process, so one goroutine keeps that
// thread until the stage is over.
func cloneStage(flags uintptr, cfg Config, files []*os.File) (*stageProcess, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"sluice", StageCommand}
	cmd.Env = []string{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if cfg.Stdin != nil {
		cmd.Stdin = cfg.Stdin
	}
	if cfg.Stdout != nil {
		cmd.Stdout = cfg.Stdout
	}
	if cfg.Stderr != nil {
		cmd.Stderr = cfg.Stderr
	}
	cmd.ExtraFiles = append(files, cfg.Files...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  flags,
		AmbientCaps: stageCaps,
		Pdeathsig:   parentDeath(cfg.PIDNamespace),
	}
	p := &stageProcess{done: make(chan struct{})}
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
			return
		}
		fork.Await(p.pid)
		p.collect(func() string { _ = cmd.Wait(); return cmd.ProcessState.String() })
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
