package policy_test

import (
	"fmt"
	"net/netip"
	"time"

	"sluice.dev/sluice/policy"
)

// web is the policy of the examples below.
const web = `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: web}
spec:
  egress:
    - name: no-smtp
      action: drop
      ports: [{protocol: TCP, port: 25}]
    - name: docs
      action: allow
      to: [{cidr: 203.0.113.0/24}]
      ports: [{protocol: TCP, port: 443}]
`

func Example() {
	p, err := policy.Parse("web.yaml", []byte(web))
	if err != nil {
		fmt.Println(err)
		return
	}
	rules, err := policy.Compile(p, policy.Environment{})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(rules.Decide(policy.Query{
		Proto: uint8(policy.TCP),
		Src:   netip.MustParseAddrPort("10.0.0.2:40000"),
		Dst:   netip.MustParseAddrPort("203.0.113.7:443"),
	}))
	// Output: allow TCP to 203.0.113.7:443 by egress[1] docs
}

// A mistake is reported with its place in the file, and nothing is loaded.
func ExampleParse() {
	_, err := policy.Parse("web.yaml", []byte(`apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: web}
spec:
  egress:
    - action: allow
      to: [{cidr: 203.0.113.7/24}]
      port: 443
`))
	fmt.Println(err)
	// Output:
	// web.yaml:7:19: cidr 203.0.113.7/24 has bits set after the prefix; expected 203.0.113.0/24 for the network, or 203.0.113.7/32 for the one address
	// web.yaml:8:7: egress[0] has no field "port"; did you mean ports? (expected one of name, action, to, ports, icmp, verify, missingName, ech, quic, privateAddresses, http, limits)
}

// The first rule that matches decides. A flow that none matches is refused, and a special
// address is refused even by a rule that allows the world.
func ExampleRules_Decide() {
	p, err := policy.Parse("world.yaml", []byte(`apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: world}
spec:
  egress:
    - {name: no-smtp, action: drop, ports: [{protocol: TCP, port: 25}]}
    - {name: web, action: allow, to: [{cidr: 0.0.0.0/0}], ports: [{protocol: TCP, port: 80}, {protocol: TCP, port: 443}]}
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	rules, err := policy.Compile(p, policy.Environment{})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, dst := range []string{"203.0.113.7:443", "203.0.113.7:25", "203.0.113.7:22", "169.254.169.254:80"} {
		v := rules.Decide(policy.Query{
			Proto: uint8(policy.TCP),
			Src:   netip.MustParseAddrPort("10.0.0.2:40000"),
			Dst:   netip.MustParseAddrPort(dst),
		})
		fmt.Printf("%-18s %v\n", dst, v)
	}

	// Rules that are missing deny.
	var none *policy.Rules
	fmt.Println(none.Decide(policy.Query{Proto: uint8(policy.TCP)}).Allowed())
	// Output:
	// 203.0.113.7:443    allow TCP to 203.0.113.7:443 by egress[1] web
	// 203.0.113.7:25     drop TCP by egress[0] no-smtp
	// 203.0.113.7:22     reject TCP by default
	// 169.254.169.254:80 reject TCP by special:metadata
	// false
}

// A rule by domain allows the addresses that a DNS answer granted to the sandbox, for as long
// as the answer is valid. A TCP flow to such an address must say the name in its first bytes.
func ExampleRules_Decide_domain() {
	p, err := policy.Parse("pypi.yaml", []byte(`apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: pypi}
spec:
  egress:
    - {name: pypi, action: allow, to: [{domain: pypi.org}], ports: [{protocol: TCP, port: 443}]}
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	rules, err := policy.Compile(p, policy.Environment{})
	if err != nil {
		fmt.Println(err)
		return
	}
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	names := policy.NewNames(policy.NamesConfig{})
	addr := netip.MustParseAddr("203.0.113.7")
	q := policy.Query{
		Proto: uint8(policy.TCP),
		Src:   netip.MustParseAddrPort("10.0.0.2:40000"),
		Dst:   netip.AddrPortFrom(addr, 443),
		Names: names,
		Now:   now,
	}
	fmt.Println("before the answer:", rules.Decide(q))

	if err := names.Grant("pypi.org", []netip.Addr{addr}, time.Minute, now); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("after it:", rules.Decide(q))

	q.Seen = policy.Seen{Kind: policy.SeenTLS, Name: "pypi.org"}
	fmt.Println("pypi.org said:", rules.Decide(q))

	q.Seen.Name = "example.com"
	fmt.Println("example.com said:", rules.Decide(q))
	// Output:
	// before the answer: reject TCP by default
	// after it: read first-bytes TCP for egress[0] pypi
	// pypi.org said: allow TCP to 203.0.113.7:443 by egress[0] pypi
	// example.com said: reject TCP by default
}

// Explain asks each rule in turn and says why it did or did not match.
func ExampleExplain() {
	p, err := policy.Parse("web.yaml", []byte(web))
	if err != nil {
		fmt.Println(err)
		return
	}
	x, err := policy.Explain(p, policy.Environment{}, policy.Query{
		Proto: uint8(policy.TCP),
		Src:   netip.MustParseAddrPort("10.0.0.2:40000"),
		Dst:   netip.MustParseAddrPort("203.0.113.7:8443"),
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(x.Verdict)
	for _, step := range x.Steps {
		fmt.Printf("%s: %s\n", step.Rule, step.Why)
	}
	// Output:
	// reject TCP by default
	// egress[0] no-smtp: it does not list this protocol and port
	// egress[1] docs: it does not list this protocol and port
	// default: no rule matches
}
