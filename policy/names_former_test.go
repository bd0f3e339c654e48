package policy

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// Who keeps an address longer than its grant holds is told so, and by which rule it would pass.
func TestARefusalSaysThatTheGrantIsOver(t *testing.T) {
	const text = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: former}
spec:
  defaultAction: reject
  egress:
  - {name: not, action: reject, to: [{domain: bad.example}]}
  - {name: a, action: allow, to: [{domain: a.example}], ports: [{protocol: TCP, port: 443}]}
  - {name: b, action: allow, to: [{domain: "*.b.example"}]}
`
	p, err := Parse("former.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	rules := mustCompile(t, p, Environment{})
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	addr, elsewhere := netip.MustParseAddr("203.0.113.5"), netip.MustParseAddr("203.0.113.6")
	grant := func(n *Names, name string, a netip.Addr, at time.Time) {
		t.Helper()
		if err := n.Grant(name, []netip.Addr{a}, time.Minute, at); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(n *Names, to netip.Addr, port uint16, at time.Time) string {
		v := rules.Decide(Query{Proto: uint8(TCP), Src: netip.MustParseAddrPort("10.0.2.100:1"), Dst: netip.AddrPortFrom(to, port), Names: n, Now: at})
		if v.Allowed() {
			t.Errorf("%v is allowed", to)
		}
		if v.Verify() != VerifyNone {
			return "waits"
		}
		return fmt.Sprint(v.Tried(), " ", v.Reason())
	}
	for _, row := range []struct {
		what string
		make func(*Names)
		port uint16
		want string
	}{
		{"it never was granted", func(*Names) {}, 443, " "},
		{"it is granted", func(n *Names) { grant(n, "a.example", addr, start) }, 443, "waits"},
		{"the grant ran out", func(n *Names) { grant(n, "a.example", addr, start.Add(-2*time.Minute)) }, 443, "egress[1] a grant-expired"},
		{"it ran out, and another was made since", func(n *Names) {
			grant(n, "a.example", addr, start.Add(-2*time.Minute))
			grant(n, "a.example", elsewhere, start)
		}, 443, "egress[1] a grant-expired"},
		{"it ran out, and was for another port", func(n *Names) { grant(n, "a.example", addr, start.Add(-2*time.Minute)) }, 80, " "},
		{"it ran out, and is granted under a name of no rule", func(n *Names) {
			grant(n, "a.example", addr, start.Add(-2*time.Minute))
			grant(n, "other.example", addr, start)
		}, 443, "egress[1] a grant-expired"},
		{"two ran out", func(n *Names) {
			grant(n, "x.b.example", addr, start.Add(-2*time.Minute))
			grant(n, "a.example", addr, start.Add(-2*time.Minute))
		}, 443, "egress[1] a grant-expired"},
		{"it was of a name that is refused", func(n *Names) { grant(n, "bad.example", addr, start.Add(-2*time.Minute)) }, 443, " "},
		{"newer grants took its place", func(n *Names) {
			grant(n, "a.example", addr, start.Add(-time.Second))
			for i := range MaxNamesPerAddress {
				grant(n, fmt.Sprintf("n%d.example", i), addr, start)
			}
		}, 443, "egress[1] a grant-evicted"},
		{"so many were made since that it is forgotten", func(n *Names) {
			grant(n, "a.example", addr, start.Add(-time.Hour))
			for i := range maxFormer + 1 {
				grant(n, fmt.Sprintf("n%d.example", i), elsewhere, start.Add(-time.Hour+time.Duration(i+1)*2*time.Minute))
			}
		}, 443, " "},
	} {
		t.Run(row.what, func(t *testing.T) {
			n := NewNames(NamesConfig{})
			row.make(n)
			if got := ask(n, addr, row.port, start); got != row.want {
				t.Errorf("refused by %q, want %q", got, row.want)
			}
			if len(n.gone.ring) > maxFormer || len(n.gone.count) > maxFormer {
				t.Errorf("%d former grants are remembered", len(n.gone.ring))
			}
		})
	}
}
