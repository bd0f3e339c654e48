package kube

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"sluice.dev/sluice/policy"
)

// pairs is the number of pairs, each of objects and a flow, that are compared. The published figure
// comes from
//
//	go test ./policy/kube -run TestTheTwinAgrees -args -pairs 100000
var pairs = flag.Int("pairs", 2000, "pairs of random objects and flows that are compared")

const flowsPerCluster = 20

func TestTheTwinAgrees(t *testing.T) {
	allowed := 0
	for i := range *pairs / flowsPerCluster {
		g := generator{rand.New(rand.NewPCG(uint64(i), 14))}
		o := g.objects()
		state := o.state()
		for range flowsPerCluster {
			f := g.flow(o)
			want := o.allowed(f)
			v := decide(t, state, o, f)
			if v.Allowed() != want {
				t.Fatalf("cluster %d: %v: it is %v, and should be allowed: %v\n%s", i, f, v, want, dump(o))
			}
			if want {
				allowed++
			}
		}
	}
	if allowed < *pairs/5 || allowed > *pairs*4/5 {
		t.Errorf("%d of %d flows are allowed: the flows say little", allowed, *pairs)
	}
}

// decide asks package policy about a flow, with the policy compiled for its pod.
func decide(t testing.TB, s *State, o *objects, f flow) policy.Verdict {
	t.Helper()
	c, err := s.Compile(Key{f.pod.Namespace, f.pod.Name})
	if err != nil {
		t.Fatal(err)
	}
	env := policy.Environment{Host: o.host, HostClients: true, OpenIngress: true}
	for _, ip := range f.pod.Status.PodIPs {
		env.Guest = append(env.Guest, netip.MustParseAddr(ip.IP))
	}
	d, err := c.Document()
	if err != nil {
		t.Fatal(err)
	}
	p, err := d.Policy()
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.Compile(p, env)
	if err != nil {
		t.Fatal(err)
	}
	return rules.Decide(f.query())
}

// query returns the flow as a question to package policy.
func (f flow) query() policy.Query {
	proto := map[corev1.Protocol]policy.Protocol{corev1.ProtocolTCP: policy.TCP, corev1.ProtocolUDP: policy.UDP, corev1.ProtocolSCTP: policy.SCTP, "": policy.ICMPv4}[f.proto]
	echo := uint8(8)
	if f.proto == "" && f.peer.Is6() {
		proto, echo = policy.ICMPv6, 128
	}
	var own netip.Addr
	for _, ip := range f.pod.Status.PodIPs {
		if a := netip.MustParseAddr(ip.IP); a.Is4() == f.peer.Is4() {
			own = a
		}
	}
	q := policy.Query{Ingress: !f.egress, Proto: uint8(proto), Src: netip.AddrPortFrom(own, 40000), Dst: netip.AddrPortFrom(f.peer, uint16(f.port)), ICMPType: echo}
	if q.Ingress {
		q.Src, q.Dst = netip.AddrPortFrom(f.peer, 40000), netip.AddrPortFrom(own, uint16(f.port))
	}
	return q
}

func (f flow) String() string {
	way := "from"
	if f.egress {
		way = "to"
	}
	return fmt.Sprintf("pod %s/%s, %s %v %q port %d", f.pod.Namespace, f.pod.Name, way, f.peer, f.proto, f.port)
}

func dump(o *objects) string {
	text := fmt.Sprintf("namespaces %v, host %v\n", o.namespaces, o.host)
	for _, p := range o.pods {
		text += fmt.Sprintf("pod %s/%s on %s: %v, labels %v, host network %v, phase %v, deleted %v, ports", p.Namespace, p.Name, p.Spec.NodeName, p.Status.PodIPs, p.Labels, p.Spec.HostNetwork, p.Status.Phase, p.DeletionTimestamp != nil)
		for _, c := range p.Spec.Containers {
			for _, cp := range c.Ports {
				text += fmt.Sprintf(" %s=%d/%s", cp.Name, cp.ContainerPort, cp.Protocol)
			}
		}
		text += "\n"
	}
	for _, p := range o.cluster {
		b, _ := json.MarshalIndent(p, "", " ")
		text += string(b) + "---\n"
	}
	for _, p := range o.policies {
		b, _ := json.MarshalIndent(p, "", " ")
		text += string(b) + "---\n"
	}
	return text
}

// generator makes small clusters with few distinct values, so that rules meet.
type generator struct{ *rand.Rand }

func pick[T any](g generator, list ...T) T { return list[g.IntN(len(list))] }

func (g generator) one(n int) bool { return g.IntN(n) == 0 }

func (g generator) labels() map[string]string {
	l := make(map[string]string)
	for _, k := range []string{"app", "tier"} {
		if !g.one(4) {
			l[k] = pick(g, "a", "b", "c")
		}
	}
	return l
}

func (g generator) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	if g.one(4) {
		return s
	}
	k := pick(g, "app", "tier")
	if g.one(2) {
		s.MatchLabels = map[string]string{k: pick(g, "a", "b", "c")}
	}
	if g.one(2) {
		e := metav1.LabelSelectorRequirement{Key: pick(g, "app", "tier"), Operator: pick(g, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist)}
		if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
			e.Values = []string{pick(g, "a", "b"), pick(g, "b", "c")}
		}
		s.MatchExpressions = []metav1.LabelSelectorRequirement{e}
	}
	return s
}

var nodeAddrs = map[string][]string{"n1": {"192.0.2.11", "fd00:1::11"}, "n2": {"192.0.2.12", "fd00:1::12"}}

func (g generator) objects() *objects {
	o := &objects{namespaces: make(map[string]map[string]string), host: []netip.Prefix{netip.MustParsePrefix("192.0.2.11/32"), netip.MustParsePrefix("fd00:1::11/128"), netip.MustParsePrefix("10.244.1.1/32")}}
	for _, ns := range []string{"x", "y", "z"} {
		o.namespaces[ns] = g.labels()
	}
	for _, name := range []string{"n1", "n2"} {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: g.labels()}}
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
		for _, a := range nodeAddrs[name] {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
		}
		o.nodes = append(o.nodes, n)
	}
	for i := range 6 + g.IntN(6) {
		o.pods = append(o.pods, g.pod(i))
	}
	// There is always a pod to ask about.
	p := g.pod(len(o.pods))
	p.Spec.NodeName, p.Spec.HostNetwork, p.Status.Phase, p.DeletionTimestamp = "n1", false, corev1.PodRunning, nil
	p.Status.PodIPs = []corev1.PodIP{{IP: "10.244.1.200"}, {IP: "fd00:244::200"}}
	o.pods = append(o.pods, p)
	for i := range g.IntN(5) {
		o.policies = append(o.policies, g.networkPolicy(i))
	}
	for i := range g.IntN(6) {
		o.cluster = append(o.cluster, g.clusterPolicy(i))
	}
	return o
}

func (g generator) pod(i int) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pick(g, "x", "y", "z"), Name: fmt.Sprint("p", i), Labels: g.labels()}}
	p.Spec.NodeName = pick(g, "n1", "n2")
	p.Status.Phase = pick(g, corev1.PodRunning, corev1.PodRunning, corev1.PodRunning, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed)
	if g.one(5) {
		p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	}
	if g.one(8) {
		p.Spec.HostNetwork = true
		for _, a := range nodeAddrs[p.Spec.NodeName] {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a})
		}
	} else {
		// There are few addresses, so that some are used twice and neighbours form networks.
		host := 2 + g.IntN(10)
		p.Status.PodIPs = []corev1.PodIP{{IP: fmt.Sprintf("10.244.%d.%d", 1+g.IntN(2), host)}}
		if g.one(2) {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: fmt.Sprintf("fd00:244::%d", host)})
		}
	}
	c := corev1.Container{}
	for _, name := range []string{"web", "dns"} {
		if !g.one(3) {
			c.Ports = append(c.Ports, corev1.ContainerPort{Name: name, Protocol: pick(g, corev1.ProtocolTCP, corev1.ProtocolUDP), ContainerPort: pick[int32](g, 80, 81, 8080)})
		}
	}
	p.Spec.Containers = []corev1.Container{c}
	return p
}

func (g generator) networkPolicy(i int) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: pick(g, "x", "y", "z"), Name: fmt.Sprint("np", i)}}
	if !g.one(3) {
		p.Spec.PodSelector = *g.selector()
	}
	p.Spec.PolicyTypes = pick(g, nil, []networkingv1.PolicyType{"Ingress"}, []networkingv1.PolicyType{"Egress"}, []networkingv1.PolicyType{"Egress", "Ingress"})
	for range g.IntN(3) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: g.peers(), Ports: g.ports()})
	}
	for range g.IntN(3) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: g.peers(), Ports: g.ports()})
	}
	return p
}

func (g generator) peers() (out []networkingv1.NetworkPolicyPeer) {
	for range g.IntN(4) {
		var p networkingv1.NetworkPolicyPeer
		switch g.IntN(4) {
		case 0:
			p.PodSelector = g.selector()
		case 1:
			p.NamespaceSelector = g.selector()
		case 2:
			p.PodSelector, p.NamespaceSelector = g.selector(), g.selector()
		default:
			p.IPBlock = g.ipBlock()
		}
		out = append(out, p)
	}
	return out
}

var networks = []string{"0.0.0.0/0", "::/0", "10.0.0.0/8", "10.244.1.0/24", "10.244.1.4/30", "192.0.2.0/24", "192.0.2.11/32", "fd00::/8", "fd00:244::/64", "169.254.0.0/16", "169.254.169.254/32", "198.51.100.0/24"}

func (g generator) ipBlock() *networkingv1.IPBlock {
	b := &networkingv1.IPBlock{CIDR: pick(g, networks...)}
	for range g.IntN(3) {
		e := pick(g, networks...)
		if outer, inner := netip.MustParsePrefix(b.CIDR), netip.MustParsePrefix(e); outer.Contains(inner.Addr()) && outer.Bits() < inner.Bits() {
			b.Except = append(b.Except, e)
		}
	}
	return b
}

func (g generator) ports() (out []networkingv1.NetworkPolicyPort) {
	for range g.IntN(3) {
		var p networkingv1.NetworkPolicyPort
		if !g.one(3) {
			proto := pick(g, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
			p.Protocol = &proto
		}
		switch g.IntN(4) {
		case 0:
		case 1:
			port := intstr.FromString(pick(g, "web", "dns", "none"))
			p.Port = &port
		default:
			port := intstr.FromInt32(pick[int32](g, 79, 80, 81))
			p.Port = &port
			if g.one(2) {
				end := port.IntVal + pick[int32](g, 0, 1, 8000)
				p.EndPort = &end
			}
		}
		out = append(out, p)
	}
	return out
}

// flow returns a flow of a pod on n1, often of the last pod.
func (g generator) flow(o *objects) flow {
	for {
		f := flow{pod: pick(g, o.pods...), egress: g.one(2), proto: pick(g, corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP, "")}
		if g.one(3) {
			f.pod = o.pods[len(o.pods)-1]
		}
		if f.pod.Spec.NodeName != "n1" || f.pod.Spec.HostNetwork {
			continue
		}
		if f.proto != "" {
			f.port = pick[int32](g, 79, 80, 81, 8080, 9000)
		}
		others := []string{"192.0.2.11", "192.0.2.12", "fd00:1::11", "10.244.1.1", "198.51.100.7", "2001:db8::7", "169.254.20.10", "169.254.169.254", "240.0.0.9"}
		peer := pick(g, others...)
		if !g.one(3) {
			peer = pick(g, pick(g, o.pods...).Status.PodIPs...).IP
		}
		f.peer = netip.MustParseAddr(peer)
		// A pod's traffic to itself never leaves it, and the pod needs an address of the family.
		family := slices.ContainsFunc(f.pod.Status.PodIPs, func(ip corev1.PodIP) bool { return netip.MustParseAddr(ip.IP).Is4() == f.peer.Is4() })
		if family && !hasAddr(f.pod, f.peer) {
			return f
		}
	}
}
