package guest

import (
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// Relay passes the signals that this process gets on to CMD, until the function
// that it returns is called. SIGINT and SIGQUIT typed at the terminal reach
// CMD by themselves, as all of the foreground process group gets them; they are
// passed on only if this process is not in it (no terminal, or in the
// background), so that kill -INT works there. Signals that are ignored, as
// under nohup, stay ignored for CMD too. Job control (Ctrl-Z, fg) is not
// touched.
func (g *Guest) Relay() (stop func()) {
	ch := make(chan os.Signal, 16)
	for _, sig := range guestSignals {
		if !signal.Ignored(sig) {
			signal.Notify(ch, sig)
		}
	}
	done := make(chan struct{})
	// Ends when stop closes done.
	go func() {
		for {
			select {
			case <-done:
				return
			case sig := <-ch:
				s := sig.(syscall.Signal)
				if (s == unix.SIGINT || s == unix.SIGQUIT) && inForeground() {
					continue
				}
				_ = g.Signal(s)
			}
		}
	}()
	return func() {
		signal.Stop(ch)
		close(done)
	}
}

// inForeground says whether the terminal's keys reach this process's group.
func inForeground() bool {
	tty, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(tty)
	group, err := unix.IoctlGetInt(tty, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}
