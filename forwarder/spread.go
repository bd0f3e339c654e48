package forwarder

import (
	"sync/atomic"
	"time"
)

// spreadingLink is a link with queues that it can do without; see tun.Endpoint.
type spreadingLink interface {
	Queues() (attached, all int)
	Received() (frames uint64)
	Spread() error
	Narrow()
	Gather() error
}

// Times of the device's other queues. They are variables for tests.
var (
	// calmAfter is how long they are kept without need, and then not written to until they
	// are detached.
	calmAfter = 2 * time.Second
	// quietFor is how long no frame must have come when they are: one in the wrong queue at
	// that moment is lost, and a sandbox that was asleep begins with a SYN.
	quietFor = 100 * time.Millisecond
	// quietWithin is how long such a pause is waited for.
	quietWithin = 30 * time.Second
)

// spread has the device use all of its queues while several flows of the sandbox's send in
// bulk, as the engine's leader tells. A timer of Go's runs only until they are detached
// again. A link that refuses stays as it is.
func (f *Forwarder) spread() {
	link, ok := f.cfg.Link.(spreadingLink)
	if !ok {
		return
	}
	attached, all := link.Queues()
	if all < 2 {
		return
	}
	s := spreader{link: link, engine: f.engine, failed: f.stats.counter("device_spread_failed")}
	if attached > 1 { // the worker before us ended so
		s.narrow()
	}
	look := time.NewTicker(quietFor)
	defer look.Stop()
	for {
		if !f.engine.spread.Load() {
			look.Stop()
		}
		select {
		case <-f.ctx.Done():
			return
		case <-f.engine.crowded:
			s.spread()
			look.Reset(quietFor)
		case <-look.C:
			s.look()
		}
		if s.failed.Load() > 0 {
			return
		}
	}
}

// spreader attaches and detaches the queues.
type spreader struct {
	link     spreadingLink
	engine   *engine
	failed   *atomic.Uint64
	narrowed time.Duration // when, since the engine's start; 0: all are written to
	received uint64        // when last looked at
}

func (s *spreader) spread() {
	if s.link.Spread() != nil {
		s.failed.Add(1)
		return
	}
	s.narrowed = 0
	s.engine.spread.Store(true)
}

func (s *spreader) narrow() {
	s.link.Narrow()
	s.narrowed = time.Since(s.engine.start)
	s.engine.spread.Store(true)
}

// look takes the next step towards one queue, or back.
func (s *spreader) look() {
	now, crowd := time.Since(s.engine.start), time.Duration(s.engine.crowdAt.Load())
	received := s.link.Received()
	quiet := received == s.received
	s.received = received
	switch {
	case s.narrowed == 0:
		if now-crowd > calmAfter {
			s.narrow()
		}
	case crowd > s.narrowed:
		s.spread()
	case now-s.narrowed > calmAfter && quiet || now-s.narrowed > quietWithin:
		if s.link.Gather() != nil {
			s.failed.Add(1)
			return
		}
		s.engine.spread.Store(false)
	}
}
