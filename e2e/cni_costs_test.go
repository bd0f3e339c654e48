package e2e

// The plugin's cost for a pod: time to add and delete, memory, throughput.
//
//	make bench-cni       all of it, on a machine that does nothing else, with its bounds
//	in `make test`       a few pods; only memory, which load does not change, is held to one

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// The bounds that a run must meet.
const (
	maxAdd     = 80 * time.Millisecond // beyond the main plugin's own time, median of 50
	maxDel     = 40 * time.Millisecond
	maxPrivate = 12 << 10 // KiB of an idle pod, in all processes
	minRatio   = 0.9      // pod to host, as a share of the standalone mode's
	minInbound = 10.0     // Gbit/s from outside into a pod
)

func TestCNICosts(t *testing.T) {
	cniArea(t, "cni.costs", "iperf3")
	measure := os.Getenv("SLUICE_BENCH_CNI") != ""
	count := map[bool]int{true: 50, false: 5}[measure]
	n := newNode(t)
	list := n.conflist(t, network{version: "1.0.0", main: "ptp", subnets: dual})
	var adds, dels []time.Duration
	took := &adds
	n.timed = func(d time.Duration) { *took = append(*took, d) }
	for range count {
		p := n.newPod(t, list)
		took = &adds
		if err := p.tryAdd(); err != nil {
			t.Fatalf("ADD: %v", err)
		}
		took = &dels
		if err := p.del(); err != nil {
			t.Fatalf("DEL: %v", err)
		}
		p.close(t)
	}
	a, b := n.add(t, list), n.add(t, list)
	add, del := median(adds), median(dels)
	t.Logf("ADD beyond the main plugin's own time: median of %d %v (%v to %v); at most %v", count, round(add), round(slices.Min(adds)), round(slices.Max(adds)), maxAdd)
	t.Logf("DEL beyond the main plugin's own time: median of %d %v (%v to %v); at most %v", count, round(del), round(slices.Min(dels)), round(slices.Max(dels)), maxDel)
	if measure && (add > maxAdd || del > maxDel) {
		t.Error("ADD or DEL takes too long")
	}
	var private int
	testutil.Within(t, 10*time.Second, func() (bool, string) { // the memory used at start is given back
		monitor := a.attachment(t).PID
		private = 0
		for _, pid := range append(descendants(monitor), monitor) {
			private += privateOf(t, pid)
		}
		return private <= maxPrivate, fmt.Sprintf("an idle pod has %d KiB of private memory, more than %d", private, maxPrivate)
	})
	t.Logf("private memory of an idle pod, monitor and worker: %.1f MiB; at most %d", float64(private)/1024, maxPrivate>>10)
	if !measure {
		return
	}

	// A new namespace uses the machine's own congestion control, which may pace; the node's does
	// not.
	for _, p := range []*pod{a, b} {
		uplink := cniState + "/netns/" + p.attachment(t).Name
		ok(t, n, 5*time.Second, "nsenter", "--net="+uplink, "sh", "-c", "echo cubic >/proc/sys/net/ipv4/tcp_congestion_control")
	}
	sb := n.sandbox(t, "--mtu", "1500")
	iperfServer(t, n)
	iperfServer(t, b)
	rows := []struct {
		what string
		from place
		to   string
	}{{"pod to host", a, pair4}, {"outside to pod", n.far, b.addr(false)}, {"outside to pod, IPv6", n.far, b.addr(true)}, {"standalone to host", sb, pair4}}
	gbit := map[string][]float64{}
	for range 9 {
		for _, row := range rows {
			rep, _ := iperf(t, row.from, "-c", row.to, "-C", "cubic", "-t", "1")
			gbit[row.what] = append(gbit[row.what], rep.End.SumReceived.BitsPerSecond/1e9)
		}
		slices.Reverse(rows) // a drift hits all alike
	}
	for what, all := range gbit {
		t.Logf("%s, MTU 1500, one connection: median of %d %.1f Gbit/s (%.1f to %.1f)", what, len(all), median(all), slices.Min(all), slices.Max(all))
	}
	ratio := median(gbit["pod to host"]) / median(gbit["standalone to host"])
	t.Logf("pod to host is %.2f of the standalone mode's; at least %.1f", ratio, minRatio)
	if ratio < minRatio || median(gbit["outside to pod"]) < minInbound || median(gbit["outside to pod, IPv6"]) < minInbound {
		t.Error("it is too slow")
	}
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

func median[T float64 | time.Duration](all []T) T {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2]
}

// privateOf returns the memory that a process shares with no other, in KiB.
func privateOf(t *testing.T, pid int) (kib int) {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "Private_") {
			var n int
			fmt.Sscan(strings.Fields(lines.Text())[1], &n)
			kib += n
		}
	}
	return kib
}
