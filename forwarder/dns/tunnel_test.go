package dns

import (
	"crypto/rand"
	"encoding/base32"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

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
		{"a label that is too long does not", "*.a.test", strings.Repeat("a", tunnelLabel+1) + ".a.test", tunnelTooLong},
		{"one that is just short enough does", "*.a.test", strings.Repeat("a", tunnelLabel) + ".a.test", tunnelOpen},
		{"many labels that are too long together do not", "**.a.test", strings.Repeat("abcdefghi.", 11) + "a.test", tunnelTooLong},
		{"what looks encoded does not", "**.a.test", encoded[:50] + "." + encoded[50:95] + ".a.test", tunnelRandom},
		{"an exact name is what it is", strings.Repeat("a", 63) + ".test", strings.Repeat("a", 63) + ".test", tunnelOpen},
		{"without a pattern all but the last two labels count", "", encoded[:50] + "." + encoded[50:95] + ".evil.io", tunnelRandom},
	}
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			var b tunnels
			if got := b.admit(row.pattern, row.name, time.Unix(0, 0)); got != row.want {
				t.Errorf("%s: %q, want %q", row.name, got, row.want)
			}
		})
	}
}

func TestTunnelNames(t *testing.T) {
	var b tunnels
	now := time.Unix(0, 0)
	ask := func(pattern string, i int) tunnelReason {
		return b.admit(pattern, fmt.Sprintf("n%d%s", i, strings.TrimLeft(pattern, "*")), now)
	}
	for i := range tunnelNames {
		if r := ask("*.a.test", i); r != tunnelOpen {
			t.Fatalf("name %d: %s", i, r)
		}
	}
	if r := ask("*.a.test", tunnelNames); r != tunnelTooMany {
		t.Errorf("one more in a minute: %q", r)
	}
	if r := ask("*.a.test", 7); r != tunnelOpen {
		t.Errorf("a name asked for before: %q", r)
	}
	if r := ask("*.b.test", tunnelNames); r != tunnelOpen {
		t.Errorf("another pattern: %q", r)
	}
	now = now.Add(tunnelMinute)
	for i := range tunnelNames { // those of the last minute cost nothing, as many new ones pass
		if r := ask("*.a.test", tunnelNames+i); r != tunnelOpen {
			t.Fatalf("name %d in the next minute: %s", i, r)
		}
		if r := ask("*.a.test", i); r != tunnelOpen {
			t.Fatalf("name %d again in the next minute: %s", i, r)
		}
	}
	if r := ask("*.a.test", 2*tunnelNames); r != tunnelTooMany {
		t.Errorf("one more in the next minute: %q", r)
	}
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

// A tunnel under an allowed wildcard, as iodine and dnscat2 make them: what gets
// out in a minute is bounded.
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
	if s := g.Stats(); out > tunnelNames*tunnelPart || s.RefusedTunnel != 2000-tunnelNames {
		t.Errorf("%d bytes got out, %d questions were refused", out, s.RefusedTunnel)
	}
}
