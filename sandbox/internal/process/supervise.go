package process

import (
	"context"
	"time"
)

// Supervision: one worker at a time, for as long as the sandbox lives.
//
// A worker that dies is replaced at once. One that dies young (before
// StableAfter) makes the next wait: 0, then backoffFirst, doubled up to
// backoffMax, until one has lived long enough. The sandbox never gives up: its
// command is running, and packets that wait in the device's queue are better
// than a dead network.

const (
	StableAfter  = 10 * time.Second
	backoffFirst = 50 * time.Millisecond
	backoffMax   = 5 * time.Second
	// ReadyTimeout bounds a worker's start.
	ReadyTimeout = 10 * time.Second
)

// Backoff yields the waits between restarts.
type Backoff struct{ next time.Duration }

// After returns how long to wait, given how long the last worker lived.
func (b *Backoff) After(lived time.Duration) time.Duration {
	if lived >= StableAfter {
		b.next = 0
	}
	wait := b.next
	b.next = min(max(2*b.next, backoffFirst), backoffMax)
	return wait
}

// Supervised is a started worker as the supervisor sees it.
type Supervised interface {
	Ended() <-chan struct{}
	Reason() string
}

// Supervisor restarts workers.
type Supervisor struct {
	// Start brings a worker up and returns when it is ready. It cleans up after
	// itself when it fails.
	Start func(ctx context.Context) (Supervised, error)
	// Lost is called for each death, failed for each unsuccessful start.
	Lost   func(why string, wait time.Duration)
	Failed func(err error, wait time.Duration)

	Now   func() time.Time
	Sleep func(ctx context.Context, d time.Duration)
}

// Run looks after first, and after its successors until ctx ends. It returns
// the worker that was running then, or nil.
func (s *Supervisor) Run(ctx context.Context, first Supervised) Supervised {
	var b Backoff
	w, born := first, s.Now()
	for {
		select {
		case <-ctx.Done():
			return w
		case <-w.Ended():
		}
		if ctx.Err() != nil {
			return w
		}
		wait := b.After(s.Now().Sub(born))
		s.Lost(w.Reason(), wait)
		for {
			s.Sleep(ctx, wait)
			if ctx.Err() != nil {
				return nil
			}
			born = s.Now()
			next, err := s.Start(ctx)
			if err == nil {
				w = next
				break
			}
			if ctx.Err() != nil {
				return nil
			}
			wait = b.After(0)
			s.Failed(err, wait)
		}
	}
}

func SleepContext(ctx context.Context, d time.Duration) {
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
