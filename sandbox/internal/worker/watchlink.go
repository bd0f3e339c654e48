package worker

import (
	"sluice.dev/sluice/tun"
)

// watchLink logs why a device stopped, and ends with it.
func (w *Worker) watchLink(what string, l *tun.Endpoint) {
	<-l.Done()
	if err := l.Err(); err != nil && w.ctx.Err() == nil {
		w.log.Warn("the " + what + ": " + err.Error())
	}
}
