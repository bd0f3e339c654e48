package guest

import (
	"os"
	"os/signal"
	"syscall"
)

// relay is the monitor's part in job control, as sluice run does it.
func relay(g *Guest) (stop func()) {
	ch := make(chan os.Signal, 16)
	NotifyJob(ch, InheritedSignals())
	done := make(chan struct{})
	// Ends when stop closes done.
	go func() {
		for {
			select {
			case <-done:
				return
			case sig := <-g.Stopped():
				_ = g.StopJob(sig)
			case sig := <-ch:
				_ = g.PassOn(sig.(syscall.Signal))
			}
		}
	}()
	return func() {
		signal.Stop(ch)
		close(done)
	}
}
