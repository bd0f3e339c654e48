package forwarder

// The run queue carries work from places that must not block or take an
// endpoint's lock (waiter callbacks run under it) to a goroutine that may.
// It is intrusive: a task is queued at most once, whatever the number of
// events that ask for it, and queueing allocates nothing.

import "sync"

// task is one piece of work that can be queued; embed it. run is called by the
// queue's goroutine, never twice at once for one task.
type task struct {
	next   *task
	queued bool
	run    func()
}

type runQueue struct {
	mu         sync.Mutex
	head, tail *task
	waiting    bool
	closed     bool
	wake       chan struct{} // capacity 1; written under mu when the worker waits
}

func newRunQueue() *runQueue {
	return &runQueue{wake: make(chan struct{}, 1)}
}

// put queues t unless it is queued already. A task that is running may be put
// again and then runs once more.
func (q *runQueue) put(t *task) {
	q.mu.Lock()
	if t.queued || q.closed {
		q.mu.Unlock()
		return
	}
	t.queued = true
	t.next = nil
	if q.tail == nil {
		q.head = t
	} else {
		q.tail.next = t
	}
	q.tail = t
	wake := q.waiting
	q.waiting = false
	q.mu.Unlock()
	if wake {
		q.wake <- struct{}{}
	}
}

// take returns the next task, or nil when the queue was closed. Only one
// goroutine may call it.
func (q *runQueue) take() *task {
	for {
		q.mu.Lock()
		if t := q.head; t != nil {
			q.head = t.next
			if q.head == nil {
				q.tail = nil
			}
			t.next = nil
			t.queued = false
			q.mu.Unlock()
			return t
		}
		if q.closed {
			q.mu.Unlock()
			return nil
		}
		q.waiting = true
		q.mu.Unlock()
		<-q.wake
	}
}

// work runs tasks until close. It is the body of one goroutine, owned by
// Forwarder.Run.
func (q *runQueue) work() {
	for {
		t := q.take()
		if t == nil {
			return
		}
		t.run()
	}
}

// close makes work return once the queue is empty; later puts are ignored.
func (q *runQueue) close() {
	q.mu.Lock()
	wake := q.waiting && !q.closed
	q.waiting = false
	q.closed = true
	q.mu.Unlock()
	if wake {
		q.wake <- struct{}{}
	}
}
