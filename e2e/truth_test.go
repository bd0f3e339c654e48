package e2e

// Truthful TCP: one end sees what the other does, and no more; over IPv4 and IPv6, out of the
// sandbox and into it.

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// events of `peer serve`
type seen struct {
	Event string
	Peer  string
	Bytes int64
	End   string
	Data  string
}

func lastSeen(out, event, peer string) (s seen, found bool) {
	for line := range strings.Lines(out) {
		var v seen
		if json.Unmarshal([]byte(line), &v) == nil && v.Event == event {
			s, found = v, true
		}
	}
	return s, found
}

// truths asks the same of a client in one place and a server in another; to(port) is where the
// client reaches the server's port.
func truths(t *testing.T, client place, server *proc, to func(port int) string) {
	t.Helper()
	// An event belongs to the latest connection, because they are made one at a time.
	expect := func(t *testing.T, event string, before int) seen {
		t.Helper()
		out := server.waitOutput(t, 5*time.Second, event+" seen by the server", func(out string) bool {
			return strings.Count(out, `"event":"`+event+`"`) > before
		})
		s, _ := lastSeen(out, event, "")
		return s
	}
	count := func(event string) int { return strings.Count(server.result("").out, `"event":"`+event+`"`) }

	t.Run("the client's half-close reaches the server, whose answer still comes", func(t *testing.T) {
		n := count("half-close")
		d, r := dial(t, client, "-send-bytes", "300000", to(portDigest))
		s := expect(t, "half-close", n)
		if want := "300000 " + d.SHA + "\n"; d.Got != want || d.End != "eof" || s.Bytes != 300000 || s.End != "eof" {
			t.Errorf("the client got %q then %q, the server %+v\n%s", d.Got, d.End, s, r)
		}
	})
	t.Run("the server's half-close reaches the client, whose bytes still arrive", func(t *testing.T) {
		n := count("closed")
		// The client reads to the end first, then sends: one half after the other.
		r := ok(t, client, 10*time.Second, "bash", "-c", fmt.Sprintf(
			`host=%s; exec 3<>/dev/tcp/${host%%:*}/${host##*:} && cat <&3 && printf late >&3`, strings.Trim(strings.ReplaceAll(to(portGreet), "]", ""), "[")))
		s := expect(t, "closed", n)
		if r.out != "hello" || s.Data != "late" || s.End != "eof" {
			t.Errorf("the client got %q, the server %+v\n%s", r.out, s, r)
		}
	})
	t.Run("the server's reset is a reset", func(t *testing.T) {
		d, r := dial(t, client, "-send", "x", "-close", "no", to(portReset))
		if d.Error != "ECONNRESET" {
			t.Errorf("the client saw %q %q, not ECONNRESET\n%s", d.Error, d.End, r)
		}
	})
	t.Run("the client's reset is a reset", func(t *testing.T) {
		n := count("closed")
		dial(t, client, "-send", "xyz", "-close", "reset", to(portWatch))
		if s := expect(t, "closed", n); s.End != "reset" {
			t.Errorf("the server saw %+v, not a reset", s)
		}
	})
	t.Run("the client's close is a close", func(t *testing.T) {
		n := count("closed")
		dial(t, client, "-send", "xyz", "-close", "full", to(portWatch))
		if s := expect(t, "closed", n); s.End != "eof" || s.Bytes != 3 {
			t.Errorf("the server saw %+v, not three bytes and the end", s)
		}
	})
}

func TestClosesAreToldTruthfully(t *testing.T) {
	area(t, "truth.close", "bash")
	w := newWorld(t)
	server := serve(t, w.far)
	sb := w.host.sandbox(t, "-p", fmt.Sprintf("9000-9010:%d-%d", base, base+10))
	for _, f := range families {
		t.Run("out over "+f.name, func(t *testing.T) {
			truths(t, sb, server, func(port int) string { return at(f.far, port) })
		})
	}
	inside := serve(t, sb)
	for _, to := range []struct {
		what, addr string
		from       place
	}{
		{"in over IPv4", host4, w.far}, {"in over IPv6", host6, w.far}, {"in over loopback", "127.0.0.1", w.host},
	} {
		t.Run(to.what, func(t *testing.T) {
			truths(t, to.from, inside, func(port int) string { return at(to.addr, port-base+9000) })
		})
	}
}

func TestFailedConnectsAreToldTruthfully(t *testing.T) {
	area(t, "truth.connect")
	w := newWorld(t)
	sb := w.host.sandbox(t)
	for _, f := range families {
		for _, row := range []struct {
			what, to string
			errors   string
			within   float64 // ms
		}{
			{"a closed port refuses at once", at(f.far, 1), "ECONNREFUSED", 500},
			{"an absent host is unreachable", at(f.noHost, 1), "EHOSTUNREACH ENETUNREACH", 2500},
			{"a prohibited host is unreachable", at(f.prohibited, 1), "EHOSTUNREACH ENETUNREACH EACCES", 2500},
			{"a silent host is silent", at(f.silent, 1), "timeout", 4000},
		} {
			t.Run(f.name+" "+row.what, func(t *testing.T) {
				d, r := dial(t, sb, "-timeout", "3s", row.to)
				if !contains(strings.Fields(row.errors), d.Error) || d.Ms > row.within {
					t.Errorf("the connect failed with %q after %.0f ms, not with %s within %.0f\n%s", d.Error, d.Ms, row.errors, row.within, r)
				}
			})
		}
	}
	t.Run("a published port with nobody behind it refuses", func(t *testing.T) {
		sb := w.host.sandbox(t, "-p", "9100:9100")
		_ = sb
		d, r := dial(t, w.far, "-timeout", "3s", "-send", "x", at(host4, 9100))
		if d.Error != "ECONNREFUSED" && d.Error != "ECONNRESET" {
			t.Errorf("the client saw %q, neither refused nor reset\n%s", d.Error, r)
		}
	})
}

func TestDSCPIsCarried(t *testing.T) {
	area(t, "truth.dscp")
	w := newWorld(t)
	serve(t, w.far)
	sb := w.host.sandbox(t)
	watch := w.far.watch(t, "f0")
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			from := watch.count()
			dial(t, sb, "-send", "marked", "-tos", "184", at(f.far, portWatch))
			testutil.Within(t, 3*time.Second, func() (bool, string) {
				for _, p := range watch.since(from) {
					if p.proto == 6 && p.dport == portWatch && p.payload > 0 && p.tos == 184 {
						return true, ""
					}
				}
				return false, fmt.Sprintf("no segment with data and DSCP 46 arrived; arrived: %v", watch.since(from))
			})
		})
	}
}
