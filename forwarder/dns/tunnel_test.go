package dns

import (
	"crypto/rand"
	"encoding/base32"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

// defaults are the bounds of a policy that sets none.
var defaults = policy.DNS{
	MaxLabelLength: policy.DefaultMaxLabelLength, MaxWildcardLength: policy.DefaultMaxWildcardLength,
	MaxWildcardEntropy: policy.DefaultMaxWildcardEntropy, MaxNamesPerMinute: policy.DefaultMaxNamesPerMinute,
}

func TestTunnelBounds(t *testing.T) {
	random := make([]byte, 80)
	for i := range random {
		random[i] = byte(i*167 + 13)
	}
	encoded := strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(random))
	rows := []struct {
		about, pattern, name string
		want                 tunnelReason
	}{
		{"a word passes", "*.a.test", "www.a.test", tunnelOpen},
		{"a load balancer's name passes", "**.aws.test", "k8s-ingressn-ingressn-1a2b3c4d5e-0123456789abcdef.elb.us-east-1.aws.test", tunnelOpen},
		{"a hash passes", "*.a.test", "d41d8cd98f00b204e9800998ecf8427e.a.test", tunnelOpen},
		{"a UUID passes", "*.a.test", "6ba7b810-9dad-11d1-80b4-00c04fd430c8.a.test", tunnelOpen},
		{"a label that is too long does not", "*.a.test", strings.Repeat("a", policy.DefaultMaxLabelLength+1) + ".a.test", tunnelTooLong},
		{"one that is just short enough does", "*.a.test", strings.Repeat("a", policy.DefaultMaxLabelLength) + ".a.test", tunnelOpen},
		{"many labels that are too long together do not", "**.a.test", strings.Repeat("abcdefghi.", 11) + "a.test", tunnelTooLong},
		{"what looks encoded does not", "**.a.test", encoded[:50] + "." + encoded[50:95] + ".a.test", tunnelRandom},
		{"an exact name is what it is", strings.Repeat("a", 63) + ".test", strings.Repeat("a", 63) + ".test", tunnelOpen},
		{"without a pattern all but the last two labels count", "", encoded[:50] + "." + encoded[50:95] + ".evil.io", tunnelRandom},
	}
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			var b tunnels
			if got := b.admit(defaults, row.pattern, row.name, time.Unix(0, 0)); got != row.want {
				t.Errorf("%s: %q, want %q", row.name, got, row.want)
			}
		})
	}
}

func TestTunnelNames(t *testing.T) {
	var b tunnels
	now := time.Unix(0, 0)
	ask := func(pattern string, i int) tunnelReason {
		return b.admit(defaults, pattern, fmt.Sprintf("n%d%s", i, strings.TrimLeft(pattern, "*")), now)
	}
	for i := range policy.DefaultMaxNamesPerMinute {
		if r := ask("*.a.test", i); r != tunnelOpen {
			t.Fatalf("name %d: %s", i, r)
		}
	}
	if r := ask("*.a.test", policy.DefaultMaxNamesPerMinute); r != tunnelTooMany {
		t.Errorf("one more in a minute: %q", r)
	}
	if r := ask("*.a.test", 7); r != tunnelOpen {
		t.Errorf("a name asked for before: %q", r)
	}
	if r := ask("*.b.test", policy.DefaultMaxNamesPerMinute); r != tunnelOpen {
		t.Errorf("another pattern: %q", r)
	}
	now = now.Add(tunnelMinute)
	for i := range policy.DefaultMaxNamesPerMinute { // names of the last minute cost nothing, so as many new ones pass
		if r := ask("*.a.test", policy.DefaultMaxNamesPerMinute+i); r != tunnelOpen {
			t.Fatalf("name %d in the next minute: %s", i, r)
		}
		if i == 0 { // room for one more question
			continue
		}
		if r := ask("*.a.test", i); r != tunnelOpen {
			t.Fatalf("name %d again in the next minute: %s", i, r)
		}
	}
	if r := ask("*.a.test", 2*policy.DefaultMaxNamesPerMinute); r != tunnelTooMany {
		t.Errorf("one more in the next minute: %q", r)
	}
	if r := ask("*.a.test", 0); r != tunnelOpen {
		t.Errorf("the last question: %q", r)
	}
	if r := ask("*.a.test", 0); r != tunnelQuestions {
		t.Errorf("a known name once more than there are questions: %q", r)
	}
	now = now.Add(tunnelMinute)
	for i := range tunnelPatterns + 10 {
		ask(fmt.Sprintf("*.p%d.test", i), 0)
	}
	if n := len(b.patterns); n != tunnelPatterns {
		t.Errorf("%d patterns are remembered", n)
	}
	now = now.Add(2 * tunnelMinute)
	if r := ask("*.late.test", 0); r != tunnelOpen || len(b.patterns) != 1 {
		t.Errorf("after all are old: %q, %d remembered", r, len(b.patterns))
	}
}

// The policy's settings apply.
func TestTunnelBoundsAreThePolicys(t *testing.T) {
	g := newGate(t, gatedPolicy+"  dns: {maxLabelLength: 10, maxWildcardLength: 15, maxWildcardEntropy: 1, maxNamesPerMinute: 3}\n", says())
	for i, row := range []struct {
		name    string
		refused uint64
	}{
		{"abcdefghijk.deep.test", 1}, {"abcdefgh.abcdefg.deep.test", 2}, {"abcdefghij.deep.test", 2}, {"b.deep.test", 2}, {"c.deep.test", 2}, {"d.deep.test", 3},
	} {
		packet(g.Resolver, ask(t, row.name, dns.TypeA))
		if n := g.Stats().RefusedTunnel; n != row.refused {
			t.Errorf("%d: after %s, %d are refused, not %d", i, row.name, n, row.refused)
		}
	}
	wide := newGate(t, gatedPolicy+"  dns: {maxLabelLength: 63, maxWildcardLength: 253, maxWildcardEntropy: 1}\n", says())
	packet(wide.Resolver, ask(t, strings.Repeat("ab", 30)+".deep.test", dns.TypeA))
	packet(wide.Resolver, ask(t, strings.Repeat("a", 60)+".deep.test", dns.TypeA))
	if n := wide.Stats().RefusedTunnel; n != 1 {
		t.Errorf("of two long names under one bit of entropy, %d are refused, not one", n)
	}
}

// A tunnel under an allowed wildcard, as iodine and dnscat2 make them: its bytes out in a minute
// are bounded.
func TestATunnelIsNarrow(t *testing.T) {
	out := 0
	g := newGate(t, gatedPolicy+"  limits: {dnsQueriesPerSecond: 1000000}\n", func(q []byte) [][]byte {
		out += len(unpack(t, q).Question[0].Name) - len(".deep.test.")
		return says()(q)
	})
	for range 2000 {
		random := make([]byte, 20)
		rand.Read(random)
		packet(g.Resolver, ask(t, fmt.Sprintf("%x.%x.deep.test", random[:10], random[10:]), dns.TypeA))
	}
	if s := g.Stats(); out > policy.DefaultMaxNamesPerMinute*policy.DefaultMaxWildcardLength || s.RefusedTunnel != 2000-policy.DefaultMaxNamesPerMinute {
		t.Errorf("%d bytes got out, %d questions were refused", out, s.RefusedTunnel)
	}
}
