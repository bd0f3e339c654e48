package kube

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"
)

// world is what is known of the cluster, and the sets of addresses that selectors select in it.
//
// An address can be claimed by more than one pod for a while: the one that had it is not
// gone yet, or the news of two pods came in another order. A pod that is being deleted then
// yields to one that is not. Of claims that are left a set for an allow rule wants all to
// match, a set for a deny rule any.
type world struct {
	namespaces map[string]labels.Set
	pods       map[Key]*Pod
	claims     map[netip.Addr][]*Pod // of pods that can be peers
	nodes      map[string]*Node
	host       []netip.Prefix
	groups     map[selectorKey]*group
}

func newWorld() *world {
	return &world{
		namespaces: make(map[string]labels.Set), pods: make(map[Key]*Pod), claims: make(map[netip.Addr][]*Pod),
		nodes: make(map[string]*Node), groups: make(map[selectorKey]*group),
	}
}

// selectable reports whether a pod can be a peer by a selector.
func selectable(p *Pod) bool { return !p.HostNetwork && !p.Done }

// setPod puts a pod in the place of the one of its key.
func (w *world) setPod(p *Pod) {
	w.deletePod(p.Key)
	w.pods[p.Key] = p
	if !selectable(p) {
		return
	}
	for _, a := range p.Addrs {
		w.claims[a] = append(w.claims[a], p)
	}
}

func (w *world) deletePod(k Key) {
	p, ok := w.pods[k]
	if !ok {
		return
	}
	delete(w.pods, k)
	for _, a := range p.Addrs {
		left := slices.DeleteFunc(w.claims[a], func(q *Pod) bool { return q == p })
		if w.claims[a] = left; len(left) == 0 {
			delete(w.claims, a)
		}
	}
}

// owners gives the pods that an address counts as the address of.
func (w *world) owners(a netip.Addr) []*Pod {
	all := w.claims[a]
	if len(all) < 2 {
		return all
	}
	if stay := slices.DeleteFunc(slices.Clone(all), func(p *Pod) bool { return p.Terminating }); len(stay) > 0 {
		return stay
	}
	return all
}

// collect gives the addresses of those pods that are in: of all that own the address, or,
// if wide, of any.
func (w *world) collect(pods iter.Seq[*Pod], wide bool, in func(*Pod, netip.Addr) bool) []netip.Addr {
	var out []netip.Addr
	for p := range pods {
		for _, a := range p.Addrs {
			owners := w.owners(a)
			if !slices.Contains(owners, p) || !in(p, a) {
				continue
			}
			if wide || !slices.ContainsFunc(owners, func(q *Pod) bool { return q != p && !in(q, a) }) {
				out = append(out, a)
			}
		}
	}
	return out
}

// hostOf gives the addresses of the node of a pod.
func (w *world) hostOf(pod *Pod) []netip.Prefix {
	out := slices.Clone(w.host)
	if n := w.nodes[pod.Node]; n != nil {
		for _, a := range n.Addrs {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	slices.SortFunc(out, comparePrefix)
	return slices.Compact(out)
}

// group is the pods that one selector selects.
type group struct {
	selector *podSelector
	members  map[*Pod]bool // false: it would be one if its namespace, which is not known, were selected
	// Made when they are asked for: the addresses for allow rules, and those for deny rules.
	narrow, wide *podSet
}

// group finds the pods of a selector.
func (w *world) group(s *podSelector) *group {
	g := w.groups[s.key]
	if g == nil {
		g = &group{selector: s, members: make(map[*Pod]bool)}
		for _, p := range w.pods {
			g.add(w, p)
		}
		w.groups[s.key] = g
	}
	return g
}

func (g *group) add(w *world, p *Pod) {
	if !selectable(p) {
		return
	}
	if known, ok := w.selects(g.selector, p); ok {
		g.members[p] = known
	}
}

// selects reports whether a selector matches a pod, and whether that is known.
func (w *world) selects(s *podSelector, p *Pod) (known, ok bool) {
	if s.namespace == nil && p.Namespace != s.key.namespace || !s.pod.Matches(labels.Set(p.Labels)) {
		return false, false
	}
	if s.namespace == nil {
		return true, true
	}
	ns, known := w.namespaces[p.Namespace]
	return known, !known || s.namespace.Matches(ns)
}

func (g *group) has(p *Pod, wide bool) bool {
	known, ok := g.members[p]
	return ok && (wide || known)
}

func (g *group) set(w *world, wide bool) *podSet {
	s := &g.narrow
	if wide {
		s = &g.wide
	}
	if *s == nil {
		*s = podSetOf(w.collect(maps.Keys(g.members), wide, func(p *Pod, _ netip.Addr) bool { return g.has(p, wide) }))
	}
	return *s
}
