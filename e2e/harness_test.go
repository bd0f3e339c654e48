package e2e

// The harness's own tests. A topology that differs from its drawing would make every other failure
// a riddle.

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

// TestHarnessToolsWorkWithoutSluice asks the host's own kernel what the other tests ask a sandbox:
// a failure here is a fault of the test.
func TestHarnessToolsWorkWithoutSluice(t *testing.T) {
	area(t, "harness.tools", "bash")
	w := newWorld(t)
	server := serve(t, w.far)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			truths(t, w.host, server, func(port int) string { return at(f.far, port) })
			var moved transfer
			r := ok(t, w.host, 30*time.Second, peerBin(), "xfer", "-streams", "8", "-size", "3000001", "-dir", "down", at(f.far, portXfer))
			if r.into(t, &moved); moved.OK != 8 {
				t.Errorf("transfers fail\n%s", r)
			}
			var many shorts
			r = ok(t, w.host, 30*time.Second, peerBin(), "short", "-count", "1000", at(f.far, portOneByte))
			if r.into(t, &many); many.OK != 1000 {
				t.Errorf("short connections fail\n%s", r)
			}
			d, r := udp(t, w.host, "-ttl", "33", "-tos", "184", "-text", "x", at(f.far, portInspect))
			if d.Got != "len=1 ttl=32 dscp=46" {
				t.Errorf("the far side saw %q\n%s", d.Got, r)
			}
			if d, r := udp(t, w.host, "-size", "65000", "-count", "5", at(f.far, portEcho)); d.Received != 5 || d.Wrong != 0 {
				t.Errorf("large datagrams fail\n%s", r)
			}
		})
	}
	t.Run("aborted handshakes", func(t *testing.T) {
		var got struct{ Sent, Answered int }
		r := ok(t, w.host, 30*time.Second, peerBin(), "synrst", "-count", "500", "-parallel", "50", at(far4, portWatch))
		if r.into(t, &got); got.Answered != 500 {
			t.Errorf("SYNs go unanswered\n%s", r)
		}
	})
	t.Run("held connections", func(t *testing.T) {
		p := w.host.start(t, peerBin(), "hold", "-count", "500", at(far4, portEcho))
		p.waitText(t, `"held","open":500`, 10*time.Second)
		p.write([]byte("echo\n"))
		p.waitText(t, `"echoed","open":500`, 10*time.Second)
		p.closeInput()
		p.wait(t, 5*time.Second)
	})
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
