package sandbox

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/logring"
)

// A standard error that takes nothing, such as a paused terminal, delays a logger once and not for
// long. When it goes on, it gets the lines that there was room for, in order.
func TestAStuckStandardErrorHoldsNobodyUp(t *testing.T) {
	taken, release := make(chan string, 2*logring.EchoQueue), make(chan struct{})
	began := make(chan struct{}, 2*logring.EchoQueue)
	l := logring.NewLogRing(time.Now, func(line api.LogLine) { began <- struct{}{}; <-release; taken <- line.Text })
	start := time.Now()
	const lines = 1 + logring.EchoQueue + 100
	l.Warnf("test", "0")
	<-began
	for i := 1; i < lines; i++ {
		l.Warnf("test", "%d", i)
	}
	if took := time.Since(start); took > 10*logring.EchoPatience {
		t.Errorf("%d lines took %v", lines, took)
	}
	close(release)
	var got, want []string
	for i := range 1 + logring.EchoQueue {
		got, want = append(got, <-taken), append(want, fmt.Sprint(i))
	}
	if !slices.Equal(got, want) {
		t.Errorf("it got %v", got)
	}
	if all, _ := l.Last(0); len(all) != lines {
		t.Errorf("the log has %d lines, want %d", len(all), lines)
	}
	l.Warnf("test", "afterwards") // waits until it is written, unless the writer is still stuck
	if text := <-taken; text != "afterwards" {
		t.Errorf("afterwards came %q", text)
	}
}

func TestFollowersOfTheLogAreBounded(t *testing.T) {
	l := logring.NewLogRing(time.Now, nil)
	var cancels []func()
	for range logring.MaxLogFollowers {
		_, _, cancel := l.Follow(0)
		if cancel == nil {
			t.Fatalf("only %d may follow", len(cancels))
		}
		cancels = append(cancels, cancel)
	}
	if _, _, cancel := l.Follow(0); cancel != nil {
		t.Error("one more may follow")
	}
	cancels[0]()
	if _, _, cancel := l.Follow(0); cancel == nil {
		t.Error("a place that was given back is not there")
	}
}
