package kube

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"
)

// The index's twin compiles everything anew after each change.
func TestAnIndexIsAlwaysWhatAFreshOneIs(t *testing.T) {
	for seed := range uint64(60) {
		g := generator{rand.New(rand.NewPCG(seed, 15))}
		o := g.objects()
		x := o.state().Index("n1")
		known := make(map[Key]Compiled)
		for step := range 25 {
			what := "begins"
			if step > 0 {
				what = g.change(o, x)
			}
			if g.one(3) {
				continue // several changes at once
			}
			for _, c := range x.Changes() {
				if old, was := known[c.Pod]; was && reflect.DeepEqual(old, c.Compiled) {
					t.Fatalf("seed %d step %d: %s: pod %v is told to have changed, and has not", seed, step, what, c.Pod)
				}
				if known[c.Pod] = c.Compiled; c.Policy == nil {
					delete(known, c.Pod)
				}
			}
			fresh := o.state().Index("n1").Changes()
			for _, c := range fresh {
				if got := known[c.Pod]; !reflect.DeepEqual(got, c.Compiled) {
					t.Fatalf("seed %d step %d: %s: pod %v has\n%+v\nwant\n%+v\n%s", seed, step, what, c.Pod, got, c.Compiled, dump(o))
				}
			}
			if len(known) != len(fresh) {
				t.Fatalf("seed %d step %d: %s: %d pods are known, not %d", seed, step, what, len(known), len(fresh))
			}
		}
		for _, p := range o.policies {
			x.DeleteNetworkPolicy(Key{p.Namespace, p.Name})
		}
		for _, p := range o.cluster {
			x.DeleteClusterNetworkPolicy(p.Name)
		}
		for _, p := range o.pods {
			x.DeletePod(Key{p.Namespace, p.Name})
		}
		x.Changes()
		if len(x.groups)+len(x.used)+len(x.byPort)+len(x.byNode)+len(x.claims)+len(x.pods)+len(x.local) > 0 {
			t.Fatalf("seed %d: without pods and policies there are %d groups, %d users, %d addresses", seed, len(x.groups), len(x.used), len(x.claims))
		}
	}
}

// change makes one change to the objects and tells the index.
func (g generator) change(o *objects, x *Index) string {
	i := g.IntN(len(o.pods) - 1) // the last one stays
	switch p := o.pods[i].DeepCopy(); g.IntN(11) {
	case 0:
		p.Labels = g.labels()
		return g.replacePod(o, x, i, p)
	case 1:
		p.Status.PodIPs = []corev1.PodIP{{IP: fmt.Sprintf("10.244.%d.%d", 1+g.IntN(2), 2+g.IntN(10))}}
		return g.replacePod(o, x, i, p)
	case 2:
		q := g.pod(i)
		q.Namespace = p.Namespace
		return g.replacePod(o, x, i, q)
	case 3:
		x.DeletePod(Key{p.Namespace, p.Name})
		o.pods = slices.Delete(o.pods, i, i+1)
		if len(o.pods) < 3 {
			q := g.pod(100 + g.IntN(1000))
			o.pods = slices.Insert(o.pods, 0, q)
			x.SetPod(PodOf(q))
		}
		return "a pod is deleted"
	case 4:
		ns := pick(g, "x", "y", "z")
		if g.one(4) {
			delete(o.namespaces, ns)
			x.DeleteNamespace(ns)
			return "a namespace is deleted"
		}
		o.namespaces[ns] = g.labels()
		x.SetNamespace(ns, o.namespaces[ns])
		return "a namespace's labels change"
	case 5:
		n := o.nodes[g.IntN(len(o.nodes))].DeepCopy()
		n.Labels = g.labels()
		if g.one(2) {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Address: fmt.Sprintf("192.0.2.%d", 20+g.IntN(9))})
		}
		for j := range o.nodes {
			if o.nodes[j].Name == n.Name {
				o.nodes[j] = n
			}
		}
		x.SetNode(NodeOf(n))
		return "a node changes"
	case 6:
		o.host = append(slices.Clone(o.host), netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(30 + g.IntN(9))}), 32))
		x.SetHost(o.host)
		return "the host gets an address"
	case 7, 8:
		np := g.networkPolicy(g.IntN(6))
		same := func(q *networkingv1.NetworkPolicy) bool { return q.Namespace == np.Namespace && q.Name == np.Name }
		o.policies = slices.DeleteFunc(slices.Clone(o.policies), same)
		if g.one(3) {
			x.DeleteNetworkPolicy(Key{np.Namespace, np.Name})
			return "a NetworkPolicy is deleted"
		}
		o.policies = append(o.policies, np)
		x.SetNetworkPolicy(np)
		return "a NetworkPolicy changes"
	default:
		p := g.clusterPolicy(g.IntN(6))
		o.cluster = slices.DeleteFunc(slices.Clone(o.cluster), func(q *v1beta1.ClusterNetworkPolicy) bool { return q.Name == p.Name })
		if g.one(3) {
			x.DeleteClusterNetworkPolicy(p.Name)
			return "a ClusterNetworkPolicy is deleted"
		}
		o.cluster = append(o.cluster, p)
		x.SetClusterNetworkPolicy(p)
		return "a ClusterNetworkPolicy changes"
	}
}

func label(k, v string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{k: v}}
}

func (g generator) replacePod(o *objects, x *Index, i int, p *corev1.Pod) string {
	p.Name = o.pods[i].Name
	o.pods[i] = p
	x.SetPod(PodOf(p))
	return fmt.Sprintf("pod %s/%s changes", p.Namespace, p.Name)
}

// A change that no rule of a pod depends on costs the pod nothing.
func TestOnlyWhatChangesIsCompiled(t *testing.T) {
	o := town()
	o.addNamespaced(t, `{"podSelector":{"matchLabels":{"app":"db"}},"ingress":[{"from":[{"podSelector":{"matchLabels":{"app":"web"}}}]}]}`)
	x := o.state().Index("n1")
	if n := len(x.Changes()); n != 2 {
		t.Fatalf("%d pods are compiled at first, not the node's two", n)
	}
	db, web := Key{"default", "db"}, Key{"default", "web"}
	touch := func(i int, f func(*corev1.Pod)) {
		o.pods[i] = o.pods[i].DeepCopy()
		f(o.pods[i])
		x.SetPod(PodOf(o.pods[i]))
	}
	for _, row := range []struct {
		name          string
		do            func()
		compiled, are []Key
	}{
		{"the same again", func() { touch(2, func(*corev1.Pod) {}) }, nil, nil},
		{"labels that no rule asks for", func() { touch(2, func(p *corev1.Pod) { p.Labels["version"] = "2" }) }, nil, nil},
		{"a pod of another namespace", func() { touch(3, func(p *corev1.Pod) { p.Status.PodIPs[0].IP = "10.244.2.99" }) }, nil, nil},
		{"a pod that is selected now", func() { touch(2, func(p *corev1.Pod) { p.Labels["app"] = "web" }) }, []Key{db}, []Key{db}},
		{"its labels again, but for what selects it", func() { touch(2, func(p *corev1.Pod) { p.Labels["version"] = "3" }) }, nil, nil},
		{"its address", func() { touch(2, func(p *corev1.Pod) { p.Status.PodIPs[0].IP = "10.244.2.98" }) }, []Key{db}, []Key{db}},
		{"its end", func() { touch(2, func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }) }, []Key{db}, []Key{db}},
		{"labels of the node's own pod that change nothing for it", func() { touch(1, func(p *corev1.Pod) { p.Labels["version"] = "2" }) }, []Key{web}, nil},
		{"a namespace that no rule asks for", func() { x.SetNamespace("prod", map[string]string{"env": "test"}) }, nil, nil},
		{"another node", func() { x.SetNode(Node{Name: "n2"}) }, nil, nil},
		{"a policy for one of them", func() {
			x.SetNetworkPolicy(&networkingv1.NetworkPolicy{ObjectMeta: o.pods[1].ObjectMeta, Spec: networkingv1.NetworkPolicySpec{PodSelector: *label("app", "web")}})
		}, []Key{web}, []Key{web}},
		{"a policy for none of them", func() {
			x.SetNetworkPolicy(&networkingv1.NetworkPolicy{ObjectMeta: o.pods[2].ObjectMeta, Spec: networkingv1.NetworkPolicySpec{PodSelector: *label("app", "cron")}})
		}, nil, nil},
	} {
		row.do()
		if got := slices.SortedFunc(maps.Keys(x.dirty), Key.compare); !slices.Equal(got, row.compiled) {
			t.Errorf("%s: %v are compiled, want %v", row.name, got, row.compiled)
		}
		var are []Key
		for _, c := range x.Changes() {
			are = append(are, c.Pod)
		}
		if !slices.Equal(are, row.are) {
			t.Errorf("%s: %v are told, want %v", row.name, are, row.are)
		}
	}
	if c, err := x.Compiled(db); err != nil || len(c.Policy.Spec.Ingress) != 3 {
		t.Errorf("%v, %v", c, err)
	}
	if _, err := x.Compiled(Key{"default", "cron"}); err == nil {
		t.Error("a pod of another node is compiled")
	}
}
