package sandbox

import (
	"fmt"
	"time"
)

// watchLink says why the device stopped; it ends with it.
func (w *worker) watchLink() {
	<-w.link.Done()
	if err := w.link.Err(); err != nil && w.ctx.Err() == nil {
		w.log.Warn("the device: " + err.Error())
	}
}

// descriptorWarning is how often a lack of descriptors is told at most.
const descriptorWarning = time.Minute

// watchDescriptors tells of flows that failed for want of descriptors; it ends
// with the worker.
func (w *worker) watchDescriptors() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var told uint64
	var last time.Time
	for {
		select {
		case <-w.ctx.Done():
			return
		case now := <-tick.C:
			failed := w.fwd.Stats()["dial_out_of_descriptors"]
			if failed > told && (last.IsZero() || now.Sub(last) >= descriptorWarning) {
				w.log.Warn(fmt.Sprintf("out of descriptors: %d new flows failed, those that exist go on (raise the limit on open files: ulimit -n)", failed-told))
				told, last = failed, now
			}
		}
	}
}
