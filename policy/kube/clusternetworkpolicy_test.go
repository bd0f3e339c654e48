package kube

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	"sluice.dev/sluice/policy"
)

// addCluster adds ClusterNetworkPolicies. A spec without a subject is for every pod.
func (o *objects) addCluster(t *testing.T, specs ...string) {
	t.Helper()
	for i, spec := range specs {
		p := &v1beta1.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: string(rune('a' + i))}}
		p.Spec.Subject.Namespaces = &metav1.LabelSelector{}
		if err := json.Unmarshal([]byte(spec), &p.Spec); err != nil {
			t.Fatal(err)
		}
		o.cluster = append(o.cluster, p)
	}
}

func (o *objects) addNamespaced(t *testing.T, spec string) {
	t.Helper()
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "np"}}
	if err := json.Unmarshal([]byte(spec), &p.Spec); err != nil {
		t.Fatal(err)
	}
	o.policies = append(o.policies, p)
}

func TestClusterNetworkPolicyAsDocumented(t *testing.T) {
	const (
		all     = `{"networks":["0.0.0.0/0","::/0"]}`
		pods    = `{"namespaces":{}}`
		webPods = `{"pods":{"podSelector":{"matchLabels":{"app":"web"}}}}`
		prod    = `{"namespaces":{"matchLabels":{"env":"prod"}}}`
		isolate = `{"podSelector":{},"policyTypes":["Ingress","Egress"]}`
	)
	rule := func(tier, priority, direction, action, peer, more string) string {
		list := map[string]string{"ingress": "from", "egress": "to"}[direction]
		return `{"tier":"` + tier + `","priority":` + priority + `,"` + direction + `":[{"action":"` + action + `","` + list + `":[` + peer + `]` + more + `}]}`
	}
	for _, row := range []struct {
		name       string
		cluster    []string
		namespaced string
		pass, stop []string
	}{
		{"Admin goes before NetworkPolicy", []string{rule("Admin", "1", "ingress", "Accept", webPods, ""), rule("Admin", "2", "egress", "Deny", prod, "")}, `{"podSelector":{},"ingress":[],"egress":[{}]}`,
			[]string{"from 10.244.1.11 TCP 1", "from 10.244.2.20 TCP 1", "to 10.244.1.11 TCP 1"}, []string{"to 10.244.2.20 TCP 1", "from 10.244.2.12 TCP 1"}},
		{"NetworkPolicy goes before Baseline", []string{rule("Baseline", "1", "ingress", "Deny", pods, "")}, `{"podSelector":{},"ingress":[{"from":[{"podSelector":{}}]}]}`,
			[]string{"from 10.244.1.11 TCP 1"}, []string{"from 10.244.2.20 TCP 1"}},
		{"Baseline decides for a pod that no NetworkPolicy isolates", []string{rule("Baseline", "1", "ingress", "Deny", prod, ""), rule("Baseline", "2", "ingress", "Accept", pods, "")}, `{"podSelector":{},"policyTypes":["Egress"]}`,
			[]string{"from 10.244.1.11 TCP 1", "from 198.51.100.7 TCP 1"}, []string{"from 10.244.2.20 TCP 1"}},
		{"the lower priority value goes first", []string{rule("Admin", "5", "ingress", "Deny", pods, ""), rule("Admin", "4", "ingress", "Accept", webPods, "")}, "",
			[]string{"from 10.244.1.11 TCP 1", "from 10.244.2.20 TCP 1"}, []string{"from 10.244.2.12 TCP 1"}},
		{"rules of one policy go in their order", []string{`{"tier":"Admin","egress":[{"action":"Accept","to":[` + webPods + `]},{"action":"Deny","to":[` + pods + `]}]}`}, "",
			[]string{"to 10.244.1.11 TCP 1", "to 198.51.100.7 TCP 1"}, []string{"to 10.244.2.21 TCP 1"}},
		{"Pass skips the rest of Admin", []string{rule("Admin", "1", "ingress", "Pass", webPods, ""), rule("Admin", "2", "ingress", "Deny", pods, "")}, `{"podSelector":{},"ingress":[{"from":[{"namespaceSelector":{"matchLabels":{"env":"prod"}}}]}]}`,
			[]string{"from 10.244.2.20 TCP 1"}, []string{"from 10.244.1.11 TCP 1", "from 10.244.2.21 TCP 1", "from 198.51.100.7 TCP 1"}},
		{"Pass of some ports skips the rest of Admin for these", []string{rule("Admin", "1", "ingress", "Pass", webPods, `,"protocols":[{"tcp":{"destinationPort":{"range":{"start":80,"end":90}}}}]`), rule("Admin", "2", "ingress", "Deny", pods, "")}, `{"podSelector":{},"ingress":[{"ports":[{"port":85,"endPort":100}]}]}`,
			[]string{"from 10.244.1.11 TCP 85", "from 10.244.1.11 TCP 90"}, []string{"from 10.244.1.11 TCP 80", "from 10.244.1.11 TCP 91", "from 10.244.2.21 TCP 85"}},
		{"Pass of pods before networks leaves pods to the lower tiers", []string{rule("Admin", "1", "egress", "Pass", pods, ""), rule("Admin", "2", "egress", "Deny", all, "")}, "",
			[]string{"to 10.244.2.21 TCP 1"}, []string{"to 198.51.100.7 TCP 1", "to 2001:db8::7 TCP 1", "to 192.0.2.11 TCP 1"}},
		{"Pass to Baseline where nothing isolates", []string{rule("Admin", "1", "egress", "Pass", pods, ""), rule("Admin", "2", "egress", "Deny", all, ""), rule("Baseline", "1", "egress", "Deny", prod, "")}, "",
			[]string{"to 10.244.1.11 TCP 1"}, []string{"to 10.244.2.21 TCP 1", "to 198.51.100.7 TCP 1"}},
		{"Pass opens nothing that the tier below would not", []string{rule("Admin", "1", "egress", "Pass", `{"networks":["169.254.169.254/32"]}`, ""), rule("Admin", "2", "egress", "Accept", `{"networks":["169.254.169.254/32"]}`, "")}, `{"podSelector":{},"egress":[{"to":[{"ipBlock":{"cidr":"0.0.0.0/0"}}]}]}`,
			[]string{"to 198.51.100.7 TCP 1"}, []string{"to 169.254.169.254 TCP 80"}},
		{"nor does it leave what is special to the rest of Admin", []string{rule("Admin", "1", "egress", "Pass", `{"networks":["169.254.169.254/32"]}`, ""), rule("Admin", "2", "egress", "Accept", `{"networks":["169.254.169.254/32"]}`, "")}, "",
			[]string{"to 198.51.100.7 TCP 1"}, []string{"to 169.254.169.254 TCP 80"}},
		{"networks around everything keep what is named beside them", []string{rule("Admin", "1", "egress", "Accept", `{"networks":["0.0.0.0/0","::/0","169.254.169.254/32"]}`, "")}, isolate,
			[]string{"to 198.51.100.7 TCP 1", "to 2001:db8::7 TCP 1", "to 169.254.169.254 TCP 80"}, nil},
		{"Pass of a network leaves the pods in it to the lower tiers", []string{rule("Admin", "1", "egress", "Pass", `{"networks":["10.244.1.0/24"]}`, ""), rule("Admin", "2", "egress", "Deny", pods, "")}, `{"podSelector":{},"egress":[{"to":[{"namespaceSelector":{}}]}]}`,
			[]string{"to 10.244.1.11 TCP 1"}, []string{"to 10.244.2.21 TCP 1", "to 10.244.1.12 TCP 1"}},
		{"Pass in Baseline is what holds without policies", []string{rule("Baseline", "1", "egress", "Pass", webPods, ""), rule("Baseline", "2", "egress", "Deny", pods, "")}, "",
			[]string{"to 10.244.1.11 TCP 1"}, []string{"to 10.244.2.21 TCP 1"}},
		{"and opens no more than that", []string{rule("Baseline", "1", "egress", "Pass", `{"networks":["169.254.169.254/32","198.51.100.0/24"]}`, "")}, "",
			[]string{"to 198.51.100.7 TCP 1"}, []string{"to 169.254.169.254 TCP 80"}},
		{"nodes are peers by the addresses in their status", []string{rule("Admin", "1", "egress", "Deny", `{"nodes":{"matchLabels":{"zone":"b"}}}`, "")}, "",
			[]string{"to 192.0.2.11 TCP 1"}, []string{"to 192.0.2.12 TCP 1"}},
		{"nodes are accepted, the pod's own too", []string{rule("Admin", "1", "egress", "Accept", `{"nodes":{}}`, "")}, isolate, []string{"to 192.0.2.11 TCP 1", "to 192.0.2.12 TCP 1"}, []string{"to 10.244.1.1 TCP 1"}},
		{"networks match what is inside the cluster too", []string{rule("Admin", "1", "egress", "Deny", `{"networks":["10.0.0.0/8"]}`, "")}, "", []string{"to 198.51.100.7 TCP 1"}, []string{"to 10.244.1.11 TCP 1"}},
		{"a named port is each destination's own, of whichever protocol", []string{rule("Admin", "1", "egress", "Accept", pods, `,"protocols":[{"destinationNamedPort":"http"}]`)}, isolate,
			[]string{"to 10.244.1.11 TCP 80", "to 10.244.2.12 TCP 8080"}, []string{"to 10.244.2.12 TCP 80", "to 10.244.1.11 UDP 80"}},
		{"a deny of pods does not keep out their node's probes", []string{rule("Admin", "1", "ingress", "Deny", `{"namespaces":{}}`, "")}, "", []string{"from 192.0.2.11 TCP 1", "from 192.0.2.12 TCP 1"}, []string{"from 10.244.1.11 TCP 1"}},
		{"a subject by namespace and labels", []string{`{"tier":"Admin","subject":{"namespaces":null,"pods":{"namespaceSelector":{"matchLabels":{"env":"prod"}},"podSelector":{}}},"ingress":[{"action":"Deny","from":[` + pods + `]}]}`}, "", []string{"from 10.244.1.11 TCP 1"}, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			o := town()
			o.addCluster(t, row.cluster...)
			if row.namespaced != "" {
				o.addNamespaced(t, row.namespaced)
			}
			o.check(t, row.pass, row.stop)
		})
	}
}

// Anything that a newer version of the API may add is as good as denied.
func TestAnUnknownClusterNetworkPolicyFailsClosed(t *testing.T) {
	in := func(action, rest string) string {
		return `{"tier":"Admin","egress":[{"action":"` + action + `",` + rest + `}]}`
	}
	for _, row := range []struct{ name, spec, note string }{
		{"a peer of no known kind denies everything", in("Deny", `"to":[{"namespaces":{}},{"services":{}}]`), "egress[0]: the rule denies everything"},
		{"and so does one that is passed on", in("Pass", `"to":[{}]`), "egress[0]: peer 0 has 0 fields that are known, not one"},
		{"a peer of two kinds", in("Deny", `"to":[{"namespaces":{},"networks":["192.0.2.0/24"]}]`), "peer 0 has 2 fields"},
		{"no peers", in("Deny", `"to":[]`), "has no peers"},
		{"a protocol of no known kind", in("Deny", `"to":[{"namespaces":{}}],"protocols":[{"dccp":{}}]`), "protocol 0 has 0 fields"},
		{"a protocol with an unknown field", in("Deny", `"to":[{"namespaces":{}}],"protocols":[{"tcp":{"sourcePort":1}}]`), "protocol 0 has no field that is known"},
		{"a port with an unknown field", in("Deny", `"to":[{"namespaces":{}}],"protocols":[{"tcp":{"destinationPort":{"set":"web"}}}]`), "ports 0 to 0 are none"},
		{"a network that is none", in("Deny", `"to":[{"networks":["everywhere"]}]`), `"everywhere" is no network`},
		{"domain names that are not accepted", in("Deny", `"to":[{"domainNames":["example.com"]}]`), "domainNames are for Accept rules"},
		{"a named port of networks", in("Deny", `"to":[{"networks":["192.0.2.0/24"]}],"protocols":[{"destinationNamedPort":"http"}]`), "only pods have named ports"},
		{"a selector with an unknown operator", in("Deny", `"to":[{"namespaces":{"matchExpressions":[{"key":"a","operator":"Near"}]}}]`), "the selector cannot be read"},
		{"an unknown action denies what it matches", in("Log", `"to":[{"networks":["198.51.100.0/24"]}]`), `action "Log" is unknown`},
		{"an unknown tier denies", `{"tier":"Late","egress":[{"action":"Pass","to":[{"networks":["0.0.0.0/0"]}]}]}`, `tier "Late" is unknown`},
		{"a subject of no known kind is every pod", `{"tier":"Admin","subject":{"namespaces":null},"egress":[{"action":"Deny","to":[{"networks":["0.0.0.0/0"]}]}]}`, "its subject cannot be read"},
	} {
		t.Run(row.name, func(t *testing.T) {
			for _, accepts := range []bool{false, true} {
				o := town()
				spec := row.spec
				if accepts {
					for _, a := range []string{"Deny", "Pass"} {
						spec = strings.Replace(spec, `"action":"`+a+`"`, `"action":"Accept"`, 1)
					}
					if spec == row.spec || strings.Contains(spec, "domainNames") {
						continue
					}
					o.addNamespaced(t, `{"podSelector":{},"policyTypes":["Egress"]}`)
				}
				o.addCluster(t, spec)
				s := o.state()
				if v := decide(t, s, o, o.asks(t, "to 198.51.100.7 TCP 80")); v.Allowed() {
					t.Errorf("with %s: %v", spec, v)
				}
				c, err := s.Compile(Key{"default", "db"})
				if err != nil {
					t.Fatal(err)
				}
				told := ""
				for _, n := range c.Notes {
					told += n.String() + "\n"
				}
				if !accepts && !strings.Contains(told, row.note) {
					t.Errorf("the notes are %q, want %q", told, row.note)
				}
			}
		})
	}
}

func TestDomainNames(t *testing.T) {
	const names = `{"tier":"Admin","egress":[{"name":"Mirrors, and more","action":"Accept","to":[{"domainNames":["Kubernetes.io.","*.example.com"]}],"protocols":[{"tcp":{"destinationPort":{"number":443}}}]}]}`
	for _, row := range []struct {
		name, namespaced string
		mode             policy.NamesMode
	}{
		{"a pod that may send questions may ask for any name", `{"podSelector":{},"egress":[{"ports":[{"port":53,"protocol":"UDP"}]}]}`, policy.NamesAny},
		{"so may one that is not isolated", "", policy.NamesAny},
		{"one that may not may ask for the names of its rules", `{"podSelector":{},"egress":[{"ports":[{"port":80}]}]}`, policy.NamesByRules},
	} {
		t.Run(row.name, func(t *testing.T) {
			o := town()
			o.addCluster(t, names)
			if row.namespaced != "" {
				o.addNamespaced(t, row.namespaced)
			}
			c, err := o.state().Compile(Key{"default", "db"})
			if err != nil {
				t.Fatal(err)
			}
			if got := c.Policy.Spec.DNS.Names; got != row.mode {
				t.Errorf("names are %q, want %q", got, row.mode)
			}
			rules, err := policy.Compile(c.Policy, policy.Environment{})
			if err != nil {
				t.Fatal(err)
			}
			now, addr := time.Unix(1000, 0), netip.MustParseAddr("198.51.100.7")
			for name, want := range map[string]bool{"kubernetes.io": true, "www.kubernetes.io": false, "a.example.com": true, "b.a.example.com": true, "example.com": false, "badexample.com": false} {
				granted := policy.NewNames(policy.NamesConfig{})
				if err := granted.Grant(name, []netip.Addr{addr}, time.Minute, now); err != nil {
					t.Fatal(err)
				}
				q := policy.Query{Proto: uint8(policy.TCP), Dst: netip.AddrPortFrom(addr, 443), Names: granted, Now: now, Seen: policy.Seen{Kind: policy.SeenTLS, Name: name}}
				byName := strings.Contains(rules.Decide(q).Rule(), "ClusterNetworkPolicy/a/0/Mirrors--and-more")
				if byName != want {
					t.Errorf("%s is decided by %v, want it by name: %v", name, rules.Decide(q), want)
				}
			}
		})
	}
}

// A pod can be known before its namespace is, and may be one to deny.
func TestADenyRuleTakesPodsOfUnknownNamespaces(t *testing.T) {
	o := town()
	delete(o.namespaces, "prod")
	o.addCluster(t, `{"tier":"Admin","egress":[{"action":"Deny","to":[{"namespaces":{"matchLabels":{"env":"prod"}}}]},{"action":"Accept","to":[{"namespaces":{}}]}]}`)
	o.addNamespaced(t, `{"podSelector":{},"policyTypes":["Egress"]}`)
	s := o.state()
	for f, rule := range map[string]string{"to 10.244.2.21 TCP 1": "egress[0] ClusterNetworkPolicy/a/0", "to 10.244.1.11 TCP 1": "egress[1] ClusterNetworkPolicy/a/1"} {
		if v := decide(t, s, o, o.asks(t, f)); v.Rule() != rule {
			t.Errorf("%s: %v, want it decided by %s", f, v, rule)
		}
	}
}

func TestTheOlderVersionIsTheSame(t *testing.T) {
	const spec = `{"tier":"Baseline","priority":7,"subject":{"pods":{"podSelector":{"matchLabels":{"app":"db"}}}},"ingress":[{"name":"a","action":"Deny","from":[{"namespaces":{}}],"protocols":[{"destinationNamedPort":"web"}]}],"egress":[{"action":"Pass","to":[{"nodes":{}},{"networks":["192.0.2.0/24"]},{"domainNames":["a.example"]}],"protocols":[{"udp":{"destinationPort":{"range":{"start":1,"end":2}}}}]}]}`
	o := &v1alpha2.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "a"}}
	want := &v1beta1.ClusterNetworkPolicy{}
	for _, v := range []any{&o.Spec, &want.Spec} {
		if err := json.Unmarshal([]byte(spec), v); err != nil {
			t.Fatal(err)
		}
	}
	got, err := FromV1Alpha2(o)
	if err != nil {
		t.Fatal(err)
	}
	a, _ := json.Marshal(got.Spec)
	b, _ := json.Marshal(want.Spec)
	if string(a) != string(b) || got.Name != "a" || got.APIVersion != "policy.networking.k8s.io/v1beta1" {
		t.Errorf("%s %s\nis %s\nwant %s", got.APIVersion, got.Name, a, b)
	}
}
