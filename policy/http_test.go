package policy

import (
	"net/netip"
	"testing"
)

func TestRequestsAreJudgedByMethodAndPath(t *testing.T) {
	rule := Rule{Name: "api", Action: Allow, To: []Peer{{CIDR: cidr("198.51.100.0/24")}, {Domain: "pypi.org"}}, Ports: []Port{{Protocol: TCP, Port: 80}}, HTTP: []HTTPMatch{
		{Methods: []string{"GET", "HEAD"}, Path: "/public/*"},
		{Methods: []string{"POST"}, Path: "/jobs"},
		{Path: "/open/*"},
		{Methods: []string{"OPTIONS"}},
	}}
	rules := mustCompile(t, allowing(rule, Rule{Action: Allow}), here)
	tests := []struct {
		method, path string
		allowed      bool
	}{
		{"GET", "/public/", true}, {"HEAD", "/public/a/b", true}, {"GET", "/public/a?b=/../c", true}, {"GET", "/public/a%20b", true}, {"GET", "/public//a", true},
		{"POST", "/jobs", true}, {"POST", "/jobs?x", true}, {"DELETE", "/open/x", true}, {"OPTIONS", "*", true}, {"OPTIONS", "/any", true},
		{"GET", "/public", false}, {"GET", "/publicity", false}, {"POST", "/public/", false}, {"get", "/public/", false}, {"GET", "/PUBLIC/", false},
		{"POST", "/jobs/", false}, {"POST", "/jobs/1", false}, {"GET", "/", false}, {"GET", "", false}, {"GET", "*", false},
		// What a server may read as another path matches nothing.
		{"GET", "/public/../admin", false}, {"GET", "/public/./a", false}, {"GET", "/public/..", false}, {"GET", "/public/%2e%2e/admin", false}, {"GET", "/public/%2E./admin", false},
		{"GET", "/public/%252e%252e/admin", false}, {"GET", "/public/..%2fadmin", false}, {"GET", "/public/a%2fb", false}, {"GET", "/public/a%252fb", false},
		{"GET", "/public/..;x=1/admin", false}, {"GET", `/public/..\admin`, false}, {"GET", "/public/%5cadmin", false}, {"GET", "/public/%zz", false}, {"GET", "/public/%00", false}, {"GET", "/public/%25252e", false},
		{"GET", "http://198.51.100.1/public/", false}, {"GET", "public/", false},
		{"CONNECT", "", false}, {"CONNECT", "/open/", false},
	}
	q := Query{Proto: uint8(TCP), Dst: netip.MustParseAddrPort("198.51.100.1:80"), Names: granted(t), Now: now}
	if v := rules.Decide(q); v.Verify() != VerifyRequest || v.Allowed() {
		t.Errorf("before a request: %v", v)
	}
	for _, tt := range tests {
		q.Seen = Seen{Kind: SeenHTTP, Name: "pypi.org", Method: tt.method, Path: tt.path}
		v := rules.Decide(q)
		if v.Allowed() != tt.allowed || v.Rule() != "egress[0] api" || tt.allowed != v.EachRequest() || !tt.allowed && v.Reason() != ReasonRequest {
			t.Errorf("%s %q: %v, reason %q; want allowed %v", tt.method, tt.path, v, v.Reason(), tt.allowed)
		}
	}
	q.Seen = tls("pypi.org")
	if v := rules.Decide(q); v.Allowed() || v.Reason() != ReasonNotHTTP || v.Rule() != "egress[0] api" {
		t.Errorf("TLS at a rule with http: %v, reason %q", v, v.Reason())
	}

	q.Seen = Seen{Kind: SeenHTTP, Name: "pypi.org", Method: "GET", Path: "/public/", Override: true}
	if v := rules.Decide(q); v.Allowed() || v.Reason() != ReasonOverride || v.Rule() != "egress[0] api" {
		t.Errorf("a field that overrides the request: %v, reason %q", v, v.Reason())
	}

	tunnel := with(rule, func(r *Rule) { r.HTTP = []HTTPMatch{{Methods: []string{"CONNECT"}}} })
	q.Seen = Seen{Kind: SeenHTTP, Name: "example.com", Method: "CONNECT"}
	if v := mustCompile(t, allowing(tunnel), here).Decide(q); !v.Allowed() {
		t.Errorf("CONNECT where it is listed: %v", v)
	}
}
