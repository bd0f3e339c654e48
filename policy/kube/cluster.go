package kube

import (
	"fmt"
	"maps"
	"slices"
)

// cluster is a world and its policies.
type cluster struct {
	*world
	networkPolicies map[Key]*networkPolicy
}

func newCluster(s *State) *cluster {
	c := &cluster{world: newWorld(), networkPolicies: make(map[Key]*networkPolicy)}
	for name, l := range s.Namespaces {
		c.namespaces[name] = l
	}
	for i := range s.Nodes {
		c.nodes[s.Nodes[i].Name] = &s.Nodes[i]
	}
	for i := range s.Pods {
		c.setPod(&s.Pods[i])
	}
	c.host = s.Host
	for _, o := range s.NetworkPolicies {
		c.networkPolicies[Key{o.Namespace, o.Name}] = readNetworkPolicy(o)
	}
	return c
}

// Compile makes the policy of one pod. A pod that has its node's addresses has none.
func (s *State) Compile(pod Key) (Compiled, error) {
	c := newCluster(s)
	p := c.pods[pod]
	switch {
	case p == nil:
		return Compiled{}, fmt.Errorf("compile the policies of pod %v: there is no such pod", pod)
	case p.HostNetwork:
		return Compiled{}, fmt.Errorf("compile the policies of pod %v: it has its node's network", pod)
	}
	return c.compilePod(p), nil
}

// compilePod finds the policies that select a pod, and compiles them. A pod whose namespace
// is not known is closed: policies may select it by that.
func (c *cluster) compilePod(p *Pod) Compiled {
	if _, known := c.namespaces[p.Namespace]; !known {
		return c.closed(p, []Note{{"pod " + p.Key.String(), "its namespace is not known: it is closed"}})
	}
	var rules [directions]ofPod
	var notes []Note
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
