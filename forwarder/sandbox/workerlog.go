package sandbox

// The worker's end of the flow log.

import "net/netip"

// wantFlowLog asks for the next file of the flow log.
func (w *worker) wantFlowLog() {
	if err := w.ch.send(message{Type: msgWantFlowLog}, nil); err != nil {
		w.flows.sink.hand(nil)
	}
}

// closeFlowLog writes out what is left of the flow log, which may take another file: of
// the monitor's messages only that counts any more.
func (w *worker) closeFlowLog(in <-chan received) {
	closed := make(chan struct{})
	// Owned by closeFlowLog, which waits for it.
	go func() {
		w.flows.close()
		close(closed)
	}()
	for {
		select {
		case <-closed:
			return
		case r := <-in:
			switch {
			case r.err != nil:
				in = nil // the monitor is gone: the log writes on where it is
				w.flows.sink.hand(nil)
			case r.m.Type == msgFlowLog:
				_ = w.message(r.m, r.fds)
			default:
				closeAll(r.fds)
			}
		}
	}
}

// grantedNames tells under which names an address is granted now.
func (w *worker) grantedNames(a netip.Addr) []string {
	return w.names.Of(a, w.flows.now(), nil)
}
