package policy

import (
	"math/rand/v2"
	"strings"
	"testing"
)

var trialPolicy = allowing(
	Rule{Name: "lan", Action: Drop, To: []Peer{{CIDR: cidr("10.0.0.0/8")}}, Ports: []Port{{Protocol: TCP, Port: 25}}},
	with(byDomain("pypi.org", "*.pythonhosted.org"), func(r *Rule) { r.Name, r.Ports = "pypi", []Port{{Protocol: TCP, Port: 443}} }),
	with(byDomain("api.test"), func(r *Rule) {
		r.Name, r.Ports, r.HTTP = "api", []Port{{Protocol: TCP, Port: 80}}, []HTTPMatch{{Methods: []string{"GET"}, Path: "/v1/*"}}
	}),
	Rule{Name: "ssh", Action: Allow, To: []Peer{{CIDR: cidr("198.51.100.0/24")}}, Ports: []Port{{Protocol: TCP, Port: 22}}},
)

// ftpPolicy lets control connections pass, and data to ports from 30000 and 40000 on.
var ftpPolicy = allowing(
	with(byDomain("ftp.test"), func(r *Rule) { r.Name, r.Ports = "control", []Port{{Protocol: TCP, Port: 21}} }),
	with(byDomain("ftp.test"), func(r *Rule) { r.Name, r.Ports = "strict", []Port{{Protocol: TCP, Port: 30000, EndPort: 30009}} }),
	with(byDomain("ftp.test"), func(r *Rule) {
		r.Name, r.Ports, r.Verify = "data", []Port{{Protocol: TCP, Port: 40000, EndPort: 40009}}, VerifyRuleGrant
	}),
)

func TestATrialSaysWhatWouldHappenAndWhy(t *testing.T) {
	said := func(s string) *string { return &s }
	tests := []struct {
		name    string
		trial   Trial
		verdict string   // or the refusal of the name
		steps   []string // parts of each reason
	}{
		{"an allowed name", Trial{Host: "PyPI.org.", Proto: TCP, Port: 443}, "allow TCP to 192.0.2.1:443 by egress[1] pypi",
			[]string{"none of its peers", "it matches by the name pypi.org"}},
		{"a name off the list", Trial{Host: "evil.io", Proto: TCP, Port: 443}, "nxdomain by default", nil},
		{"another port", Trial{Host: "pypi.org", Proto: TCP, Port: 80}, "reject TCP by default",
			[]string{"", "does not list this protocol and port", "none of its peers, and granted as pypi.org, which it does not have", "none of its peers", "no rule matches"}},
		{"another name in the first bytes", Trial{Host: "pypi.org", Proto: TCP, Port: 443, Said: said("evil.io")}, "reject TCP by default",
			[]string{"", "evil.io is not granted for the address, or not of the rule", "none of its peers", "none of its peers", "no rule matches"}},
		{"no name in the first bytes", Trial{Host: "pypi.org", Proto: TCP, Port: 443, Said: said("")}, "reject TCP by default",
			[]string{"", "no name was said (verify: grant would let it pass)", "", "", ""}},
		{"a private address behind it", Trial{Host: "pypi.org", Proto: TCP, Port: 443, Address: addr("10.1.1.1")}, "reject TCP by default",
			[]string{"", "leads to a private address", "", "", "no rule matches"}},
		{"a request", Trial{Host: "api.test", Proto: TCP, Port: 80, Path: "/v1/x"}, "allow TCP to 192.0.2.1:80 by egress[2] api", []string{"", "", "it matches by the name api.test"}},
		{"a request that is not listed", Trial{Host: "api.test", Proto: TCP, Port: 80, Method: "POST"}, "reject TCP by egress[2] api", []string{"", "", "does not list this method and path"}},
		{"an address", Trial{Host: "198.51.100.7", Proto: TCP, Port: 22}, "allow TCP to 198.51.100.7:22 by egress[3] ssh", []string{"none of its peers", "none of its peers, and granted under no name", "", "it matches"}},
		{"metadata", Trial{Host: "169.254.169.254", Proto: TCP, Port: 80}, "reject TCP by special:metadata", []string{"", "", "", "", "a special address"}},
		{"a dropped flow", Trial{Host: "10.2.3.4", Proto: TCP, Port: 25}, "drop TCP by egress[0] lan", []string{"it matches"}},
		{"DNS to a resolver", Trial{Host: "198.51.100.7", Proto: UDP, Port: 53}, "reject UDP by builtin:dns", []string{"", "", "", "", "DNS is answered inside"}},
		{"a client", Trial{Client: addr("203.0.113.1"), Proto: TCP, Port: 80}, "reject TCP by default", []string{"no rule matches"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := tt.trial.Run(trialPolicy, here)
			if err != nil {
				t.Fatal(err)
			}
			got := r.Verdict.String()
			if r.Name != nil && !r.Name.Allowed {
				got = string(r.Name.Refusal) + " by " + r.Name.Rule
			}
			if got != tt.verdict || r.Allowed() != strings.HasPrefix(tt.verdict, "allow") {
				t.Errorf("got %s, want %s", got, tt.verdict)
			}
			if len(r.Steps) != len(tt.steps) {
				t.Fatalf("steps %+v", r.Steps)
			}
			for i, want := range tt.steps {
				if s := r.Steps[i]; !strings.Contains(s.Why, want) || s.Decides != (i == len(tt.steps)-1) {
					t.Errorf("step %d is %+v, want %q", i, s, want)
				}
			}
		})
	}
	for _, row := range []struct {
		port uint16
		step int
		want string
	}{
		{21, 0, "it matches by the name ftp.test"},
		{50000, 0, "port; if this is FTP's data, a rule with verify: grant has to list the server's passive ports"},
		{50000, 1, "it does not list this protocol and port"},
		{80, 0, "it does not list this protocol and port"},
		{30000, 1, "no name was said (verify: grant would let it pass)"},
		{40000, 2, "it matches by the name ftp.test"},
	} {
		r, err := Trial{Host: "ftp.test", Proto: TCP, Port: row.port, Said: said("")}.Run(ftpPolicy, here)
		if err != nil {
			t.Fatal(err)
		}
		if row.step >= len(r.Steps) || !strings.HasSuffix(r.Steps[row.step].Why, row.want) {
			t.Errorf("FTP's server, port %d: %+v, want %q in step %d", row.port, r.Steps, row.want, row.step)
		}
	}
	for _, bad := range []Trial{{Host: "a..b", Proto: TCP, Port: 1}, {Host: "10.0.0.1", Address: addr("10.0.0.2"), Proto: TCP, Port: 1}, {Host: "pypi.org", Proto: TCP, Port: 443, Said: said("a b")}} {
		if _, err := bad.Run(trialPolicy, here); err == nil {
			t.Errorf("%+v is tried", bad)
		}
	}
}

// An explanation never says something else than Decide, and one rule decides.
func TestAnExplanationAgreesWithTheDecision(t *testing.T) {
	d := dice(rand.New(rand.NewPCG(7, 7)).IntN)
	for range 300 {
		p, names := d.policy(), d.names()
		rules := mustCompile(t, p, twinEnv)
		for range 5 {
			q := d.query(names)
			x, err := Explain(p, twinEnv, q)
			if err != nil {
				t.Fatal(err)
			}
			if x.Verdict != rules.Decide(q) {
				t.Fatalf("%+v: explained %v, decided %v", q, x.Verdict, rules.Decide(q))
			}
			for i, s := range x.Steps {
				if s.Decides != (i == len(x.Steps)-1) || s.Why == "" {
					t.Fatalf("%+v: step %d of %+v", q, i, x.Steps)
				}
			}
		}
	}
}
