package engine

import (
	"context"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
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
	// CalmAfter is how long they are kept without need, and then not written to until they
	// are detached.
	CalmAfter = 2 * time.Second
	// QuietFor is how long no frame must have come when they are: one in the wrong queue at
	// that moment is lost, and a sandbox that was asleep begins with a SYN.
	QuietFor = 100 * time.Millisecond
	// QuietWithin is how long such a pause is waited for.
	QuietWithin = 30 * time.Second
)

// spread has the device use all of its queues while several flows of the sandbox's send in
// bulk, as the engine's leader tells. A timer of Go's runs only until they are detached
// again. A link that refuses stays as it is.
func (e *Engine) SpreadLink(ctx context.Context, l stack.LinkEndpoint, failed *atomic.Uint64) {
	link, ok := l.(spreadingLink)
	if !ok {
		return
	}
	attached, all := link.Queues()
	if all < 2 {
		return
	}
	s := spreader{link: link, engine: e}
	if attached > 1 { // the worker before us ended so
		s.narrow()
	}
	look := time.NewTicker(QuietFor)
	defer look.Stop()
	for {
		if !e.Spread.Load() {
			look.Stop()
		}
		var err error
		select {
		case <-ctx.Done():
			return
		case <-e.Crowded:
			err = s.spread()
			look.Reset(QuietFor)
		case <-look.C:
			err = s.look()
		}
		if err != nil {
			failed.Add(1)
			return
		}
	}
}

// spreader attaches and detaches the queues.
type spreader struct {
	link     spreadingLink
	engine   *Engine
	narrowed time.Duration // when, since the engine's start; 0: all are written to
	received uint64        // when last looked at
}

func (s *spreader) spread() error {
	if err := s.link.Spread(); err != nil {
		return err
	}
	s.narrowed = 0
	s.engine.Spread.Store(true)
	return nil
}

func (s *spreader) narrow() {
	s.link.Narrow()
	s.narrowed = time.Since(s.engine.Start)
	s.engine.Spread.Store(true)
}

// look takes the next step towards one queue, or back.
func (s *spreader) look() error {
	now, crowd := time.Since(s.engine.Start), time.Duration(s.engine.CrowdAt.Load())
	received := s.link.Received()
	quiet := received == s.received
	s.received = received
	switch {
	case s.narrowed == 0:
		if now-crowd > CalmAfter {
			s.narrow()
		}
	case crowd > s.narrowed:
		return s.spread()
	case now-s.narrowed > CalmAfter && quiet || now-s.narrowed > QuietWithin:
		if err := s.link.Gather(); err != nil {
			return err
		}
		s.engine.Spread.Store(false)
	}
	return nil
}
