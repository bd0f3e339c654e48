package kube

import (
	"fmt"
	"maps"
	"slices"

	"sigs.k8s.io/network-policy-api/apis/v1beta1"
)

// cluster is a world and its policies.
type cluster struct {
	*world
	networkPolicies map[Key]*networkPolicy
	clusterPolicies map[string]*clusterNetworkPolicy
}

func newCluster() *cluster {
	return &cluster{world: newWorld(), networkPolicies: make(map[Key]*networkPolicy), clusterPolicies: make(map[string]*clusterNetworkPolicy)}
}

// Index returns an index of the state for the pods of a node.
func (s *State) Index(node string) *Index {
	x := NewIndex(node)
	x.SetHost(s.Host)
	for name, l := range s.Namespaces {
		x.SetNamespace(name, l)
	}
	for i := range s.Nodes {
		x.SetNode(s.Nodes[i])
	}
	for i := range s.Pods {
		x.SetPod(s.Pods[i])
	}
	for _, o := range s.NetworkPolicies {
		x.SetNetworkPolicy(o)
	}
	for _, o := range s.ClusterNetworkPolicies {
		x.SetClusterNetworkPolicy(o)
	}
	return x
}

// Compile returns the policy of one pod. It fails if there is no such pod or if the pod has its
// node's addresses.
func (s *State) Compile(pod Key) (Compiled, error) {
	x := s.Index("")
	p := x.pods[pod]
	switch {
	case p == nil:
		return Compiled{}, fmt.Errorf("compile the policies of pod %v: there is no such pod", pod)
	case p.HostNetwork:
		return Compiled{}, fmt.Errorf("compile the policies of pod %v: it has its node's network", pod)
	}
	return x.compilePod(p), nil
}

// compilePod finds the policies that select a pod and compiles them. It closes a pod whose
// namespace is not known, because policies may select the pod by its namespace.
func (c *cluster) compilePod(p *Pod) Compiled {
	if _, known := c.namespaces[p.Namespace]; !known {
		return c.closed(p, []Note{{"pod " + p.Key.String(), "its namespace is not known: it is closed"}})
	}
	var rules [directions]ofPod
	var notes []Note
	// Of two policies with one priority either may go first. The order here is always the same.
	for _, n := range slices.SortedFunc(maps.Values(c.clusterPolicies), (*clusterNetworkPolicy).compare) {
		if _, ok := c.selects(n.subject, p); !ok {
			continue
		}
		notes = append(notes, n.notes...)
		for d := range directions {
			list := &rules[d].admin
			if n.tier == v1beta1.BaselineTier {
				list = &rules[d].baseline
			}
			for i := range n.rules[d] {
				*list = append(*list, &n.rules[d][i])
			}
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(c.networkPolicies), Key.compare) {
		n := c.networkPolicies[k]
		if _, ok := c.selects(n.subject, p); !ok {
			continue
		}
		notes = append(notes, n.notes...)
		for d := range directions {
			if !n.isolates[d] {
				continue
			}
			rules[d].isolated = true
			for i := range n.rules[d] {
				rules[d].namespaced = append(rules[d].namespaced, &n.rules[d][i])
			}
		}
	}
	return c.compile(p, rules, notes)
}
