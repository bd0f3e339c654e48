package policy

import (
	"net/netip"
	"testing"
)

// TestAPolicyAboutEgressLeavesAPodsIngress has a client outside begin a connection.
func TestAPolicyAboutEgressLeavesAPodsIngress(t *testing.T) {
	const head = "apiVersion: " + APIVersion + "\nkind: " + Kind + "\nmetadata: {name: x}\nspec:\n  defaultAction: drop\n"
	const egress = "  egress: [{action: allow, to: [{cidr: 198.51.100.0/24}]}]\n"
	for _, row := range []struct {
		name, text      string
		inPod, anywhere string // the rule that decides
		allowed         bool   // in a pod
	}{
		{"nothing is allowed", head, "default", "default", false},
		{"egress alone", head + egress, "ingress[0] not-in-policy", "default", true},
		{"no egress rule", head + "  egress: []\n", "default", "default", false},
		{"ingress without a rule", head + egress + "  ingress: []\n", "default", "default", false},
		{"ingress rules", head + egress + "  ingress: [{action: allow, from: [{cidr: 203.0.113.0/24}]}]\n", "default", "default", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			p, err := Parse("p", []byte(row.text))
			if err != nil {
				t.Fatal(err)
			}
			q := Query{Proto: 6, Ingress: true, Src: netip.MustParseAddrPort("192.0.2.9:5000"), Dst: netip.MustParseAddrPort("10.88.0.3:80")}
			for _, where := range []struct {
				env     Environment
				rule    string
				allowed bool
			}{{Environment{OpenIngress: true}, row.inPod, row.allowed}, {Environment{}, row.anywhere, false}} {
				x, err := Explain(p, where.env, q)
				if err != nil {
					t.Fatal(err)
				}
				if x.Verdict.Rule() != where.rule || x.Verdict.Allowed() != where.allowed {
					t.Errorf("in a pod %v: %s decides, allowed %v; want %s, %v", where.env.OpenIngress, x.Verdict.Rule(), x.Verdict.Allowed(), where.rule, where.allowed)
				}
				out := Query{Proto: 6, Src: q.Dst, Dst: netip.MustParseAddrPort("203.0.113.5:80")}
				if x, err = Explain(p, where.env, out); err != nil || x.Verdict.Allowed() {
					t.Errorf("egress: %+v (%v)", x, err)
				}
			}
		})
	}
}
