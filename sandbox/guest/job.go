package guest

import (
	"encoding/binary"
	"os"
	"os/signal"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Job control. To the caller's shell the monitor is the job, and CMD, in a session of its own,
// follows it. The monitor passes on to CMD what a terminal or a shell sends to the job. When CMD is
// stopped, even by its own terminal, the job stops too.

// stopPatience is how long the job may take to stop once it is told to. A job in an orphaned
// process group does not stop at all, since no shell could continue it (setpgid(2)).
const stopPatience = 100 * time.Millisecond

// NotifyJob relays the signals meant for CMD to ch. It ignores the signals that the caller ignores,
// which would otherwise end the monitor.
func NotifyJob(ch chan<- os.Signal, callers Signals) {
	callers.ignore()
	for _, sig := range []unix.Signal{unix.SIGTSTP, unix.SIGCONT, unix.SIGWINCH, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2} {
		if !callers.Ignored.has(sig) {
			signal.Notify(ch, sig)
		}
	}
}

// ReleaseJob is Release, with CMD in the foreground if the job is.
func (g *Guest) ReleaseJob() error {
	if g.console.Whole() {
		g.console.Begin()
		if err := g.toFront(); err != nil {
			return g.orphaned(err)
		}
	}
	return g.Release()
}

// PassOn passes a signal that came from NotifyJob on to CMD.
func (g *Guest) PassOn(sig syscall.Signal) error {
	switch sig {
	case unix.SIGWINCH:
		g.console.Resize()
		if g.console != nil {
			return nil // its terminal tells CMD
		}
	case unix.SIGCONT:
		g.console.Resume()
	}
	return g.Signal(sig)
}

// StopJob stops the job because sig stopped CMD, and continues CMD when the job is continued.
func (g *Guest) StopJob(sig syscall.Signal) error {
	wants := sig == unix.SIGTTIN || sig == unix.SIGTTOU // it wants the terminal, from the background
	if !wants {
		sig = unix.SIGTSTP
	}
	if !wants || g.console != nil && !g.console.Foreground() {
		g.console.Suspend()
		stopGroup(sig)
		g.console.Resume()
	}
	if wants && g.console != nil && g.console.Foreground() {
		g.console.Begin()
		if err := g.toFront(); err != nil {
			return err
		}
	}
	return g.Signal(unix.SIGCONT)
}

// stopGroup stops this process and its group, which is a whole pipeline of the shell's, and returns
// once it is continued.
func stopGroup(sig syscall.Signal) {
	continued := make(chan os.Signal, 1)
	signal.Notify(continued, unix.SIGCONT)
	defer signal.Stop(continued)
	// By the system call, because signal.Reset leaves the runtime's handler in place, which would
	// swallow the signal. The kernel's struct sigaction takes 32 bytes; all zeros mean the default.
	var byDefault, was [32]byte
	set := func(to, from *[32]byte) bool {
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(to)), uintptr(unsafe.Pointer(from)), 8, 0, 0)
		return errno == 0
	}
	if !set(&byDefault, &was) {
		return
	}
	if binary.NativeEndian.Uint64(was[:]) == 1 { // SIG_IGN: the caller's wish
		set(&was, nil)
		return
	}
	_ = unix.Kill(0, sig)
	select {
	case <-continued:
	case <-time.After(stopPatience):
	}
	set(&was, nil)
}
