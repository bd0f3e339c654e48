package testutil

import (
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"
)

// Held is a count of what the test's process holds at one moment.
type Held struct{ Descriptors, Goroutines int }

// Holds returns what the process holds now.
func Holds(t testing.TB) Held {
	t.Helper()
	return Held{Descriptors(t, os.Getpid()), runtime.NumGoroutine()}
}

// CheckReleased fails the test if the process still holds more than before after five seconds. It
// waits because some goroutines and descriptors end a moment after their owner closes them.
func (before Held) CheckReleased(t testing.TB) {
	t.Helper()
	before.checkReleased(t, 5*time.Second)
}

func (before Held) checkReleased(t testing.TB, limit time.Duration) {
	t.Helper()
	var now Held
	if poll(limit, time.Millisecond, func() bool {
		now = Holds(t)
		return now.Descriptors <= before.Descriptors && now.Goroutines <= before.Goroutines
	}) {
		return
	}
	stacks := make([]byte, 64<<10)
	t.Errorf("held before %+v, now %+v:\n%s", before, now, stacks[:runtime.Stack(stacks, true)])
}

// Descriptors returns the number of a process's open descriptors. In the test's own process that
// always includes the one that reads the list.
func Descriptors(t testing.TB, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	Must(t, err)
	return len(list)
}
