package e2e

// Readers that stand still: one budget bounds what a sandbox's worker holds of their flows, and
// other flows go on meanwhile.
//
//	SLUICE_STILL_FLOWS=5000  `make soak-memory`; else fewer, which fill the budget all the same

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// stillFlows returns how many flows stand still at once.
func stillFlows(t *testing.T) int {
	s := os.Getenv("SLUICE_STILL_FLOWS")
	if s == "" {
		return 1000
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("SLUICE_STILL_FLOWS=%s is no number of flows", s)
	}
	return n
}

// mostRSS returns the most that docs/performance.md promises for a worker at its high mark, in KiB.
func mostRSS(high, flows int) int { return high>>10*5/4 + flows*16 + 64<<10 }

func TestReadersThatStandStill(t *testing.T) {
	area(t, "memory.still")
	asRoot(t, "it is the same worker for every user, and takes half a minute")
	for _, row := range []struct {
		what  string
		port  int
		size  int
		flows int
	}{
		{"pieces of 64 KiB", portStill, 64 << 10, stillFlows(t)},
		{"pieces of one byte", portStillBytes, 1, 100},
	} {
		t.Run(row.what, func(t *testing.T) {
			w := newPair(t)
			serve(t, w.far)
			sb := w.host.sandbox(t)
			p := sb.start(t, peerBin(), "pour", "-count", fmt.Sprint(row.flows), "-size", fmt.Sprint(row.size), "-timeout", "60s", at(far4, row.port))
			p.waitText(t, fmt.Sprintf(`"open":%d`, row.flows), 120*time.Second)
			for range 3 {
				sb.checkMemory(t, row.flows)
				for _, dir := range []string{"down", "up"} {
					var got transfer
					r := ok(t, sb, 60*time.Second, peerBin(), "xfer", "-streams", "1", "-size", fmt.Sprint(128<<10), "-dir", dir, at(far4, portXfer))
					if r.into(t, &got); got.OK != 1 {
						t.Errorf("another flow does not go on (%s)\n%s", dir, r)
					}
					t.Logf("another flow moved 128 KiB %s in %.2f s", dir, got.Seconds)
				}
			}
			p.closeInput()
			p.wait(t, 60*time.Second)
			// Resets that had no room in the device's queue are sent again when the stack probes.
			testutil.Within(t, 150*time.Second, func() (bool, string) {
				used, _ := number(sb.stats(t), "memory_used")
				u := sb.usage(t)
				good := used == 0 && u.workerRSS < 128<<10
				return good, fmt.Sprintf("memory does not come back: %.0f bytes in use, worker %d KiB", used, u.workerRSS)
			})
		})
	}
}

// checkMemory compares what the worker holds with its budget.
func (sb *sandbox) checkMemory(t *testing.T, flows int) {
	t.Helper()
	stats := sb.stats(t)
	used, ok1 := number(stats, "memory_used")
	high, ok2 := number(stats, "memory_high")
	if !ok1 || !ok2 || high == 0 {
		t.Fatalf("sluice stats tells of no memory budget: %v", stats)
	}
	u := sb.usage(t)
	most := mostRSS(int(high), flows)
	if used > high || u.workerRSS > most {
		t.Errorf("%.0f of %.0f bytes are in use, and the worker holds %d KiB, more than %d", used, high, u.workerRSS, most)
	}
	t.Logf("%d flows: %.0f MiB of %.0f in use, worker %d MiB", u.flows, used/(1<<20), high/(1<<20), u.workerRSS>>10)
}
