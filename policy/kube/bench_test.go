package kube

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"sluice.dev/sluice/policy"
)

// These benchmarks measure a large cluster: 10 000 pods in 100 namespaces on 91 nodes, 110 on each,
// and 1 000 policies, each for the pods of one application in its namespace. The peers of a policy
// are pods of its namespace, of a team's namespaces, or of the whole cluster.
//
//	go test ./policy/kube -run '^$' -bench . -benchmem
const (
	manyPods       = 10_000
	manyPolicies   = 1_000
	manyNamespaces = 100
	podsOfNode     = 110
)

func bigTown() *State {
	r := rand.New(rand.NewPCG(1, 16))
	s := &State{Namespaces: make(map[string]map[string]string), Host: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}}
	for i := range manyNamespaces {
		name := fmt.Sprint("ns", i)
		s.Namespaces[name] = map[string]string{"kubernetes.io/metadata.name": name, "team": fmt.Sprint("team", i%10)}
	}
	for i := range manyPods {
		node := i / podsOfNode
		s.Pods = append(s.Pods, Pod{
			Key:    Key{fmt.Sprint("ns", r.IntN(manyNamespaces)), fmt.Sprint("pod", i)},
			Labels: map[string]string{"app": fmt.Sprint("app", r.IntN(10)), "pod-template-hash": fmt.Sprint(r.IntN(1 << 30))},
			Node:   fmt.Sprint("node", node),
			// Every other address: no two of them make a network.
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(node), byte(2 + 2*(i%podsOfNode))})},
			Ports: []NamedPort{{"http", policy.TCP, 8080}},
		})
	}
	for i := range manyPolicies {
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint("ns", i%manyNamespaces), Name: fmt.Sprint("policy", i)}}
		p.Spec.PodSelector = *label("app", fmt.Sprint("app", i/manyNamespaces))
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
		from := networkingv1.NetworkPolicyPeer{PodSelector: label("app", fmt.Sprint("app", r.IntN(10)))}
		switch i % 4 {
		case 0:
			from = networkingv1.NetworkPolicyPeer{NamespaceSelector: label("team", fmt.Sprint("team", r.IntN(10)))}
		case 1:
			from = networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{}}
		}
		port := intstr.FromInt32(8080)
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{from}, Ports: []networkingv1.NetworkPolicyPort{{Port: &port}}}}
		p.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{from, {IPBlock: &networkingv1.IPBlock{CIDR: "0.0.0.0/0", Except: []string{"10.0.0.0/8"}}}}}}
		s.NetworkPolicies = append(s.NetworkPolicies, p)
	}
	return s
}

// From nothing to the policies of all pods of a node, as after a start.
func BenchmarkIndexBegins(b *testing.B) {
	s := bigTown()
	for b.Loop() {
		if n := len(s.Index("node0").Changes()); n != podsOfNode {
			b.Fatalf("%d pods are compiled, not %d", n, podsOfNode)
		}
	}
}

// A pod of another node comes or goes: a third of the node's pods have all pods as peers.
func BenchmarkIndexAPodChanges(b *testing.B) {
	s := bigTown()
	x := s.Index("node0")
	x.Changes()
	p, told := s.Pods[manyPods-1], 0
	b.ResetTimer()
	for b.Loop() {
		p.Done = !p.Done
		x.SetPod(p)
		told += len(x.Changes())
	}
	b.ReportMetric(float64(told)/float64(b.N), "changes/op")
}

// The labels of a pod on another node change, but no rule asks for them.
func BenchmarkIndexALabelFlips(b *testing.B) {
	s := bigTown()
	x := s.Index("node0")
	x.Changes()
	p := s.Pods[manyPods-1]
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		p.Labels = map[string]string{"app": p.Labels["app"], "step": fmt.Sprint(i)}
		x.SetPod(p)
		if n := len(x.Changes()); n > 0 {
			b.Fatalf("%d pods are told to have changed", n)
		}
	}
}

// A policy for a tenth of a namespace's pods changes.
func BenchmarkIndexAPolicyChanges(b *testing.B) {
	s := bigTown()
	x := s.Index("node0")
	x.Changes()
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		p := s.NetworkPolicies[i%manyPolicies].DeepCopy()
		port := intstr.FromInt32(int32(1 + i%60000))
		p.Spec.Ingress[0].Ports[0].Port = &port
		x.SetNetworkPolicy(p)
		x.Changes()
	}
}

// An index holds a bounded amount of memory, and a pod's policy has a bounded size.
func TestALargeClusterIsBounded(t *testing.T) {
	s := bigTown()
	before := heap()
	x := s.Index("node0")
	changes := x.Changes()
	if used := heap() - before; used > 24<<20 {
		t.Errorf("an index of %d pods and %d policies holds %d KiB, more than 24 MiB", manyPods, manyPolicies, used>>10)
	} else {
		t.Logf("an index of %d pods and %d policies holds %d KiB", manyPods, manyPolicies, used>>10)
	}
	largest := slices.MaxFunc(changes, func(a, b Change) int { return size(t, a.Compiled) - size(t, b.Compiled) })
	n := size(t, largest.Compiled)
	t.Logf("the largest policy has %d KiB of text", n>>10)
	if n > 1<<20 {
		t.Errorf("the policy of %v has %d bytes of text", largest.Pod, n)
	}
	runtime.KeepAlive(x)
}

// A pod with more addresses than a policy's text can hold is closed, and a Note says so.
func TestAPodWithTooManyPeersIsClosed(t *testing.T) {
	s := bigTown()
	ns := s.Pods[0].Namespace
	var all networkingv1.NetworkPolicy
	all.Namespace = ns
	all.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{}}}}}
	for i := range 2 + MaxPeers/manyPods {
		p := all.DeepCopy()
		p.Name = fmt.Sprint("all", i)
		s.NetworkPolicies = append(s.NetworkPolicies, p)
		if i == MaxPeers/manyPods-2 {
			c, err := s.Compile(s.Pods[0].Key)
			if err != nil || len(c.Notes) > 0 {
				t.Fatalf("with %d policies for all pods: %v, %v", i, err, c.Notes)
			}
			if n := size(t, c); n > policy.MaxPolicyBytes {
				t.Errorf("a policy within the bound has %d bytes of text", n)
			}
		}
	}
	c, err := s.Compile(s.Pods[0].Key)
	if err != nil || len(c.Notes) != 1 {
		t.Fatalf("%v, notes %v", err, c.Notes)
	}
	if in, out := c.Policy.Spec.Ingress, c.Policy.Spec.Egress; len(in) != 2 || in[0].Name != ruleNode || in[1].Action != policy.Drop || len(out) != 1 || out[0].Action != policy.Drop {
		t.Errorf("it is not closed: %+v", c.Policy.Spec)
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func size(t *testing.T, c Compiled) int {
	t.Helper()
	d, err := json.Marshal(c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}
