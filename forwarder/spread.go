package forwarder

// spreadingLink is a link with queues that it can do without; see tun.Endpoint.
type spreadingLink interface {
	Queues() (attached, all int)
	Spread() error
	Narrow()
	Gather() error
}

// What the engine knows of the device's queues.
const (
	gathered int32 = iota // it has the first one alone
	narrowed              // it is on the way there
	spread                // it uses all
)

// spread has the device use all of its queues while several flows of the sandbox's send in
// bulk. The engine's leader, who has the time anyway, says when that is so, without a
// timer of Go's, which would have threads that rest arm one of the kernel's. A link that
// refuses stays as it is.
func (f *Forwarder) spread() {
	link, ok := f.cfg.Link.(spreadingLink)
	if !ok {
		return
	}
	attached, all := link.Queues()
	if all < 2 {
		return
	}
	if attached > 1 { // the worker before us ended so
		f.engine.width.Store(narrowed)
	}
	for {
		var err error
		select {
		case <-f.ctx.Done():
			return
		case <-f.engine.crowded:
			if err = link.Spread(); err == nil {
				f.engine.width.Store(spread)
			}
		case <-f.engine.calm:
			if f.engine.width.Load() == spread {
				link.Narrow()
				f.engine.width.Store(narrowed)
			} else if err = link.Gather(); err == nil {
				f.engine.width.Store(gathered)
			}
		}
		if err != nil {
			f.stats.counter("device_spread_failed").Add(1)
			return
		}
	}
}
