package e2e

// The harness's own tests: a topology that does not do what its drawing says would make
// every other failure a riddle.

import (
	"testing"
	"time"
)

func TestHarnessTopologyIsAsDrawn(t *testing.T) {
	area(t, "harness", "traceroute")
	w := newWorld(t)
	serve(t, w.far)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			for _, row := range []struct{ what, to, error string }{
				{"a server answers", at(f.far, portWhoami), ""},
				{"a closed port refuses", at(f.far, 1), "ECONNREFUSED"},
				{"an absent host is unreachable", at(f.noHost, 1), map[string]string{"IPv4": "EHOSTUNREACH", "IPv6": "ENETUNREACH"}[f.name]},
				{"a prohibited one is told so", at(f.prohibited, 1), map[string]string{"IPv4": "EHOSTUNREACH", "IPv6": "EACCES"}[f.name]},
				{"a silent one times out", at(f.silent, 1), "timeout"},
			} {
				var got dialed
				r := ok(t, w.host, 5*time.Second, peerBin(), "dial", "-timeout", "1500ms", row.to)
				if r.into(t, &got); got.Error != row.error {
					t.Errorf("%s: error %q, not %q\n%s", row.what, got.Error, row.error, r)
				}
			}
		})
	}
}

// dialed is what `peer dial` saw (e2e/peer/dial.go).
type dialed struct {
	Error, Stage string
	Ms           float64
	Got, End     string
	SHA          string
}

// dial runs `peer dial` in a place.
func dial(t *testing.T, in place, args ...string) (d dialed, r result) {
	t.Helper()
	r = ok(t, in, 60*time.Second, append([]string{peerBin(), "dial"}, args...)...)
	r.into(t, &d)
	return d, r
}

// datagrams is what `peer udp` saw.
type datagrams struct {
	Sent, Received, Wrong int
	Got, Error            string
	Local                 string
	Ms                    float64
}

func udp(t *testing.T, in place, args ...string) (d datagrams, r result) {
	t.Helper()
	r = ok(t, in, 60*time.Second, append([]string{peerBin(), "udp"}, args...)...)
	r.into(t, &d)
	return d, r
}
