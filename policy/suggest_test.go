package policy

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
)

func TestSuggestMakesATightPolicy(t *testing.T) {
	tcp := func(peer string, port uint16, said string, names ...string) Observed {
		return Observed{Proto: uint8(TCP), Peer: addr(peer), Port: port, Said: said, Names: names}
	}
	flows := []Observed{
		tcp("198.51.100.1", 443, "pypi.org", "pypi.org"),
		tcp("198.51.100.1", 443, "PyPI.org", "other.org", "pypi.org"),
		tcp("198.51.100.2", 443, "files.test", "files.test"),
		tcp("198.51.100.2", 22, "", "files.test"),            // ssh says no name
		tcp("198.51.100.2", 8443, "", "files.test"),          // nor does this, where one is asked for
		tcp("198.51.100.1", 80, "", "other.org", "pypi.org"), // of two names, the one that was said elsewhere
		{Proto: uint8(UDP), Peer: addr("198.51.100.2"), Port: 443, Said: "files.test", Names: []string{"files.test"}, ECH: true},
		tcp("10.1.1.1", 443, "nas.test", "nas.test"),
		tcp("203.0.113.7", 5000, ""),
		tcp("203.0.113.8", 5000, "unknown.test"),
		{Proto: uint8(ICMPv4), Peer: addr("203.0.113.7"), ICMPType: 8},
		{Proto: uint8(ICMPv6), Peer: addr("2001:db8::9"), ICMPType: 128, Names: []string{"six.test"}},
		{Ingress: true, Proto: uint8(TCP), Peer: addr("192.0.2.77"), Port: 8080},
		{Proto: 47, Peer: addr("203.0.113.7")},
		tcp("127.0.0.1", 80, "", "bad.test"),
		{Proto: uint8(UDP), Peer: addr("198.51.100.53"), Port: 53},
	}
	s, err := Suggest("learnt", flows)
	if err != nil {
		t.Fatal(err)
	}
	text, err := s.Policy.YAML()
	if err != nil {
		t.Fatal(err)
	}
	printsBack(t, s.Policy)
	want := `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata:
  name: learnt
spec:
  defaultAction: reject
  egress:
`
	if !strings.HasPrefix(string(text), want) {
		t.Errorf("got\n%s", text)
	}
	got := make(map[string]string) // what a rule is for → how
	for _, r := range append(s.Policy.Spec.Egress, s.Policy.Spec.Ingress...) {
		var peers []string
		for _, p := range append(r.To, r.From...) {
			if p.Domain != "" {
				peers = append(peers, p.Domain)
			} else {
				peers = append(peers, p.CIDR.String())
			}
		}
		how := strings.Join(spanWords(ruleSpans(&r)), ", ")
		for name, set := range map[string]bool{" verify " + string(r.Verify): r.Verify != "", " private": r.PrivateAddresses != "", " ech": r.ECH != ""} {
			if set {
				how += name
			}
		}
		got[strings.Join(peers, " ")+": "+how] = r.Name
	}
	for _, want := range []string{
		"pypi.org: TCP 443", "pypi.org: TCP 80 verify grant", "files.test: TCP 22, TCP 443", "files.test: TCP 8443 verify grant", "files.test: UDP 443 ech",
		"nas.test: TCP 443 private", "203.0.113.7/32: ICMP type 8, TCP 5000", "203.0.113.8/32: TCP 5000", "six.test: ICMPv6 type 128", "192.0.2.77/32: TCP 8080",
		"198.51.100.53/32: UDP 53",
	} {
		if _, ok := got[want]; !ok {
			t.Errorf("there is no rule for %s", want)
		}
		delete(got, want)
	}
	if len(got) != 0 {
		t.Errorf("rules for more: %v", got)
	}
	skipped := strings.Join(s.Skipped, "\n")
	for _, want := range []string{"protocol 47, which rules can not list", "DNS to other resolvers", "127.0.0.1, which is loopback and never allowed"} {
		if !strings.Contains(skipped, want) {
			t.Errorf("it does not say %q, but\n%s", want, skipped)
		}
	}

	// What did not happen is refused.
	rules := mustCompile(t, s.Policy, here)
	n := granted(t)
	for name, q := range map[string]Query{
		"another name":       {Proto: uint8(TCP), Dst: netip.MustParseAddrPort("198.51.100.1:443"), Names: n, Now: now, Seen: tls("other.org")},
		"another port":       {Proto: uint8(TCP), Dst: netip.MustParseAddrPort("198.51.100.1:444"), Names: n, Now: now, Seen: tls("pypi.org")},
		"another address":    {Proto: uint8(TCP), Dst: netip.MustParseAddrPort("203.0.113.9:5000")},
		"another client":     {Ingress: true, Proto: uint8(TCP), Src: netip.MustParseAddrPort("192.0.2.78:1"), Dst: netip.MustParseAddrPort("10.0.2.100:8080")},
		"another ICMP type":  {Proto: uint8(ICMPv4), Dst: netip.MustParseAddrPort("203.0.113.7:0"), ICMPType: 13},
		"a name not granted": {Proto: uint8(TCP), Dst: netip.MustParseAddrPort("198.51.100.9:443"), Names: n, Now: now, Seen: tls("pypi.org")},
	} {
		if v := rules.Decide(q); v.Allowed() {
			t.Errorf("%s: %v", name, v)
		}
	}
}

// Every flow that a random policy let pass passes the policy suggested of them,
// or is told to be left out.
func TestWhatPassedPassesAgain(t *testing.T) {
	d := dice(rand.New(rand.NewPCG(11, 11)).IntN)
	passed, left := 0, 0
	for range 200 {
		p, names := d.policy(), d.names()
		rules := mustCompile(t, p, Environment{})
		var flows []Observed
		for range 20 {
			q := d.query(names)
			q.Held = ""
			if v := rules.Decide(q); v.Allowed() && !q.Dst.Addr().Is4In6() && q.Seen.Method != "CONNECT" {
				f := Observed{Ingress: q.Ingress, Proto: q.Proto, Peer: q.Dst.Addr(), Port: q.Dst.Port(), ICMPType: q.ICMPType, ICMPCode: q.ICMPCode, Said: q.Seen.Name, ECH: q.Seen.ECH}
				if q.Ingress {
					f.Peer = q.Src.Addr().WithZone("")
				} else {
					f.Names = names.Of(q.Dst.Addr(), q.Now, nil)
				}
				if f.Proto == uint8(ICMPv4) || f.Proto == uint8(ICMPv6) {
					f.Port = 0
				}
				flows = append(flows, f)
			}
		}
		if len(flows) == 0 {
			continue
		}
		s, err := Suggest("again", flows)
		if err != nil {
			t.Fatal(err)
		}
		printsBack(t, s.Policy)
		passed, left = passed+len(flows), left+len(s.Skipped)
		for _, why := range s.Skipped {
			if !strings.Contains(why, "protocol 47") && !strings.Contains(why, "DNS to other resolvers") && !strings.Contains(why, "special:") && !strings.Contains(why, "never allowed") && !strings.Contains(why, "builtin:") {
				t.Errorf("left out: %s", why)
			}
		}
	}
	if passed < 500 || left*4 > passed {
		t.Errorf("%d passed, %d left out", passed, left)
	}
}
