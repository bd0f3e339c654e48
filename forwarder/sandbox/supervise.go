package sandbox

import (
	"context"
	"time"
)

// Supervision: one worker at a time, for as long as the sandbox lives.
//
// A worker that dies is replaced at once. One that dies young (before
// stableAfter) makes the next wait: 0, then backoffFirst, doubled up to
// backoffMax, until one has lived long enough. The sandbox never gives up: its
// command is running, and packets that wait in the device's queue are better
// than a dead network.

const (
	stableAfter  = 10 * time.Second
	backoffFirst = 50 * time.Millisecond
	backoffMax   = 5 * time.Second
	// readyTimeout bounds a worker's start.
	readyTimeout = 10 * time.Second
)

// backoff yields the waits between restarts.
type backoff struct{ next time.Duration }

// after takes how long the last worker lived and says how long to wait.
func (b *backoff) after(lived time.Duration) time.Duration {
	if lived >= stableAfter {
		b.next = 0
	}
	wait := b.next
	b.next = min(max(2*b.next, backoffFirst), backoffMax)
	return wait
}

// supervised is a started worker: what the supervisor needs of it.
type supervised interface {
	ended() <-chan struct{}
	reason() string
}

// supervisor restarts workers.
type supervisor struct {
	// start brings a worker up and returns when it is ready. It cleans up after
	// itself when it fails.
	start func(ctx context.Context) (supervised, error)
	// lost is told of each death, failed of each start that did not succeed.
	lost   func(why string, wait time.Duration)
	failed func(err error, wait time.Duration)

	now   func() time.Time
	sleep func(ctx context.Context, d time.Duration)
}

// run looks after first, and after its successors until ctx ends. It returns
// the worker that was running then, or nil.
func (s *supervisor) run(ctx context.Context, first supervised) supervised {
	var b backoff
	w, born := first, s.now()
	for {
		select {
		case <-ctx.Done():
			return w
		case <-w.ended():
		}
		if ctx.Err() != nil {
			return w
		}
		wait := b.after(s.now().Sub(born))
		s.lost(w.reason(), wait)
		for {
			s.sleep(ctx, wait)
			if ctx.Err() != nil {
				return nil
			}
			born = s.now()
			next, err := s.start(ctx)
			if err == nil {
				w = next
				break
			}
			if ctx.Err() != nil {
				return nil
			}
			wait = b.after(0)
			s.failed(err, wait)
		}
	}
}

func sleepContext(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
