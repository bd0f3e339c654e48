package seldom

import (
	"testing"
	"time"
)

func TestFailuresAreToldOncePerMinute(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var f Failures
	var told []int
	for i := range 600 { // ten a second
		if n, tell := f.Note(3, start.Add(time.Duration(i)*100*time.Millisecond)); tell {
			told = append(told, n)
		}
	}
	if len(told) != 1 || told[0] != 3 {
		t.Errorf("told of %v in the first minute, want once, of the third", told)
	}
	if n, tell := f.Note(3, start.Add(time.Minute+time.Second)); tell || n != 1 {
		t.Errorf("the minute after begins with %d, told %v", n, tell)
	}
	for _, want := range []bool{false, true, false} {
		if n, tell := f.Note(3, start.Add(time.Minute+2*time.Second)); tell != want {
			t.Errorf("number %d of the second minute: told %v", n, tell)
		}
	}
}

func TestFailuresThatAreFarBetweenAreNotTold(t *testing.T) {
	var f Failures
	for i := range 20 {
		if _, tell := f.Note(3, time.Unix(0, 0).Add(time.Duration(i)*40*time.Second)); tell {
			t.Fatalf("number %d was told of", i)
		}
	}
}
