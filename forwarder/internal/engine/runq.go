package engine

// The run queue carries work from places that must not block or take an
// endpoint's lock (waiter callbacks run under it) to the engine, which may.
// It is intrusive: a task is queued at most once, whatever the number of
// events that ask for it, and queueing allocates nothing.

import (
	"sync"
)

// Task is one piece of work that can be queued; embed it. run is never called
// twice at once for one Task; who asks for it meanwhile has it run once more.
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
	taskAgain // running, and asked for meanwhile
)

type RunQueue struct {
	wake func() // ends the rest of the engine's leader

	mu         sync.Mutex
	head, tail *Task
	resting    bool // the leader waits for events
	waking     bool // wake was called, and has woken nobody yet
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

// Next takes the first task, which the caller must run; nil when there is none.
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

// Run runs what next returned.
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

// Woken is called by who was Woken by wake, which may be a helper: the leader then
// rests on, and the next put wakes again.
func (q *RunQueue) Woken() {
	q.mu.Lock()
	q.waking = false
	q.mu.Unlock()
}

// Rest tells whether the queue is empty; if so, the next put wakes the leader.
func (q *RunQueue) Rest() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.resting = q.head == nil
	return q.resting
}

// Wakened ends what rest began.
func (q *RunQueue) Wakened() {
	q.mu.Lock()
	q.resting = false
	q.mu.Unlock()
}
