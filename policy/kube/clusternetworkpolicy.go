package kube

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	"sluice.dev/sluice/policy"
)

// FromV1Alpha2 converts a ClusterNetworkPolicy of the older version to the newer one. The fields
// are the same.
func FromV1Alpha2(o *v1alpha2.ClusterNetworkPolicy) (*v1beta1.ClusterNetworkPolicy, error) {
	out := &v1beta1.ClusterNetworkPolicy{}
	text, err := json.Marshal(o)
	if err == nil {
		err = json.Unmarshal(text, out)
	}
	if err != nil {
		return nil, fmt.Errorf("convert ClusterNetworkPolicy %s: %w", o.Name, err)
	}
	out.APIVersion = v1beta1.GroupVersion.String()
	return out, nil
}

// clusterNetworkPolicy is a parsed ClusterNetworkPolicy.
type clusterNetworkPolicy struct {
	name     string
	tier     v1beta1.Tier
	priority int32
	subject  *podSelector
	rules    [directions][]rule
	notes    []Note
}

// compare sorts policies of one tier by precedence.
func (p *clusterNetworkPolicy) compare(q *clusterNetworkPolicy) int {
	return cmp.Or(cmp.Compare(p.priority, q.priority), strings.Compare(p.name, q.name))
}

// readClusterNetworkPolicy parses a policy. Anything that it does not know fails closed, as the API
// requires of an implementation older than the objects.
func readClusterNetworkPolicy(o *v1beta1.ClusterNetworkPolicy) *clusterNetworkPolicy {
	r := &reader{policy: "ClusterNetworkPolicy/" + o.Name}
	p := &clusterNetworkPolicy{name: o.Name, tier: o.Spec.Tier, priority: o.Spec.Priority}
	known := true
	if p.tier != v1beta1.AdminTier && p.tier != v1beta1.BaselineTier {
		r.note("tier %q is unknown: its rules deny in the tier Admin, and accept nothing", p.tier)
		p.tier, known = v1beta1.AdminTier, false
	}
	var ok bool
	if p.subject, ok = r.clusterSubject(&o.Spec.Subject); !ok {
		r.note("its subject cannot be read: its rules deny for every pod, and accept nothing")
		p.subject, known = newPodSelector("", labels.Everything(), labels.Everything()), false
	}
	for i := range o.Spec.Ingress {
		n := &o.Spec.Ingress[i]
		c := clusterRule{direction: ingress, index: i, name: n.Name, action: n.Action, protocols: n.Protocols}
		for _, f := range n.From {
			c.peers = append(c.peers, v1beta1.ClusterNetworkPolicyEgressPeer{Namespaces: f.Namespaces, Pods: f.Pods})
		}
		p.add(r, &c, known)
	}
	for i := range o.Spec.Egress {
		n := &o.Spec.Egress[i]
		p.add(r, &clusterRule{direction: egress, index: i, name: n.Name, action: n.Action, peers: n.To, protocols: n.Protocols}, known)
	}
	p.notes = r.notes
	return p
}

// add parses and adds a rule. In a policy that is not understood, a rule can only deny.
func (p *clusterNetworkPolicy) add(r *reader, c *clusterRule, known bool) {
	out, ok := r.clusterRule(c)
	switch {
	case !ok && out.action == accept:
		r.note("%v: the rule matches nothing", c)
		return
	case !ok:
		r.note("%v: the rule denies everything", c)
		out = rule{name: out.name, action: deny, any: true, allPorts: true}
	case !known && out.action == accept:
		return
	case !known:
		out.action = deny
	}
	p.rules[c.direction] = append(p.rules[c.direction], out)
}

func (r *reader) clusterSubject(s *v1beta1.ClusterNetworkPolicySubject) (*podSelector, bool) {
	switch {
	case s.Namespaces != nil && s.Pods == nil:
		return r.clusterPods("subject", s.Namespaces, &metav1.LabelSelector{})
	case s.Pods != nil && s.Namespaces == nil:
		return r.clusterPods("subject", &s.Pods.NamespaceSelector, &s.Pods.PodSelector)
	}
	return nil, false
}

func (r *reader) clusterPods(where string, namespaces, pods *metav1.LabelSelector) (*podSelector, bool) {
	ns, ok := r.selector(where, namespaces)
	if !ok {
		return nil, false
	}
	sel, ok := r.selector(where, pods)
	if !ok {
		return nil, false
	}
	return newPodSelector("", ns, sel), true
}

// clusterRule is a rule of either direction: the kinds of ingress peers are a subset of those of
// egress.
type clusterRule struct {
	direction direction
	index     int
	name      string
	action    v1beta1.ClusterNetworkPolicyRuleAction
	peers     []v1beta1.ClusterNetworkPolicyEgressPeer
	protocols []v1beta1.ClusterNetworkPolicyProtocol
}

func (c *clusterRule) String() string { return fmt.Sprintf("%v[%d]", c.direction, c.index) }

// clusterRule parses a rule. It reports false if any part of the rule is unknown.
func (r *reader) clusterRule(c *clusterRule) (out rule, ok bool) {
	out = rule{name: fmt.Sprintf("%s/%d", r.policy, c.index), allPorts: len(c.protocols) == 0}
	if said := ruleWord(c.name); said != "" {
		out.name += "/" + said
	}
	switch c.action {
	case v1beta1.ClusterNetworkPolicyRuleActionAccept:
		out.action = accept
	case v1beta1.ClusterNetworkPolicyRuleActionPass:
		out.action = pass
	case v1beta1.ClusterNetworkPolicyRuleActionDeny:
	default:
		r.note("%v: action %q is unknown, and denies", c, c.action)
	}
	if ok = len(c.peers) > 0; !ok {
		r.note("%v has no peers", c)
	}
	for i := range c.peers {
		ok = r.clusterPeer(fmt.Sprintf("%v: peer %d", c, i), &c.peers[i], &out) && ok
	}
	for i := range c.protocols {
		ok = r.clusterProtocol(fmt.Sprintf("%v: protocol %d", c, i), &c.protocols[i], &out) && ok
	}
	if len(out.named) > 0 && (len(out.nodes) > 0 || len(out.blocks) > 0 || len(out.domains) > 0) {
		r.note("%v: only pods have named ports", c)
		ok = false
	}
	// Both families in full mean what a rule without peers means in a NetworkPolicy. A network
	// beside them may still open a special address.
	whole := func(b block) bool { return b.cidr.Bits() == 0 }
	if slices.ContainsFunc(out.blocks, func(b block) bool { return b.cidr == everything[0].cidr }) &&
		slices.ContainsFunc(out.blocks, func(b block) bool { return b.cidr == everything[1].cidr }) {
		out.any, out.blocks = true, slices.DeleteFunc(out.blocks, whole)
	}
	return out, ok
}

func (r *reader) clusterPeer(where string, p *v1beta1.ClusterNetworkPolicyEgressPeer, out *rule) (ok bool) {
	set := 0
	for _, is := range []bool{p.Namespaces != nil, p.Pods != nil, p.Nodes != nil, len(p.Networks) > 0, len(p.DomainNames) > 0} {
		if is {
			set++
		}
	}
	if set != 1 {
		r.note("%s has %d fields that are known, not one", where, set)
		return false
	}
	var s *podSelector
	switch {
	case p.Namespaces != nil:
		s, ok = r.clusterPods(where, p.Namespaces, &metav1.LabelSelector{})
	case p.Pods != nil:
		s, ok = r.clusterPods(where, &p.Pods.NamespaceSelector, &p.Pods.PodSelector)
	case p.Nodes != nil:
		var sel labels.Selector
		if sel, ok = r.selector(where, p.Nodes); ok {
			out.nodes = append(out.nodes, sel)
		}
	case len(p.Networks) > 0:
		return r.networks(where, p.Networks, out)
	default:
		return r.domainNames(where, p.DomainNames, out)
	}
	if s != nil {
		out.selectors = append(out.selectors, s)
	}
	return ok
}

func (r *reader) networks(where string, list []v1beta1.CIDR, out *rule) bool {
	for _, s := range list {
		network, ok := cidr(string(s))
		if !ok {
			r.note("%s: %q is no network", where, s)
			return false
		}
		out.blocks = append(out.blocks, block{cidr: network})
	}
	return true
}

func (r *reader) domainNames(where string, list []v1beta1.DomainName, out *rule) bool {
	if out.action != accept {
		r.note("%s: domainNames are for Accept rules", where)
		return false
	}
	for _, s := range list {
		// In the API, * stands for any number of labels.
		pattern := string(s)
		if rest, wild := strings.CutPrefix(pattern, "*."); wild {
			pattern = "**." + rest
		}
		name, err := policy.NormalizePattern(pattern)
		if err != nil {
			r.note("%s: %q is no domain name: %v", where, s, err)
			return false
		}
		out.domains = append(out.domains, name)
	}
	return true
}

func (r *reader) clusterProtocol(where string, p *v1beta1.ClusterNetworkPolicyProtocol, out *rule) bool {
	var proto policy.Protocol
	var port *v1beta1.Port
	set := 0
	if p.TCP != nil {
		proto, port = policy.TCP, p.TCP.DestinationPort
		set++
	}
	if p.UDP != nil {
		proto, port = policy.UDP, p.UDP.DestinationPort
		set++
	}
	if p.SCTP != nil {
		proto, port = policy.SCTP, p.SCTP.DestinationPort
		set++
	}
	if p.DestinationNamedPort != "" {
		set++
	}
	switch {
	case set != 1:
		r.note("%s has %d fields that are known, not one", where, set)
		return false
	case proto == 0:
		out.named = append(out.named, portName{name: p.DestinationNamedPort})
		return true
	case port == nil:
		r.note("%s has no field that is known", where)
		return false
	}
	lo, hi := port.Number, port.Number
	if port.Range != nil {
		lo, hi = port.Range.Start, port.Range.End
	}
	if port.Number != 0 && port.Range != nil || lo < 1 || hi > maxPort || hi < lo {
		r.note("%s: ports %d to %d are none", where, lo, hi)
		return false
	}
	out.ports = append(out.ports, ports(proto, uint16(lo), uint16(hi)))
	return true
}

// ruleWord turns the name that an author gave a rule into a part of a rule's name.
func ruleWord(s string) string {
	word := strings.Map(func(c rune) rune {
		if c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || c == '.' || c == '_' {
			return c
		}
		return '-'
	}, s)
	return strings.Trim(word[:min(len(word), maxRuleWord)], "-._")
}

// maxRuleWord is the maximum length of a rule's name in the API.
const maxRuleWord = 100

// nodeBlocks returns the addresses of the nodes that any of the selectors selects.
func (w *world) nodeBlocks(selectors []labels.Selector) (out []block) {
	var addrs []netip.Addr
	for _, n := range w.nodes {
		for _, s := range selectors {
			if s.Matches(labels.Set(n.Labels)) {
				addrs = append(addrs, n.Addrs...)
			}
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	for _, a := range slices.Compact(addrs) {
		out = append(out, block{cidr: netip.PrefixFrom(a, a.BitLen())})
	}
	return out
}
