package dns

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

// In a pod's place: the resolver falls silent as soon as the policy leaves names to the pod's own
// resolver, on open connections too, and no question from the pod goes upstream then.
func TestOnlyGatedAnswersWhileNamesAreGated(t *testing.T) {
	gated, open := compile(t, gatedPolicy), compile(t, `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: open}
spec: {defaultAction: reject, dns: {names: ungated}}
`)
	var rules atomic.Pointer[policy.Rules]
	rules.Store(gated)
	g := newGate(t, gatedPolicy, says("an pypi.test. 60 A 198.51.100.1"), func(c *Config) {
		c.OnlyGated, c.Rules = true, rules.Load
	})
	if a := packet(g.Resolver, ask(t, "pypi.test", dns.TypeA)); a == nil || len(unpack(t, a).Answer) != 1 {
		t.Errorf("while names are gated: %x", a)
	}
	near, far := net.Pipe()
	served := make(chan struct{})
	go func() { // ends with the connection
		defer close(served)
		g.ServeStream(context.Background(), far, func(policy.Outcome) {})
	}()
	overTCP := func() error {
		go near.Write(prefixed(ask(t, "pypi.test", dns.TypeA)))
		_, err := readPrefixed(near)
		return err
	}
	if err := overTCP(); err != nil {
		t.Errorf("over TCP: %v", err)
	}
	asked := len(g.net.dialled())
	rules.Store(open)
	if err := overTCP(); err != io.EOF {
		t.Errorf("an open connection: %v, want that it is closed", err)
	}
	<-served
	for _, name := range []string{"pypi.test", "evil.test", "localhost"} {
		if a := packet(g.Resolver, ask(t, name, dns.TypeA)); a != nil {
			t.Errorf("%s is answered: %v", name, unpack(t, a))
		}
	}
	if n := len(g.net.dialled()); n != asked {
		t.Errorf("%d questions went upstream", n-asked)
	}
	if n := g.Stats().Ungated; n != 4 {
		t.Errorf("%d counted, want 4", n)
	}
}

func TestOnlyGatedNeedsNoServersUntilItIsAsked(t *testing.T) {
	var log bytes.Buffer
	g := newGate(t, gatedPolicy, nil, func(c *Config) {
		c.OnlyGated, c.Upstreams, c.Log = true, Upstreams{}, slog.New(slog.NewTextHandler(&log, nil))
	})
	if log.Len() > 0 {
		t.Errorf("it says %s", &log)
	}
	if a := unpack(t, packet(g.Resolver, ask(t, "pypi.test", dns.TypeA))); a.Rcode != dns.RcodeServerFailure {
		t.Errorf("an allowed name: %v", a)
	}
	if a := unpack(t, packet(g.Resolver, ask(t, "evil.test", dns.TypeA))); a.Rcode != dns.RcodeNameError {
		t.Errorf("a name that no rule has: %v", a)
	}
	if n := len(g.net.dialled()); n != 0 || strings.Contains(log.String(), "resolv.conf") {
		t.Errorf("%d dials; it says %s", n, &log)
	}
}
