package engine

// The engine reads the device's queues: a batch of frames, then the work that the batch caused.
// Another of the engine's goroutines may read the next batch meanwhile.

import (
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// PolledLink is a link whose user waits for its frames.
type PolledLink interface {
	// PollQueues calls add for each of the link's queues, with the descriptor to wait for and what
	// to do when it is readable: read delivers a batch of frames and reports whether there may be
	// more. It must not be called twice at once.
	PollQueues(add func(fd int, read func() (more bool)) error) error
}

type deviceQueue struct {
	task Task
	e    *Engine
	read func() (more bool)
}

// PollLink makes the engine read link, if link supports that.
func (e *Engine) PollLink(link stack.LinkEndpoint, then func()) error {
	l, ok := link.(PolledLink)
	if !ok {
		return nil
	}
	return l.PollQueues(func(fd int, read func() bool) error {
		q := &deviceQueue{e: e, read: read}
		q.task.Run, q.task.Then = q.run, then
		// It stays registered until its descriptor is closed.
		if _, err := e.Poll.Add(fd, unix.EPOLLIN, q); err != nil {
			return err
		}
		e.Put(&q.task) // for what came before
		return nil
	})
}

func (q *deviceQueue) PollReady(uint32) { q.e.Put(&q.task) }

func (q *deviceQueue) run() {
	if q.read() {
		q.e.Put(&q.task)
	}
}
