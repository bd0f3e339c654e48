package cni

import (
	"errors"
	"net"
	"testing"
	"time"

	"sluice.dev/sluice/cni/uplink"
	"sluice.dev/sluice/internal/testutil"
)

// While an ADD is at work, the uplink namespace has the pod's addresses and no way to the
// pod: its own kernel must not speak for it.
func TestTheUplinkIsSilentUntilItIsSteered(t *testing.T) {
	n := newNode(t)
	asked := 0
	n.plugin.Reached = func(step string) error {
		if step != uplink.StepRestored {
			return nil
		}
		for _, addr := range []string{pod4, pod6} {
			asked++
			d := net.Dialer{Timeout: 200 * time.Millisecond}
			_, err := d.Dial("tcp", net.JoinHostPort(addr, "80"))
			var silence net.Error
			if !errors.As(err, &silence) || !silence.Timeout() {
				t.Errorf("a connection to %s: %v, want silence", addr, err)
			}
		}
		return nil
	}
	testutil.Must(t, n.add())
	if asked != 2 {
		t.Errorf("asked %d times", asked)
	}
	testutil.Must(t, n.del())
	n.clean()
}
