package kube

import (
	"fmt"
	"net/netip"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"sluice.dev/sluice/policy"
)

// networkPolicy is a parsed NetworkPolicy.
type networkPolicy struct {
	subject  *podSelector
	isolates [directions]bool
	rules    [directions][]rule
	notes    []Note
}

// Note is something about a policy that its author should know: it asks for something unsupported,
// or cannot be read and therefore allows nothing.
type Note struct {
	Policy string // "NetworkPolicy/default/web"
	Text   string
}

func (n Note) String() string { return n.Policy + ": " + n.Text }

// reader collects notes while a policy is read.
type reader struct {
	policy string
	notes  []Note
}

func (r *reader) note(format string, args ...any) {
	r.notes = append(r.notes, Note{r.policy, fmt.Sprintf(format, args...)})
}

// selector parses a selector, and notes one that cannot be read.
func (r *reader) selector(where string, s *metav1.LabelSelector) (labels.Selector, bool) {
	sel, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		r.note("%s: the selector cannot be read: %v", where, err)
		return nil, false
	}
	return sel, true
}

func networkPolicyName(k Key) string { return "NetworkPolicy/" + k.String() }

// readNetworkPolicy parses a policy. A part that the API server would have refused matches nothing;
// as the subject, it selects every pod of the namespace. Both only close.
func readNetworkPolicy(o *networkingv1.NetworkPolicy) *networkPolicy {
	key := Key{o.Namespace, o.Name}
	r := &reader{policy: networkPolicyName(key)}
	p := &networkPolicy{}
	subject, ok := r.selector("podSelector", &o.Spec.PodSelector)
	if !ok {
		subject = labels.Everything()
	}
	p.subject = newPodSelector(o.Namespace, nil, subject)

	types := o.Spec.PolicyTypes
	p.isolates[ingress] = len(types) == 0 || slices.Contains(types, networkingv1.PolicyTypeIngress)
	p.isolates[egress] = len(types) == 0 && len(o.Spec.Egress) > 0 || slices.Contains(types, networkingv1.PolicyTypeEgress)
	for _, t := range types {
		if t != networkingv1.PolicyTypeIngress && t != networkingv1.PolicyTypeEgress {
			r.note("policyTypes: %q is unknown", t)
		}
	}
	if ok && p.isolates[ingress] {
		for i := range o.Spec.Ingress {
			n := &o.Spec.Ingress[i]
			p.rules[ingress] = append(p.rules[ingress], r.networkPolicyRule(o.Namespace, ingress, i, n.From, n.Ports))
		}
	}
	if ok && p.isolates[egress] {
		for i := range o.Spec.Egress {
			n := &o.Spec.Egress[i]
			p.rules[egress] = append(p.rules[egress], r.networkPolicyRule(o.Namespace, egress, i, n.To, n.Ports))
		}
	}
	p.notes = r.notes
	return p
}

func (r *reader) networkPolicyRule(namespace string, d direction, i int, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) rule {
	where := fmt.Sprintf("%v[%d]", d, i)
	out := rule{name: fmt.Sprintf("%s/%d", r.policy, i), action: accept, any: len(peers) == 0, allPorts: len(ports) == 0}
	for j := range peers {
		r.networkPolicyPeer(fmt.Sprintf("%s: peer %d", where, j), namespace, &peers[j], &out)
	}
	carried := len(ports) == 0
	for j := range ports {
		p := &ports[j]
		at := fmt.Sprintf("%s: port %d", where, j)
		if r.networkPolicyPort(at, p, &out) && (p.Protocol == nil || string(*p.Protocol) != "SCTP") {
			carried = true
		}
	}
	if !carried {
		r.note("%s: no port of it is one of TCP or UDP, and nothing else with ports is carried: the rule lets nothing pass", where)
	}
	return out
}

func (r *reader) networkPolicyPeer(where, namespace string, p *networkingv1.NetworkPolicyPeer, out *rule) {
	switch {
	case p.IPBlock != nil && (p.PodSelector != nil || p.NamespaceSelector != nil):
		r.note("%s has ipBlock and a selector, and matches nothing", where)
	case p.IPBlock != nil:
		if b, ok := r.ipBlock(where, p.IPBlock); ok {
			out.blocks = append(out.blocks, b)
		}
	case p.PodSelector == nil && p.NamespaceSelector == nil:
		r.note("%s has no field that is known, and matches nothing", where)
	default:
		var namespaces labels.Selector
		pods := labels.Everything()
		ok := true
		if p.NamespaceSelector != nil {
			namespaces, ok = r.selector(where, p.NamespaceSelector)
			namespace = ""
		}
		if ok && p.PodSelector != nil {
			pods, ok = r.selector(where, p.PodSelector)
		}
		if ok {
			out.selectors = append(out.selectors, newPodSelector(namespace, namespaces, pods))
		}
	}
}

func (r *reader) ipBlock(where string, b *networkingv1.IPBlock) (block, bool) {
	network, ok := cidr(b.CIDR)
	if !ok {
		r.note("%s: cidr %q is no network, and matches nothing", where, b.CIDR)
		return block{}, false
	}
	var except []netip.Prefix
	for _, s := range b.Except {
		e, ok := cidr(s)
		if !ok {
			r.note("%s: except %q is no network, so that the whole ipBlock matches nothing", where, s)
			return block{}, false
		}
		except = append(except, e)
	}
	return blockOf(network, except)
}

func (r *reader) networkPolicyPort(where string, p *networkingv1.NetworkPolicyPort, out *rule) bool {
	proto, ok := protocol(p.Protocol)
	switch {
	case !ok:
		r.note("%s: protocol %q is unknown, and matches nothing", where, *p.Protocol)
	case p.Port == nil && p.EndPort == nil:
		out.ports = append(out.ports, policy.Port{Protocol: proto})
		return true
	case p.Port == nil, p.EndPort != nil && p.Port.Type == intstr.String:
		r.note("%s: endPort needs a port by number; it matches nothing", where)
	case p.Port.Type == intstr.String && p.Port.StrVal != "":
		out.named = append(out.named, portName{p.Port.StrVal, proto})
		return true
	default:
		lo, hi := p.Port.IntVal, p.Port.IntVal
		if p.EndPort != nil {
			hi = *p.EndPort
		}
		if p.Port.Type == intstr.String || lo < 1 || hi > maxPort || hi < lo {
			r.note("%s: ports %v to %d are none, and match nothing", where, p.Port, hi)
			return false
		}
		out.ports = append(out.ports, ports(proto, uint16(lo), uint16(hi)))
		return true
	}
	return false
}
