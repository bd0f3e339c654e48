package testutil

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// verdict is a testing.TB that records a helper's messages instead of failing.
type verdict struct {
	testing.TB
	said string
}

func (v *verdict) Helper()                           {}
func (v *verdict) Errorf(format string, args ...any) { v.said += fmt.Sprintf(format, args...) }
func (v *verdict) Fatal(args ...any)                 { v.said += fmt.Sprint(args...); runtime.Goexit() }

// of runs f, which a helper may end, and returns the helper's messages.
func of(t *testing.T, f func(testing.TB)) string {
	v := &verdict{TB: t}
	done := make(chan struct{})
	go func() { defer close(done); f(v) }()
	<-done
	return v.said
}

func TestHelpersFailTheirTest(t *testing.T) {
	for _, row := range []struct {
		name, want string
		f          func(testing.TB)
	}{
		{"Must with no error", "", func(t testing.TB) { Must(t, nil) }},
		{"Must with an error ends the test", "broken", func(t testing.TB) { Must(t, errors.New("broken")); t.Errorf("went on") }},
		{"Within reports the last state, and goes on", "not within 1ms: state 7; went on", func(t testing.TB) {
			Within(t, time.Millisecond, func() (bool, string) { return false, "state 7" })
			t.Errorf("; went on")
		}},
		{"Within where it holds at once", "", func(t testing.TB) {
			Within(t, 0, func() (bool, string) { return true, "" })
		}},
	} {
		if got := of(t, row.f); got != row.want {
			t.Errorf("%s: %q, want %q", row.name, got, row.want)
		}
	}
}

func TestHeldSeesDescriptorsAndGoroutines(t *testing.T) {
	before := Holds(t)
	f, err := os.Open(os.DevNull)
	Must(t, err)
	stop := make(chan struct{})
	go func() { <-stop }()
	now := Holds(t)
	if now.Descriptors <= before.Descriptors || now.Goroutines <= before.Goroutines {
		t.Errorf("before %+v, now %+v", before, now)
	}
	if said := of(t, func(t testing.TB) { Held{now.Descriptors - 1, now.Goroutines + 9}.checkReleased(t, time.Millisecond) }); !strings.Contains(said, "held before") {
		t.Errorf("a descriptor is left, and it says %q", said)
	}
	Must(t, f.Close())
	close(stop)
	before.CheckReleased(t)
}
