package e2e

// Many connections: short ones, half-open ones that are dropped, and ten thousand held at once.

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

type shorts struct {
	OK, Hung int
	Failed   map[string]int
	Slowest  float64 `json:"slowest_ms"`
	Seconds  float64
}

func TestTwentyThousandShortConnections(t *testing.T) {
	area(t, "churn.short")
	w := newPair(t)
	serve(t, w.far)
	sb := w.host.sandbox(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			var got shorts
			r := ok(t, sb, 120*time.Second, peerBin(), "short", "-count", "20000", "-parallel", "32", at(f.far, portOneByte))
			if r.into(t, &got); got.OK != 20000 {
				t.Errorf("%d of 20000 connections worked, %d hung\n%s", got.OK, got.Hung, r)
			}
			t.Logf("%.0f connections/s, the slowest took %.0f ms", 20000/got.Seconds, got.Slowest)
		})
	}
}

func TestAbortedHandshakesDoNotWedge(t *testing.T) {
	area(t, "churn.syn")
	w := newPair(t)
	serve(t, w.far)
	sb := w.host.sandbox(t, rootInside)
	for _, row := range []struct{ count, parallel int }{{10, 1}, {10000, 128}} {
		t.Run(fmt.Sprintf("%d times SYN, SYN/ACK, RST, then a connection", row.count), func(t *testing.T) {
			var got struct{ Sent, Answered, Refused int }
			r := ok(t, sb, 120*time.Second, peerBin(), "synrst", "-count", fmt.Sprint(row.count), "-parallel", fmt.Sprint(row.parallel), at(far4, portWatch))
			r.into(t, &got)
			// Half-open connections are bounded, so a burst may lose some of them, but not many.
			if got.Sent != row.count || got.Answered < row.count*95/100 {
				t.Errorf("%d of %d SYNs were answered\n%s", got.Answered, row.count, r)
			}
			t.Log(strings.TrimSpace(r.out))
			d, r := dial(t, sb, "-timeout", "2s", at(far4, portWhoami))
			if d.Error != "" || d.Ms > 1000 {
				t.Errorf("the next connection does not work at once\n%s", r)
			}
		})
	}
}

type held struct {
	Event   string
	Open    int
	Failed  map[string]int
	Seconds float64
}

// lastHeld returns the newest line of `peer hold`.
func lastHeld(out, event string) (h held, found bool) {
	for line := range strings.Lines(out) {
		var v held
		if json.Unmarshal([]byte(line), &v) == nil && v.Event == event {
			h, found = v, true
		}
	}
	return h, found
}

func TestTenThousandFlowsHeldAndEchoing(t *testing.T) {
	area(t, "churn.held")
	asRoot(t, "it is the same worker for every user, and takes three quarters of a minute")
	const many = 10000
	w := newPair(t)
	serve(t, w.far)
	sb := w.host.sandbox(t)
	// The first flows of a process create pools and grow heaps that stay, which is no leak.
	warm := sb.start(t, peerBin(), "hold", "-count", "100", at(far4, portEcho))
	warm.waitText(t, `"held"`, 20*time.Second)
	warm.closeInput()
	warm.wait(t, 20*time.Second)
	before := sb.usage(t)

	p := sb.start(t, peerBin(), "hold", "-count", fmt.Sprint(many), "-timeout", "20s", at(far4, portEcho))
	for _, event := range []string{"held", "echoed", "echoed again", "closed"} {
		name := strings.Fields(event)[0]
		times := strings.Count(p.result("").out, `"`+name+`"`) + 1
		if name == "echoed" {
			p.write([]byte("echo\n"))
		} else if name == "closed" {
			during := sb.usage(t)
			t.Logf("at the start %+v, with %d flows %+v: %.1f KiB a flow", before, many, during, float64(during.workerRSS-before.workerRSS)/many)
			if during.flows < many {
				t.Errorf("%d flows in the table, not %d", during.flows, many)
			}
			p.closeInput()
		}
		out := p.waitOutput(t, 60*time.Second, event, func(out string) bool { return strings.Count(out, `"`+name+`"`) >= times })
		if h, _ := lastHeld(out, name); h.Open != many {
			t.Errorf("%s: %d of %d; %v", event, h.Open, many, h.Failed)
		}
	}
	p.wait(t, 20*time.Second)
	testutil.Within(t, 60*time.Second, func() (bool, string) {
		now := sb.usage(t)
		good := now.flows == 0 && now.workerFDs <= before.workerFDs && now.goroutines <= before.goroutines+2 &&
			now.workerRSS <= before.workerRSS+32<<10
		return good, fmt.Sprintf("not back to the start after %d flows: before %+v, now %+v", many, before, now)
	})
}
