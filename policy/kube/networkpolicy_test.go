package kube

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// town is the cluster of the documented cases. The policies are about default/db, on node n1.
func town() *objects {
	o := &objects{
		namespaces: map[string]map[string]string{"default": {"env": "test"}, "prod": {"env": "prod"}},
		host:       []netip.Prefix{netip.MustParsePrefix("192.0.2.11/32"), netip.MustParsePrefix("10.244.1.1/32")},
	}
	for _, n := range []struct{ name, addr, zone string }{{"n1", "192.0.2.11", "a"}, {"n2", "192.0.2.12", "b"}} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.name, Labels: map[string]string{"zone": n.zone}}}
		node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: n.name}, {Type: corev1.NodeInternalIP, Address: n.addr}}
		o.nodes = append(o.nodes, node)
	}
	add := func(namespace, name, node, app string, ports []corev1.ContainerPort, ips ...string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": app}}}
		p.Spec.NodeName, p.Status.Phase = node, corev1.PodRunning
		p.Spec.Containers = []corev1.Container{{Ports: ports}}
		for _, ip := range ips {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
		}
		o.pods = append(o.pods, p)
		return p
	}
	port := func(name string, number int32, proto corev1.Protocol) []corev1.ContainerPort {
		return []corev1.ContainerPort{{Name: name, ContainerPort: number, Protocol: proto}}
	}
	add("default", "db", "n1", "db", port("sql", 5432, "TCP"), "10.244.1.10", "fd00:244::10")
	add("default", "web", "n1", "web", port("http", 80, "TCP"), "10.244.1.11", "fd00:244::11")
	add("default", "cron", "n2", "cron", port("http", 8080, "TCP"), "10.244.2.12")
	add("prod", "web", "n2", "web", port("http", 8080, "TCP"), "10.244.2.20")
	add("prod", "api", "n2", "api", nil, "10.244.2.21")
	add("default", "agent", "n2", "web", nil, "192.0.2.12").Spec.HostNetwork = true
	add("default", "finished", "n2", "web", nil, "10.244.2.30").Status.Phase = corev1.PodSucceeded
	add("default", "leaving", "n2", "web", nil, "10.244.2.31").DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	// An address that a pod being deleted has given back.
	add("default", "left", "n2", "web", nil, "10.244.2.32").DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	add("prod", "came", "n2", "api", nil, "10.244.2.32")
	return o
}

// asks parses "from 10.0.0.1 TCP 80" as a flow of default/db.
func (o *objects) asks(t *testing.T, s string) flow {
	t.Helper()
	words := strings.Fields(s)
	f := flow{pod: o.pods[0], egress: words[0] == "to", peer: netip.MustParseAddr(words[1])}
	if words[2] != "ICMP" {
		f.proto = corev1.Protocol(words[2])
		if err := json.Unmarshal([]byte(words[3]), &f.port); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// check asks the package and the twin about flows that pass and flows that do not.
func (o *objects) check(t *testing.T, pass, stop []string) {
	t.Helper()
	state := o.state()
	for want, list := range map[bool][]string{true: pass, false: stop} {
		for _, s := range list {
			f := o.asks(t, s)
			if v := decide(t, state, o, f); v.Allowed() != want {
				t.Errorf("%s: %v; want it allowed: %v", s, v, want)
			}
			if got := o.allowed(f); got != want {
				t.Errorf("%s: the twin says %v, want %v", s, got, want)
			}
		}
	}
}

const (
	web        = "10.244.1.11" // default
	cron       = "10.244.2.12"
	prodWeb    = "10.244.2.20"
	prodAPI    = "10.244.2.21"
	node       = "192.0.2.11"
	bridge     = "10.244.1.1"
	otherNode  = "192.0.2.12" // and of a pod with host network
	finished   = "10.244.2.30"
	leaving    = "10.244.2.31"
	reused     = "10.244.2.32"
	outside    = "198.51.100.7"
	outside6   = "2001:db8::7"
	linkLocal  = "169.254.20.10"
	metadataIP = "169.254.169.254"
)

func TestNetworkPolicyAsDocumented(t *testing.T) {
	tcp := func(way, port string, peers ...string) (out []string) {
		for _, p := range peers {
			out = append(out, way+" "+p+" TCP "+port)
		}
		return out
	}
	for _, row := range []struct {
		name, spec string
		pass, stop []string
	}{
		{"no policy that selects the pod isolates nothing, but the metadata service stays closed", `{"podSelector":{"matchLabels":{"app":"web"}}}`,
			append(tcp("from", "1", web, node, outside, outside6, prodAPI), "to 198.51.100.7 ICMP", "to 198.51.100.7 SCTP 1", "to 192.0.2.11 TCP 1", "to 169.254.20.10 UDP 53", "from 240.0.0.9 TCP 1"), tcp("to", "80", metadataIP)},
		{"an empty policy isolates ingress alone", `{"podSelector":{}}`,
			tcp("to", "1", web, outside, node), tcp("from", "1", web, outside, otherNode)},
		{"the pod's own node reaches it whatever policies say", `{"podSelector":{},"policyTypes":["Ingress","Egress"]}`,
			tcp("from", "1", node, bridge), append(tcp("from", "1", otherNode, web), tcp("to", "1", node, bridge, web)...)},
		{"egress rules isolate egress, and ingress with it", `{"podSelector":{},"egress":[{}]}`,
			append(tcp("to", "1", web, outside, outside6, node, linkLocal, "240.0.0.9"), "to 198.51.100.7 ICMP"), append(tcp("from", "1", web), tcp("to", "80", metadataIP)...)},
		{"policyTypes Egress leaves ingress alone, rules or not", `{"podSelector":{},"policyTypes":["Egress"],"ingress":[{"from":[{"podSelector":{}}]}]}`,
			tcp("from", "1", outside), tcp("to", "1", web)},
		{"policyTypes Ingress leaves egress alone, rules or not", `{"podSelector":{},"policyTypes":["Ingress"],"egress":[{"to":[{"podSelector":{}}]}]}`,
			tcp("to", "1", outside), tcp("from", "1", web)},
		{"a rule without peers allows every source", `{"podSelector":{},"ingress":[{}]}`, tcp("from", "1", web, outside, outside6, linkLocal), nil},
		{"a rule with empty lists is one without", `{"podSelector":{},"ingress":[{"from":[],"ports":[]}]}`, append(tcp("from", "1", web, outside), "from 198.51.100.7 ICMP"), nil},
		{"a podSelector selects in the policy's namespace", `{"podSelector":{},"ingress":[{"from":[{"podSelector":{"matchLabels":{"app":"web"}}}]}]}`,
			tcp("from", "1", web, leaving, "fd00:244::11"), tcp("from", "1", prodWeb, cron, finished, reused, otherNode, outside)},
		{"a namespaceSelector selects all pods of a namespace", `{"podSelector":{},"ingress":[{"from":[{"namespaceSelector":{"matchLabels":{"env":"prod"}}}]}]}`,
			tcp("from", "1", prodWeb, prodAPI, reused), tcp("from", "1", web, outside)},
		{"both in one peer are and", `{"podSelector":{},"ingress":[{"from":[{"namespaceSelector":{"matchLabels":{"env":"prod"}},"podSelector":{"matchLabels":{"app":"web"}}}]}]}`,
			tcp("from", "1", prodWeb), tcp("from", "1", web, prodAPI)},
		{"in two peers they are or", `{"podSelector":{},"ingress":[{"from":[{"namespaceSelector":{"matchLabels":{"env":"prod"}}},{"podSelector":{"matchLabels":{"app":"web"}}}]}]}`,
			tcp("from", "1", prodWeb, web, prodAPI), tcp("from", "1", cron, outside)},
		{"an empty namespaceSelector is every pod and nothing else", `{"podSelector":{},"egress":[{"to":[{"namespaceSelector":{}}]}]}`,
			tcp("to", "1", web, prodWeb, leaving), tcp("to", "1", outside, finished, node, otherNode)},
		{"an ipBlock less its exceptions, of one family", `{"podSelector":{},"egress":[{"to":[{"ipBlock":{"cidr":"0.0.0.0/0","except":["10.0.0.0/8","169.254.0.0/16"]}}]}]}`,
			tcp("to", "1", outside, node, otherNode), tcp("to", "1", outside6, web, bridge, linkLocal, metadataIP)},
		{"an ipBlock around the node and link-local addresses holds them", `{"podSelector":{},"egress":[{"to":[{"ipBlock":{"cidr":"0.0.0.0/0"}}]}]}`,
			tcp("to", "1", outside, node, bridge, linkLocal, web), tcp("to", "1", outside6, metadataIP)},
		{"only an ipBlock of its own opens the metadata service", `{"podSelector":{},"egress":[{"to":[{"ipBlock":{"cidr":"169.254.169.254/32"}}]}]}`, tcp("to", "80", metadataIP), tcp("to", "80", linkLocal)},
		{"a pod with host network is its node's address", `{"podSelector":{},"ingress":[{"from":[{"ipBlock":{"cidr":"192.0.2.12/32"}}]}]}`, tcp("from", "1", otherNode), tcp("from", "1", outside)},
		{"a port is of TCP where it does not say", `{"podSelector":{},"ingress":[{"ports":[{"port":80}]}]}`, tcp("from", "80", web), append(tcp("from", "81", web), "from 10.244.1.11 UDP 80", "from 10.244.1.11 ICMP")},
		{"a protocol without a port is all of its ports", `{"podSelector":{},"ingress":[{"ports":[{"protocol":"UDP"}]}]}`, []string{"from 10.244.1.11 UDP 1", "from 10.244.1.11 UDP 65535"}, tcp("from", "80", web)},
		{"endPort ends a range, inclusive", `{"podSelector":{},"ingress":[{"ports":[{"port":80,"endPort":82}]}]}`, append(tcp("from", "80", web), tcp("from", "82", web)...), append(tcp("from", "79", web), tcp("from", "83", web)...)},
		{"a named port in ingress is the pod's", `{"podSelector":{},"ingress":[{"ports":[{"port":"sql"}]}]}`, tcp("from", "5432", web, outside), tcp("from", "80", web)},
		{"a named port that the pod lacks matches nothing", `{"podSelector":{},"ingress":[{"ports":[{"port":"http"}]}]}`, nil, tcp("from", "80", web)},
		{"a named port of another protocol matches nothing", `{"podSelector":{},"ingress":[{"ports":[{"port":"sql","protocol":"UDP"}]}]}`, nil, []string{"from 10.244.1.11 UDP 5432", "from 10.244.1.11 TCP 5432"}},
		{"a named port in egress is each destination's own", `{"podSelector":{},"egress":[{"to":[{"namespaceSelector":{}}],"ports":[{"port":"http"}]}]}`,
			append(tcp("to", "80", web), tcp("to", "8080", cron, prodWeb)...), append(tcp("to", "8080", web), append(tcp("to", "80", cron, outside), tcp("to", "80", prodAPI)...)...)},
		{"a named port without peers is that of every pod", `{"podSelector":{},"egress":[{"ports":[{"port":"http"}]}]}`, append(tcp("to", "80", web), tcp("to", "8080", cron)...), tcp("to", "80", cron, outside)},
		{"a named port in an ipBlock is that of the pods there", `{"podSelector":{},"egress":[{"to":[{"ipBlock":{"cidr":"10.244.2.0/24"}}],"ports":[{"port":"http"}]}]}`, tcp("to", "8080", cron), tcp("to", "80", web)},
		{"SCTP is a protocol of its own", `{"podSelector":{},"ingress":[{"ports":[{"protocol":"SCTP","port":80}]}]}`, []string{"from 10.244.1.11 SCTP 80"}, append(tcp("from", "80", web), "from 10.244.1.11 UDP 80")},
	} {
		t.Run(row.name, func(t *testing.T) {
			o := town()
			p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "p"}}
			if err := json.Unmarshal([]byte(row.spec), &p.Spec); err != nil {
				t.Fatal(err)
			}
			o.policies = append(o.policies, p)
			o.check(t, row.pass, row.stop)
		})
	}
}

func TestNetworkPoliciesAddUp(t *testing.T) {
	o := town()
	for name, spec := range map[string]string{
		"web":  `{"podSelector":{},"ingress":[{"from":[{"podSelector":{"matchLabels":{"app":"web"}}}],"ports":[{"port":80}]}]}`,
		"cron": `{"podSelector":{"matchLabels":{"app":"db"}},"ingress":[{"from":[{"podSelector":{"matchLabels":{"app":"cron"}}}],"ports":[{"port":81}]}]}`,
		"none": `{"podSelector":{},"policyTypes":["Ingress"]}`,
	} {
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
		if err := json.Unmarshal([]byte(spec), &p.Spec); err != nil {
			t.Fatal(err)
		}
		o.policies = append(o.policies, p)
	}
	o.check(t, []string{"from 10.244.1.11 TCP 80", "from 10.244.2.12 TCP 81"}, []string{"from 10.244.1.11 TCP 81", "from 10.244.2.12 TCP 80"})
	for f, rule := range map[string]string{
		"from 10.244.1.11 TCP 80": "ingress[2] NetworkPolicy/default/web/0",
		"from 10.244.2.12 TCP 81": "ingress[1] NetworkPolicy/default/cron/0",
		"from 10.244.2.12 TCP 80": "ingress[3] isolated",
		"from 192.0.2.11 TCP 80":  "ingress[0] node",
		"to 198.51.100.7 TCP 80":  "egress[0] not-selected",
	} {
		if v := decide(t, o.state(), o, o.asks(t, f)); v.Rule() != rule {
			t.Errorf("%s is decided by %q, want %q", f, v.Rule(), rule)
		}
	}
}

// Objects that the API server would refuse, or only a newer one would accept, allow nothing, and a
// Note says so.
func TestWhatCannotBeReadAllowsNothingAndIsTold(t *testing.T) {
	for _, row := range []struct{ name, spec, note string }{
		{"a peer without fields", `{"podSelector":{},"ingress":[{"from":[{}]}]}`, "NetworkPolicy/default/p: ingress[0]: peer 0 has no field that is known, and matches nothing"},
		{"an ipBlock beside a selector", `{"podSelector":{},"ingress":[{"from":[{"podSelector":{},"ipBlock":{"cidr":"0.0.0.0/0"}}]}]}`, "has ipBlock and a selector"},
		{"a cidr that is none", `{"podSelector":{},"ingress":[{"from":[{"ipBlock":{"cidr":"10.244.1.11"}}]}]}`, `cidr "10.244.1.11" is no network`},
		{"an exception that is none", `{"podSelector":{},"ingress":[{"from":[{"ipBlock":{"cidr":"0.0.0.0/0","except":["all"]}}]}]}`, `except "all" is no network`},
		{"an exception of everything", `{"podSelector":{},"ingress":[{"from":[{"ipBlock":{"cidr":"10.244.1.0/24","except":["10.244.0.0/16"]}}]}]}`, ""},
		{"an unknown protocol", `{"podSelector":{},"ingress":[{"ports":[{"protocol":"DCCP"}]}]}`, `protocol "DCCP" is unknown`},
		{"an endPort alone", `{"podSelector":{},"ingress":[{"ports":[{"endPort":80}]}]}`, "endPort needs a port by number"},
		{"an endPort of a named port", `{"podSelector":{},"ingress":[{"ports":[{"port":"sql","endPort":5433}]}]}`, "endPort needs a port by number"},
		{"an endPort before its port", `{"podSelector":{},"ingress":[{"ports":[{"port":5432,"endPort":80}]}]}`, "ports 5432 to 80 are none"},
		{"a port that is none", `{"podSelector":{},"ingress":[{"ports":[{"port":70000}]}]}`, "are none"},
		{"an unknown operator in a peer", `{"podSelector":{},"ingress":[{"from":[{"podSelector":{"matchExpressions":[{"key":"a","operator":"Near"}]}}]}]}`, "peer 0: the selector cannot be read"},
		{"an unknown operator in the subject", `{"podSelector":{"matchExpressions":[{"key":"a","operator":"Near"}]},"ingress":[{}]}`, "podSelector: the selector cannot be read"},
		{"SCTP alone, which is not carried", `{"podSelector":{},"ingress":[{"ports":[{"protocol":"SCTP"}]}]}`, "the rule lets nothing pass"},
	} {
		t.Run(row.name, func(t *testing.T) {
			o := town()
			p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "p"}}
			if err := json.Unmarshal([]byte(row.spec), &p.Spec); err != nil {
				t.Fatal(err)
			}
			o.policies = append(o.policies, p)
			s := o.state()
			for _, f := range []string{"from 10.244.1.11 TCP 5432", "from 10.244.1.11 UDP 80", "from 198.51.100.7 TCP 80"} {
				if v := decide(t, s, o, o.asks(t, f)); v.Allowed() {
					t.Errorf("%s: %v", f, v)
				}
			}
			c, err := s.Compile(Key{"default", "db"})
			if err != nil {
				t.Fatal(err)
			}
			told := false
			for _, n := range c.Notes {
				told = told || row.note != "" && strings.Contains(n.String(), row.note)
			}
			if told != (row.note != "") {
				t.Errorf("the notes are %v, want %q", c.Notes, row.note)
			}
		})
	}
}

func TestAPodOfAnUnknownNamespaceIsClosed(t *testing.T) {
	o := town()
	delete(o.namespaces, "default")
	s := o.state()
	for f, want := range map[string]bool{"from 10.244.1.11 TCP 80": false, "to 198.51.100.7 TCP 80": false, "from 192.0.2.11 TCP 80": true} {
		if v := decide(t, s, o, o.asks(t, f)); v.Allowed() != want {
			t.Errorf("%s: %v", f, v)
		}
	}
	if _, err := s.Compile(Key{"default", "agent"}); err == nil {
		t.Error("a pod with host network is given a policy")
	}
	if _, err := s.Compile(Key{"default", "nobody"}); err == nil {
		t.Error("a pod that is not there is given a policy")
	}
}
