package e2e

// Checked transfers: every byte of 64 streams at once, both ways, at each MTU, with the device's
// offloads and without them, when a byte takes ten times the work.

import (
	"fmt"
	"testing"
	"time"
)

type transfer struct {
	OK      int
	Failed  map[string]int
	Seconds float64
	Gbps    float64 `json:"gbit_per_s"`
}

func TestTransfersArriveUnchanged(t *testing.T) {
	area(t, "transfers")
	w := newPair(t)
	serve(t, w.far)
	for _, offload := range []bool{true, false} {
		size := 16 << 20
		if !offload || !privileged { // the worker's code is the same for every user
			size = 2 << 20
		}
		for i, mtu := range []int{1280, 1500, 9000, 65520} {
			name := fmt.Sprintf("MTU %d, offloads %v", mtu, map[bool]string{true: "on", false: "off"}[offload])
			t.Run(name, func(t *testing.T) {
				flags := []string{"--mtu", fmt.Sprint(mtu)}
				if !offload {
					flags = append(flags, noOffload)
				}
				sb := w.host.sandbox(t, flags...)
				for _, dir := range []string{"up", "down"} {
					f := families[(i+len(dir))%2] // each family is tried in each direction
					var got transfer
					r := ok(t, sb, 70*time.Second, peerBin(), "xfer", "-streams", "64", "-size", fmt.Sprint(size), "-dir", dir, at(f.far, portXfer))
					r.into(t, &got)
					if got.OK != 64 {
						t.Errorf("%s over %s: %d of 64 streams arrived unchanged; %v\n%s", dir, f.name, got.OK, got.Failed, r)
					}
					t.Logf("%s over %s: %.1f s, %.2f Gbit/s", dir, f.name, got.Seconds, got.Gbps)
				}
			})
		}
	}
}

func TestPublishedTransfersArriveUnchanged(t *testing.T) {
	area(t, "transfers.published")
	w := newPair(t)
	sb := w.host.sandbox(t, "-p", fmt.Sprintf("9007:%d", portXfer))
	serve(t, sb)
	for _, to := range []string{pair4, pair6} {
		for _, dir := range []string{"up", "down"} {
			var got transfer
			r := ok(t, w.far, 70*time.Second, peerBin(), "xfer", "-streams", "16", "-size", fmt.Sprint(16<<20), "-dir", dir, at(to, 9007))
			if r.into(t, &got); got.OK != 16 {
				t.Errorf("%s to %s: %d of 16 streams arrived unchanged; %v\n%s", dir, to, got.OK, got.Failed, r)
			}
		}
	}
}
