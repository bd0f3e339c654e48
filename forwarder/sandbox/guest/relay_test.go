package guest

import (
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// relay is the monitor's part in signals, as sluice run does it: what arrives is
// passed on, but for what the terminal has sent to CMD as well.
func relay(g *Guest) (stop func()) {
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
