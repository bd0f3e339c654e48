package kube

import (
	"maps"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	"sluice.dev/sluice/policy"
)

// direction is ingress or egress of the pod that rules are compiled for.
type direction int

const (
	ingress direction = iota
	egress
	directions
)

func (d direction) String() string { return [...]string{"ingress", "egress"}[d] }

// action is what a rule does with matching traffic.
type action int

const (
	deny action = iota
	accept
	pass // on to the next tier
)

// rule is a parsed rule of any kind. It holds no address of a pod or a node: those are looked up
// when it is compiled.
type rule struct {
	name      string
	action    action
	any       bool
	selectors []*podSelector
	nodes     []labels.Selector
	blocks    []block
	domains   []string
	allPorts  bool
	ports     []policy.Port // by number
	named     []portName
}

// portName is a port by the name that a pod gives it. The zero protocol means any.
type portName struct {
	name     string
	protocol policy.Protocol
}

// in returns the ports of a pod that have the name.
func (n portName) in(p *Pod) (out []policy.Port) {
	for _, proto := range []policy.Protocol{policy.TCP, policy.UDP, policy.SCTP} {
		if n.protocol != 0 && n.protocol != proto {
			continue
		}
		if number, ok := p.port(n.name, proto); ok {
			out = append(out, policy.Port{Protocol: proto, Port: number})
		}
	}
	return out
}

// podSelector selects pods, as a subject or as a peer. Selectors that select alike have equal keys.
type podSelector struct {
	key       selectorKey
	namespace labels.Selector // nil: the key's namespace
	pod       labels.Selector
}

type selectorKey struct{ namespace, namespaces, pods string }

func newPodSelector(namespace string, namespaces, pods labels.Selector) *podSelector {
	s := &podSelector{key: selectorKey{namespace: namespace, pods: pods.String()}, namespace: namespaces, pod: pods}
	if namespaces != nil {
		s.key.namespaces = namespaces.String()
	}
	return s
}

// clauses looks up a rule's addresses and ports for one pod.
func (w *world) clauses(r *rule, pod *Pod, d direction) []clause {
	opens, wide := d == egress && r.action == accept, r.action == deny
	var out []clause
	if r.any {
		out = append(out, clause{any: true})
	}
	for _, s := range r.selectors {
		out = append(out, clause{pods: w.use(s, pod).set(w, wide)})
	}
	if len(r.nodes) > 0 {
		w.byNode[pod.Key] = true
	}
	if d == egress && len(r.named) > 0 {
		w.byPort[pod.Key] = true
	}
	if blocks := slices.Concat(r.blocks, w.nodeBlocks(r.nodes)); len(blocks) > 0 {
		if opens {
			blocks = opening(blocks, w.hostOf(pod))
		}
		out = append(out, clause{blocks: blocks})
	}
	if len(r.domains) > 0 {
		out = append(out, clause{domains: r.domains})
	}
	if r.allPorts {
		return out
	}
	numbers := slices.Clone(r.ports)
	var named []clause
	for _, n := range r.named {
		if d == ingress {
			numbers = append(numbers, n.in(pod)...)
		} else {
			named = append(named, w.namedClauses(r, n, wide)...)
		}
	}
	if len(numbers) == 0 {
		return named
	}
	for i := range out {
		out[i].ports = numbers
	}
	return append(out, named...)
}

// namedClauses returns a clause for each number that a named port has among the destinations.
func (w *world) namedClauses(r *rule, n portName, wide bool) []clause {
	numbers := make(map[policy.Port]bool)
	for _, p := range w.pods {
		for _, port := range n.in(p) {
			numbers[port] = true
		}
	}
	list := slices.SortedFunc(maps.Keys(numbers), func(a, b policy.Port) int {
		if a.Protocol != b.Protocol {
			return int(a.Protocol) - int(b.Protocol)
		}
		return int(a.Port) - int(b.Port)
	})
	var out []clause
	for _, port := range list {
		addrs := w.collect(maps.Values(w.pods), wide, func(p *Pod, a netip.Addr) bool {
			return slices.Contains(n.in(p), port) && w.isPeer(r, p, a, wide)
		})
		if len(addrs) > 0 {
			out = append(out, clause{pods: podSetOf(addrs), ports: []policy.Port{port}})
		}
	}
	return out
}

// isPeer reports whether an address of a pod is one of a rule's peers.
func (w *world) isPeer(r *rule, p *Pod, a netip.Addr, wide bool) bool {
	return r.any ||
		slices.ContainsFunc(r.selectors, func(s *podSelector) bool { return w.group(s).has(p, wide) }) ||
		slices.ContainsFunc(r.blocks, func(b block) bool { return b.contains(a) })
}
