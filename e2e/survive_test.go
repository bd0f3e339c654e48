package e2e

// Connections survive what they survive without sluice, and lose nothing: the same clients,
// direct and in a sandbox, in one topology.

import (
	"fmt"
	"testing"
	"time"
)

// withAndWithout runs f for a client on the host itself and for one in a sandbox on it.
func withAndWithout(t *testing.T, w *world, flags []string, f func(t *testing.T, client place)) {
	t.Helper()
	t.Run("direct", func(t *testing.T) { f(t, w.host) })
	t.Run("sluice", func(t *testing.T) { f(t, w.host.sandbox(t, flags...)) })
}

// TestATailIsReadHoweverLate has nc say that it is done, and the server too, while what the
// server sent fills every buffer before a reader that comes later than any timeout of the flow.
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
