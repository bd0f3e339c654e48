package kube

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"
)

// Index keeps the compiled policies of one node's pods while the cluster changes. Each change marks
// the pods whose rules depend on what changed, and Changes compiles these again:
//
//	a pod's labels    ──► the selectors that begin or cease to select it
//	a pod's addresses ──► the selectors that select it, or a pod that has one of them too
//	a pod's ports     ──► rules that name ports of their destinations
//	a namespace       ──► its pods, as above
//	a node            ──► rules that select nodes; on the index's own node every pod
//	a policy          ──► the pods that it selects, or did
//	    selectors, rules ──► the pods that were compiled with them
//
// An Index is not safe for concurrent use. The caller must not change what it has handed over.
type Index struct {
	*cluster
	node  string
	local map[Key]*Compiled // nil: not compiled yet
}

// NewIndex returns an index of a cluster about which nothing is known yet.
func NewIndex(node string) *Index {
	return &Index{cluster: newCluster(), node: node, local: make(map[Key]*Compiled)}
}

// Change is a pod of the index's node whose policy has changed, or that is gone.
type Change struct {
	Pod Key
	// Compiled has no Policy if the pod is gone.
	Compiled
}

// SetPod records a new or changed pod.
func (x *Index) SetPod(p Pod) {
	old := x.pods[p.Key]
	if old != nil && reflect.DeepEqual(*old, p) {
		return
	}
	x.setPod(p.Key, &p)
	switch _, was := x.local[p.Key]; {
	case p.Node == x.node && !p.HostNetwork:
		if !was {
			x.local[p.Key] = nil
		}
		x.dirty[p.Key] = true
	case was:
		x.dirty[p.Key] = true
	}
}

// DeletePod records that a pod is gone.
func (x *Index) DeletePod(k Key) {
	x.setPod(k, nil)
	if _, was := x.local[k]; was {
		x.dirty[k] = true
	}
}

// SetNamespace records a namespace's labels.
func (x *Index) SetNamespace(name string, labels map[string]string) {
	x.markNamespace(name, x.setNamespace(name, labels, true))
}

// DeleteNamespace records that a namespace is gone.
func (x *Index) DeleteNamespace(name string) {
	x.markNamespace(name, x.setNamespace(name, nil, false))
}

func (x *Index) markNamespace(name string, changed bool) {
	if !changed {
		return
	}
	for k := range x.local {
		if k.Namespace == name {
			x.dirty[k] = true
		}
	}
}

// SetNode records a new or changed node.
func (x *Index) SetNode(n Node) {
	if old := x.nodes[n.Name]; old != nil && reflect.DeepEqual(*old, n) {
		return
	}
	x.nodes[n.Name] = &n
	x.markNode(n.Name)
}

// DeleteNode records that a node is gone.
func (x *Index) DeleteNode(name string) {
	delete(x.nodes, name)
	x.markNode(name)
}

func (x *Index) markNode(name string) {
	if x.dirty.mark(x.byNode); name == x.node {
		x.markAll()
	}
}

func (x *Index) markAll() {
	for k := range x.local {
		x.dirty[k] = true
	}
}

// SetHost records the value of State.Host.
func (x *Index) SetHost(host []netip.Prefix) {
	if !slices.Equal(x.host, host) {
		x.host = slices.Clone(host)
		x.markAll()
	}
}

// SetNetworkPolicy records a new or changed policy.
func (x *Index) SetNetworkPolicy(o *networkingv1.NetworkPolicy) {
	x.DeleteNetworkPolicy(Key{o.Namespace, o.Name})
	p := readNetworkPolicy(o)
	x.networkPolicies[Key{o.Namespace, o.Name}] = p
	x.markSubject(p.subject)
}

// DeleteNetworkPolicy records that a policy is gone.
func (x *Index) DeleteNetworkPolicy(k Key) {
	if p := x.networkPolicies[k]; p != nil {
		delete(x.networkPolicies, k)
		x.markSubject(p.subject)
	}
}

// SetClusterNetworkPolicy records a new or changed policy.
func (x *Index) SetClusterNetworkPolicy(o *v1beta1.ClusterNetworkPolicy) {
	x.DeleteClusterNetworkPolicy(o.Name)
	p := readClusterNetworkPolicy(o)
	x.clusterPolicies[o.Name] = p
	x.markSubject(p.subject)
}

// DeleteClusterNetworkPolicy records that a policy is gone.
func (x *Index) DeleteClusterNetworkPolicy(name string) {
	if p := x.clusterPolicies[name]; p != nil {
		delete(x.clusterPolicies, name)
		x.markSubject(p.subject)
	}
}

func (x *Index) markSubject(s *podSelector) {
	for k := range x.local {
		p := x.pods[k]
		if p == nil {
			continue // the pod is marked already
		}
		if _, ok := x.selects(s, p); ok {
			x.dirty[k] = true
		}
	}
}

// Changes compiles what has changed since the last call, and returns the pods whose policy is now
// different, by namespace and name. One call for many changes costs less than many calls.
func (x *Index) Changes() (out []Change) {
	unused := make(map[*group]bool)
	for _, k := range slices.SortedFunc(maps.Keys(x.dirty), Key.compare) {
		before, local := x.local[k]
		if !local {
			continue
		}
		maps.Copy(unused, x.forget(k))
		p := x.pods[k]
		if p == nil || p.Node != x.node || p.HostNetwork {
			delete(x.local, k)
			out = append(out, Change{Pod: k})
			continue
		}
		after := x.compilePod(p)
		if before != nil && before.same(&after) {
			continue
		}
		x.local[k] = &after
		out = append(out, Change{k, after})
	}
	x.release(unused)
	clear(x.dirty)
	return out
}

// Compiled returns what the last call of Changes compiled for a pod.
func (x *Index) Compiled(pod Key) (Compiled, error) {
	c := x.local[pod]
	if c == nil {
		return Compiled{}, fmt.Errorf("the policies of pod %v are not compiled", pod)
	}
	return *c, nil
}
