package kube

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"
)

// world is what is known about the cluster, with the sets of addresses that selectors select in it.
//
// More than one pod can claim an address for a while: the pod that had it is not gone yet, or the
// news of two pods came in another order. A pod that is being deleted then yields to one that is
// not. If several claims are left, a set for an allow rule requires all of them to match, a set for
// a deny rule any.
type world struct {
	namespaces map[string]labels.Set
	pods       map[Key]*Pod
	claims     map[netip.Addr][]*Pod // of pods that can be peers
	nodes      map[string]*Node
	host       []netip.Prefix
	groups     map[selectorKey]*group

	// Which pods were compiled with what, and which of them must be compiled again.
	used   map[Key]map[*group]bool
	byPort dependents // pods whose rules name ports of their destinations
	byNode dependents // pods whose rules select nodes
	dirty  dependents
}

// dependents are pods whose rules depend on something.
type dependents map[Key]bool

func (d dependents) mark(others dependents) { maps.Copy(d, others) }

func newWorld() *world {
	return &world{
		namespaces: make(map[string]labels.Set), pods: make(map[Key]*Pod), claims: make(map[netip.Addr][]*Pod),
		nodes: make(map[string]*Node), groups: make(map[selectorKey]*group), used: make(map[Key]map[*group]bool),
		byPort: make(dependents), byNode: make(dependents), dirty: make(dependents),
	}
}

// selectable reports whether a selector can make the pod a peer.
func selectable(p *Pod) bool { return !p.HostNetwork && !p.Done }

// setPod replaces the pod that has the key; nil removes it.
func (w *world) setPod(k Key, p *Pod) {
	old := w.pods[k]
	same := old != nil && p != nil && old.samePeer(p)
	others := w.claimants(old)
	if delete(w.pods, k); old != nil {
		for _, a := range old.Addrs {
			left := slices.DeleteFunc(w.claims[a], func(q *Pod) bool { return q == old })
			if w.claims[a] = left; len(left) == 0 {
				delete(w.claims, a)
			}
		}
	}
	others = append(others, w.claimants(p)...)
	if p != nil {
		w.pods[k] = p
		for _, a := range p.Addrs {
			if selectable(p) {
				w.claims[a] = append(w.claims[a], p)
			}
		}
	}
	for _, g := range w.groups {
		g.replace(w, old, p, same, others)
	}
	if !same && (old != nil && len(old.Ports) > 0 || p != nil && len(p.Ports) > 0 || len(others) > 0) {
		w.dirty.mark(w.byPort)
	}
}

// claimants returns the other pods that have an address of p.
func (w *world) claimants(p *Pod) (out []*Pod) {
	if p == nil {
		return nil
	}
	for _, a := range p.Addrs {
		for _, q := range w.claims[a] {
			if q != p {
				out = append(out, q)
			}
		}
	}
	return out
}

// setNamespace records a namespace's labels, or that it is not known. It reports whether that is
// new.
func (w *world) setNamespace(name string, l labels.Set, known bool) bool {
	if old, was := w.namespaces[name]; was == known && maps.Equal(old, l) {
		return false
	}
	if delete(w.namespaces, name); known {
		w.namespaces[name] = l
	}
	for _, p := range w.pods {
		if p.Namespace != name {
			continue
		}
		for _, g := range w.groups {
			g.replace(w, p, p, true, nil)
		}
	}
	return true
}

// owners returns the pods that an address belongs to.
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

// collect returns the addresses of the pods that in accepts. It must accept every pod that owns the
// address or, if wide, any.
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

// hostOf returns the addresses of a pod's node.
func (w *world) hostOf(pod *Pod) []netip.Prefix {
	out := slices.Clone(w.host)
	if n := w.nodes[pod.Node]; n != nil {
		for _, a := range n.Addrs {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out)
}

// group holds the pods that one selector selects.
type group struct {
	selector *podSelector
	members  map[*Pod]bool // false: it would be a member if its namespace, which is not known, were selected
	// Made on demand: the addresses for allow rules, and those for deny rules.
	narrow, wide struct {
		set  *podSet
		good bool // nothing has changed since
	}
	users dependents
}

// replace removes the member old and adds p if it is a member. The sets stay if old and p are the
// same peer as far as sets can tell, and no other pod of the group has an address of theirs.
func (g *group) replace(w *world, old, p *Pod, same bool, others []*Pod) {
	before, was := g.members[old]
	delete(g.members, old)
	if p != nil {
		g.add(w, p)
	}
	after, is := g.members[p]
	changed := was != is || before != after || (was || is) && !same
	if changed || !same && slices.ContainsFunc(others, func(q *Pod) bool { _, ok := g.members[q]; return ok }) {
		g.narrow.good, g.wide.good = false, false
		w.dirty.mark(g.users)
	}
}

// group returns the pods of a selector.
func (w *world) group(s *podSelector) *group {
	g := w.groups[s.key]
	if g == nil {
		g = &group{selector: s, members: make(map[*Pod]bool), users: make(dependents)}
		for _, p := range w.pods {
			g.add(w, p)
		}
		w.groups[s.key] = g
	}
	return g
}

// use returns the pods of a selector for the rules of a pod, which depend on them from then on.
func (w *world) use(s *podSelector, pod *Pod) *group {
	g := w.group(s)
	g.users[pod.Key] = true
	if w.used[pod.Key] == nil {
		w.used[pod.Key] = make(map[*group]bool)
	}
	w.used[pod.Key][g] = true
	return g
}

// forget drops what a pod's rules depend on. It returns the groups that may have become unused.
func (w *world) forget(pod Key) map[*group]bool {
	groups := w.used[pod]
	for g := range groups {
		delete(g.users, pod)
	}
	delete(w.used, pod)
	delete(w.byPort, pod)
	delete(w.byNode, pod)
	return groups
}

// release drops those of the groups that no rule uses.
func (w *world) release(groups map[*group]bool) {
	for g := range groups {
		if len(g.users) == 0 {
			delete(w.groups, g.selector.key)
		}
	}
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
	if !s.good {
		set := podSetOf(w.collect(maps.Keys(g.members), wide, func(p *Pod, _ netip.Addr) bool { return g.has(p, wide) }))
		if s.set == nil || !slices.Equal(s.set.nets, set.nets) {
			s.set = set // otherwise holders of the old set need not compare its addresses
		}
		s.good = true
	}
	return s.set
}
