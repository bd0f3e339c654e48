package policy

import (
	"testing"
	"time"
)

func TestAGrantHoldsWhileAFlowByItIsOpen(t *testing.T) {
	const floor = time.Minute
	now, a := time.Unix(1000, 0), addr("192.0.2.1")
	n := NewNames(NamesConfig{})
	grant1(t, n, "a.test", a.String(), floor, now)
	grant1(t, n, "b.test", a.String(), floor, now)
	one, two, all := n.Hold(a, "a.test", now), n.Hold(a, "a.test", now), n.Hold(a, "", now)
	holds := func(name string, want bool) {
		t.Helper()
		if got := n.Holds(name, a, now); got != want {
			t.Errorf("%s after %v: %v", name, now.Sub(time.Unix(1000, 0)), got)
		}
	}
	later := func(d time.Duration) {
		now = now.Add(d)
		grant1(t, n, "other.test", "192.0.2.99", floor, now) // what is over is forgotten
	}
	later(time.Hour)
	holds("a.test", true)
	holds("b.test", true)
	all.End("", now) // a flow that never spoke
	holds("b.test", false)
	holds("a.test", true)
	one.End("a.test", now)
	one.End("a.test", now) // does nothing
	later(time.Hour)
	holds("a.test", true)
	two.End("a.test", now)
	later(floor - 1)
	holds("a.test", true)
	later(1)
	holds("a.test", false)
	if h := n.Hold(a, "a.test", now); h.grants != nil {
		t.Error("what is over can be held")
	}
	// An answer that comes meanwhile counts from when it came.
	grant1(t, n, "a.test", a.String(), floor, now)
	h := n.Hold(a, "a.test", now)
	grant1(t, n, "a.test", a.String(), time.Hour, now)
	for g := range n.All(now) {
		if g.Name == "a.test" && g.TTL != time.Hour {
			t.Errorf("a grant that is held is told of with %v", g.TTL)
		}
	}
	h.End("a.test", now)
	later(time.Hour - 1)
	holds("a.test", true)
	later(1)
	holds("a.test", false)

	var none *Names
	nothing := none.Hold(a, "a.test", now)
	nothing.End("a.test", now)
}

func TestAFullTableGivesUpWhatIsHeldLast(t *testing.T) {
	now, n := time.Unix(1000, 0), NewNames(NamesConfig{})
	a := addr("192.0.2.1")
	grant1(t, n, "held.test", a.String(), time.Minute, now)
	h := n.Hold(a, "held.test", now)
	for i := range 2 * MaxNamesPerAddress {
		grant1(t, n, names26(i)+".test", a.String(), time.Hour, now)
	}
	if !n.Holds("held.test", a, now.Add(time.Hour)) {
		t.Error("a grant that is held was given up before others")
	}
	// With flows by all that there is, one of them goes, and its end finds nothing.
	holds := []Hold{h, n.Hold(a, "", now)}
	grant1(t, n, "last.test", a.String(), time.Hour, now)
	for _, h := range holds {
		h.End("held.test", now)
	}
	if s := n.Stats(); s.Grants != MaxNamesPerAddress {
		t.Errorf("%+v", s)
	}
}

// names26 is a label for a number.
func names26(i int) string { return string(rune('a'+i/26%26)) + string(rune('a'+i%26)) + "x" }
