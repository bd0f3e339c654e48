package worker

// The worker's end of the flow log.

import (
	"net/netip"

	"sluice.dev/sluice/sandbox/internal/channel"
)

// wantFlowLog asks for the next file of the flow log.
func (w *Worker) wantFlowLog() {
	if err := w.ch.SendMessage(channel.Message{Type: channel.MsgWantFlowLog}, nil); err != nil {
		w.flows.Sink.Hand(nil)
	}
}

// closeFlowLog writes the rest of the flow log, which may take another file. Of the monitor's
// messages, only that one still matters.
func (w *Worker) closeFlowLog(in <-chan received) {
	closed := make(chan struct{})
	// Owned by closeFlowLog, which waits for it.
	go func() {
		w.flows.Close()
		close(closed)
	}()
	for {
		select {
		case <-closed:
			return
		case r := <-in:
			switch {
			case r.err != nil:
				in = nil // the monitor is gone: the log goes on in its present file
				w.flows.Sink.Hand(nil)
			case r.m.Type == channel.MsgFlowLog:
				_ = w.message(r.m, r.fds)
			default:
				channel.CloseAll(r.fds)
			}
		}
	}
}

// grantedNames returns the names that an address is granted under now.
func (w *Worker) grantedNames(a netip.Addr) []string {
	return w.names.Of(a, w.flows.Now(), nil)
}
