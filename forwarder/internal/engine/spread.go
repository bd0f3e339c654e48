package engine

import (
	"context"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// spreadingLink is a link with optional queues; see tun.Endpoint.
type spreadingLink interface {
	Queues() (attached, all int)
	Received() (frames uint64)
	Spread() error
	Narrow()
	Gather() error
}

// SpreadTimes are the times of the device's other queues. The zero value means 2 s, 100 ms and 30
// s; tests use others.
type SpreadTimes struct {
	// CalmAfter is how long they are kept without need. After that they are not written to, and
	// then detached.
	CalmAfter time.Duration
	// QuietFor is how long no frame must have arrived when they are detached: a frame in the wrong
	// queue at that moment is lost, and a sandbox that was asleep begins with a SYN.
	QuietFor time.Duration
	// QuietWithin is how long to wait for such a pause.
	QuietWithin time.Duration
}

// SpreadLink makes the device use all of its queues while several sandbox flows send bulk data,
// which the engine's leader reports. A Go timer runs only until they are detached again. A link
// that refuses stays as it is.
func (e *Engine) SpreadLink(ctx context.Context, l stack.LinkEndpoint, times SpreadTimes, failed *atomic.Uint64) {
	link, ok := l.(spreadingLink)
	if !ok {
		return
	}
	attached, all := link.Queues()
	if all < 2 {
		return
	}
	if times == (SpreadTimes{}) {
		times = SpreadTimes{CalmAfter: 2 * time.Second, QuietFor: 100 * time.Millisecond, QuietWithin: 30 * time.Second}
	}
	s := spreader{link: link, engine: e, times: times}
	if attached > 1 { // as the previous worker left it
		s.narrow()
	}
	look := time.NewTicker(times.QuietFor)
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
			look.Reset(times.QuietFor)
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
	times    SpreadTimes
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
		if now-crowd > s.times.CalmAfter {
			s.narrow()
		}
	case crowd > s.narrowed:
		return s.spread()
	case now-s.narrowed > s.times.CalmAfter && quiet || now-s.narrowed > s.times.QuietWithin:
		if err := s.link.Gather(); err != nil {
			return err
		}
		s.engine.Spread.Store(false)
	}
	return nil
}
