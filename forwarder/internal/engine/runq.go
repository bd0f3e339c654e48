package engine

// The run queue carries work from places that must not block or take an
// endpoint's lock (waiter callbacks run under it) to the engine, which may.
// It is intrusive: a task is queued at most once, whatever the number of
// events that ask for it, and queueing allocates nothing.

import (
	"sync"
)

// Task is one piece of work that can be queued; embed it. run is never called concurrently for one
// Task; if the Task is queued meanwhile, it runs once more.
type Task struct {
	next  *Task
	state taskState // guarded by the queue's mu
	Run   func()
	Then  func() // called after run, without its exclusion; may be nil
}

type taskState uint8

const (
	taskIdle taskState = iota
	taskQueued
	taskRunning
	taskAgain // running, and queued meanwhile
)

type RunQueue struct {
	wake func() // ends the rest of the engine's leader

	mu         sync.Mutex
	head, tail *Task
	resting    bool // the leader waits for events
	waking     bool // wake was called, and has woken no goroutine yet
}

func NewRunQueue(wake func()) *RunQueue { return &RunQueue{wake: wake} }

// Put queues t unless it is queued already. A task that is running may be Put
// again and then runs once more.
func (q *RunQueue) Put(t *Task) {
	q.mu.Lock()
	switch t.state {
	case taskRunning:
		t.state = taskAgain
	case taskIdle:
		q.append(t)
	}
	wake := q.resting && q.head != nil && !q.waking
	if wake {
		q.waking = true
	}
	q.mu.Unlock()
	if wake {
		q.wake()
	}
}

// append is called with mu held.
func (q *RunQueue) append(t *Task) {
	t.state = taskQueued
	t.next = nil
	if q.tail == nil {
		q.head = t
	} else {
		q.tail.next = t
	}
	q.tail = t
}

// Next takes the first task, which the caller must run, or nil if there is none.
func (q *RunQueue) Next() *Task {
	q.mu.Lock()
	defer q.mu.Unlock()
	t := q.head
	if t == nil {
		return nil
	}
	q.head = t.next
	if q.head == nil {
		q.tail = nil
	}
	t.next = nil
	t.state = taskRunning
	return t
}

// Run runs the task that Next returned.
func (q *RunQueue) Run(t *Task) {
	t.Run()
	q.mu.Lock()
	if t.state == taskAgain {
		q.append(t)
	} else {
		t.state = taskIdle
	}
	q.mu.Unlock()
	if t.Then != nil {
		t.Then()
	}
}

// Woken is called by the goroutine that wake woke. If it is a helper, the leader keeps resting, and
// the next Put wakes again.
func (q *RunQueue) Woken() {
	q.mu.Lock()
	q.waking = false
	q.mu.Unlock()
}

// Rest reports whether the queue is empty; if so, the next Put wakes the leader.
func (q *RunQueue) Rest() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.resting = q.head == nil
	return q.resting
}

// Wakened ends Rest.
func (q *RunQueue) Wakened() {
	q.mu.Lock()
	q.resting = false
	q.mu.Unlock()
}
