package e2e

// Connections survive what they survive without sluice, and lose nothing. The same clients run
// direct and in a sandbox, in one topology.

import (
	"fmt"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// withAndWithout runs f for a client on the host itself and for one in a sandbox on it.
func withAndWithout(t *testing.T, w *world, flags []string, f func(t *testing.T, client place)) {
	t.Helper()
	t.Run("direct", func(t *testing.T) { f(t, w.host) })
	t.Run("sluice", func(t *testing.T) { f(t, w.host.sandbox(t, flags...)) })
}

// TestATailIsReadHoweverLate has both nc and the server finish sending, while what the server sent
// fills every buffer before a reader that comes later than any timeout of the flow.
func TestATailIsReadHoweverLate(t *testing.T) {
	area(t, "survive.tail", "bash", "nc")
	w := newPair(t)
	serve(t, w.far)
	flags := []string{"--sysctl", "nf_conntrack_tcp_timeout_last_ack=1", "--sysctl", "nf_conntrack_tcp_timeout_close_wait=1"}
	withAndWithout(t, w, flags, func(t *testing.T, client place) {
		var readers []*proc
		for _, f := range families {
			readers = append(readers, client.start(t, "bash", "-c",
				fmt.Sprintf("set -o pipefail; head -c 900000 /dev/zero | nc -N %s %d | (sleep 4; wc -c)", f.far, portEcho)))
		}
		for _, p := range readers {
			if r := p.wait(t, 20*time.Second).wantStatus(t, 0); r.out != "900000\n" {
				t.Errorf("the reader got %q bytes, not 900000\n%s", r.out, r)
			}
		}
	})
}

// TestARouteThatIsLostForAWhileEndsNothing has the router answer "unreachable" while a client of an
// established connection sends: a soft error (RFC 1122 section 4.2.3.9).
func TestARouteThatIsLostForAWhileEndsNothing(t *testing.T) {
	area(t, "survive.loss", "bash", "nc")
	w := newWorld(t)
	serve(t, w.far)
	sb := w.host.sandbox(t)
	// Both run at once: the loss is the same for each, and takes its time.
	clients := make(map[string]*proc)
	for _, f := range families {
		for _, at := range []place{w.host, sb} {
			p := at.start(t, "bash", "-c", fmt.Sprintf("while read -r line; do echo $line; done | nc -N %s %d", f.far, portEcho))
			p.write([]byte("before\n"))
			p.waitText(t, "before", 5*time.Second)
			clients[f.name+" from "+at.String()] = p
		}
	}
	errors := w.host.watch(t, "h0")
	from := errors.count()
	w.router.ip(t, "route add unreachable "+far4+"/32\nroute add unreachable "+far6+"/128")
	for _, p := range clients {
		p.write([]byte("meanwhile\n"))
	}
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		told := make(map[int]int)
		for _, p := range errors.since(from) {
			told[p.proto]++
		}
		return told[1] >= 4 && told[58] >= 4, fmt.Sprintf("the router has not told every client twice over both families: %v", told)
	})
	w.router.ip(t, "route del unreachable "+far4+"/32\nroute del unreachable "+far6+"/128")
	for who, p := range clients {
		p.waitText(t, "meanwhile", 10*time.Second)
		p.closeInput()
		if r := p.wait(t, 5*time.Second); r.status != 0 || r.out != "before\nmeanwhile\n" {
			t.Errorf("over %s: status %d, %q\n%s", who, r.status, r.out, r)
		}
	}
}

// TestAPortIsUsedAgainAtOnce makes hundreds of connections from one port, with no gap between the
// end of one and the SYN of the next.
func TestAPortIsUsedAgainAtOnce(t *testing.T) {
	area(t, "survive.reuse")
	w := newPair(t)
	serve(t, w.far)
	withAndWithout(t, w, nil, func(t *testing.T, client place) {
		for _, f := range families {
			for _, row := range []struct {
				what string
				args []string
				port int
			}{
				{"reset at once", nil, portEcho},
				{"reset after a byte each way", []string{"-talk", "-count", "100"}, portEcho},
				{"closed by both ends", []string{"-close", "fin", "-count", "100"}, portOneByte},
			} {
				t.Run(f.name+" "+row.what, func(t *testing.T) {
					var got struct {
						OK     int
						Errors map[string]int
						Slow   int
					}
					argv := append([]string{peerBin(), "reuse"}, row.args...)
					r := ok(t, client, 60*time.Second, append(argv, at(f.far, row.port))...)
					if r.into(t, &got); got.OK == 0 || len(got.Errors) > 0 || got.Slow > 3 {
						t.Errorf("%d connections, errors %v, %d SYNs were lost\n%s", got.OK, got.Errors, got.Slow, r)
					}
				})
			}
		}
	})
}
