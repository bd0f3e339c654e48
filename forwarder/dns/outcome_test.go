package dns

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

// became asks over UDP and returns what is reported of the question: to the caller that carried it,
// and as an event.
func (g *gate) became(query []byte) (o policy.Outcome, answered bool, e Event) {
	g.ServePacket(context.Background(), query, client, func(b []byte, became policy.Outcome) { o, answered = became, b != nil })
	g.work.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	if n := len(g.events); n > 0 {
		e = g.events[n-1]
	}
	return o, answered, e
}

func TestWhatBecameOfAQuestionIsTold(t *testing.T) {
	code := func(c int) func([]byte) [][]byte { return respond(func(_, a *dns.Msg) { a.Rcode = c }) }
	addr := says("an pypi.test. 60 IN A 198.51.100.1")
	silent := strings.Replace(gatedPolicy, "  egress:\n", "  dns: {refusal: drop}\n  egress:\n", 1)
	for _, row := range []struct {
		what, text string
		up         func([]byte) [][]byte
		down       bool
		name       string
		qtype      uint16

		want     policy.Outcome
		answered bool
		event    string // forwarded, failed, told, rule, code
	}{
		{"an address", gatedPolicy, addr, false, "pypi.test", dns.TypeA, policy.OutcomeAnswered, true, "true false false egress[0] exact 0"},
		{"no such name, says upstream", gatedPolicy, code(dns.RcodeNameError), false, "pypi.test", dns.TypeA, policy.OutcomeAnswered, true, "true false false egress[0] exact 3"},
		{"SERVFAIL, says upstream", gatedPolicy, code(dns.RcodeServerFailure), false, "pypi.test", dns.TypeA, policy.OutcomeAnswered, true, "true false false egress[0] exact 2"},
		{"upstream is down", gatedPolicy, nil, true, "pypi.test", dns.TypeA, policy.OutcomeFailed, true, "false true true dns:upstream 2"},
		{"a name that no rule lists", gatedPolicy, addr, false, "evil.test", dns.TypeA, policy.OutcomeRefused, true, "false false true default 3"},
		{"a type that the policy does not list", gatedPolicy, addr, false, "pypi.test", dns.TypeTXT, policy.OutcomeRefused, true, "false false true dns:type 0"},
		{"a closed address", gatedPolicy, says("an pypi.test. 60 IN A 169.254.169.254"), false, "pypi.test", dns.TypeA, policy.OutcomeRefused, true, "false false true dns:rebinding 0"},
		{"a refusal in silence", silent, addr, false, "evil.test", dns.TypeA, policy.OutcomeRefused, false, "false false false default 5"},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newGate(t, row.text, row.up)
			g.net.servers[server(1)].down = row.down
			o, answered, e := g.became(ask(t, row.name, row.qtype))
			if o != row.want || answered != row.answered {
				t.Errorf("became %v, answered %v; want %v, %v", o, answered, row.want, row.answered)
			}
			if got := fmt.Sprintln(e.Forwarded, e.Failed, e.Told, e.Rule, e.Code); got != row.event+"\n" {
				t.Errorf("the event is %swant %s", got, row.event)
			}
		})
	}
}

// The answer arrives under other rules than the question did: no upstream has failed.
func TestANameThatNewRulesRefuseMeanwhileIsRefused(t *testing.T) {
	var g *gate
	g = newGate(t, gatedPolicy, func(q []byte) [][]byte {
		closed := compile(t, strings.Replace(gatedPolicy, "pypi.test", "other.test", 1))
		g.rules = func() *policy.Rules { return closed }
		return says("an pypi.test. 60 IN A 198.51.100.1")(q)
	})
	o, _, e := g.became(ask(t, "pypi.test", dns.TypeA))
	if o != policy.OutcomeRefused || e.Failed || e.Rule != "default" || e.Code != dns.RcodeRefused {
		t.Errorf("became %v, told as %+v", o, e)
	}
	if g.granted("pypi.test", "198.51.100.1") {
		t.Error("its address is granted")
	}
}

func TestAQuestionBeyondTheLimitIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, gatedPolicy, func([]byte) [][]byte { return nil }, func(c *Config) { c.Limits.InFlight = 1 })
		g.ServePacket(context.Background(), ask(t, "pypi.test", dns.TypeA), client, func([]byte, policy.Outcome) {})
		synctest.Wait()
		var got policy.Outcome
		g.ServePacket(context.Background(), ask(t, "x.files.test", dns.TypeA), client, func(_ []byte, o policy.Outcome) { got = o })
		g.mu.Lock()
		e := g.events[len(g.events)-1]
		g.mu.Unlock()
		if got != policy.OutcomeRefused || e.Rule != "dns:busy" || !e.Bound() || e.Rate() || e.Code != dns.RcodeServerFailure || e.Name != "x.files.test" {
			t.Errorf("became %v, told as %+v", got, e)
		}
	})
}

// TestSilentUpstreamsAreInTheLog wants one line a minute, whatever the policy gates.
func TestSilentUpstreamsAreInTheLog(t *testing.T) {
	for _, text := range []string{gatedPolicy, strings.Replace(gatedPolicy, "  egress:\n", "  dns: {names: any}\n  egress:\n", 1)} {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			var log bytes.Buffer
			lines := func() string { mu.Lock(); defer mu.Unlock(); return log.String() }
			g := newGate(t, text, func([]byte) [][]byte { return nil }, func(c *Config) {
				c.Log = slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) { mu.Lock(); defer mu.Unlock(); return log.Write(p) }), nil))
			})
			for range 3 {
				g.became(ask(t, "pypi.test", dns.TypeA))
			}
			first := lines()
			if strings.Count(first, "\n") != 1 || !strings.Contains(first, "level=INFO") || !strings.Contains(first, "DNS servers give no answer, 2 tries within a minute, the last one at "+server(1).String()) {
				t.Errorf("the log is %q, want one line", first)
			}
			time.Sleep(time.Minute)
			g.became(ask(t, "pypi.test", dns.TypeA))
			if n := strings.Count(lines(), "\n"); n != 2 {
				t.Errorf("%d lines a minute later, want 2: %s", n, lines())
			}
		})
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
