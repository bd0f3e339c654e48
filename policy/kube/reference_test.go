package kube

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"
)

// The stupid twin evaluates the objects themselves, one flow at a time, as the text of the API
// says. It shares no code with the package, and knows no compiled rules.

// objects holds a cluster in the API's own types.
type objects struct {
	namespaces map[string]map[string]string
	pods       []*corev1.Pod
	nodes      []*corev1.Node
	host       []netip.Prefix // addresses that the kernel of the pods' node takes for itself
	policies   []*networkingv1.NetworkPolicy
	cluster    []*v1beta1.ClusterNetworkPolicy
}

// flow is traffic between an address and the pod for which it is judged.
type flow struct {
	pod    *corev1.Pod
	egress bool
	peer   netip.Addr
	proto  corev1.Protocol // empty: ICMP
	port   int32           // of the destination
}

// metadata stands for the addresses that only a rule for nothing else opens.
var metadata = netip.MustParseAddr("169.254.169.254")

func (o *objects) labelsMatch(s *metav1.LabelSelector, l map[string]string) bool {
	for k, v := range s.MatchLabels {
		if l[k] != v {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		v, has := l[e.Key]
		var ok bool
		switch e.Operator {
		case metav1.LabelSelectorOpIn:
			ok = has && slices.Contains(e.Values, v)
		case metav1.LabelSelectorOpNotIn:
			ok = !has || !slices.Contains(e.Values, v)
		case metav1.LabelSelectorOpExists:
			ok = has
		case metav1.LabelSelectorOpDoesNotExist:
			ok = !has
		}
		if !ok {
			return false
		}
	}
	return true
}

func hasAddr(p *corev1.Pod, a netip.Addr) bool {
	return slices.Contains(p.Status.PodIPs, corev1.PodIP{IP: a.String()})
}

// at returns the pods at an address: none that has ended or has its node's address, and none being
// deleted if another is not.
func (o *objects) at(a netip.Addr) []*corev1.Pod {
	var staying, leaving []*corev1.Pod
	for _, p := range o.pods {
		switch {
		case !hasAddr(p, a) || p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed:
		case p.DeletionTimestamp != nil:
			leaving = append(leaving, p)
		default:
			staying = append(staying, p)
		}
	}
	if len(staying) > 0 {
		return staying
	}
	return leaving
}

// allAt reports whether there are pods at an address and all of them satisfy is.
func (o *objects) allAt(a netip.Addr, is func(*corev1.Pod) bool) bool {
	pods := o.at(a)
	return len(pods) > 0 && !slices.ContainsFunc(pods, func(p *corev1.Pod) bool { return !is(p) })
}

func (o *objects) ownNode(f flow) bool {
	for _, n := range o.nodes {
		if n.Name != f.pod.Spec.NodeName {
			continue
		}
		for _, a := range n.Status.Addresses {
			if a.Address == f.peer.String() {
				return true
			}
		}
	}
	return slices.ContainsFunc(o.host, func(p netip.Prefix) bool { return p.Contains(f.peer) })
}

// allowed decides a flow: by the tiers in order, then by the default if none decides.
func (o *objects) allowed(f flow) bool {
	if !f.egress && o.ownNode(f) {
		return true
	}
	switch o.tier(f, v1beta1.AdminTier) {
	case v1beta1.ClusterNetworkPolicyRuleActionAccept:
		return true
	case v1beta1.ClusterNetworkPolicyRuleActionDeny:
		return false
	}
	if isolated, allowed := o.namespaced(f); isolated {
		return allowed
	}
	switch o.tier(f, v1beta1.BaselineTier) {
	case v1beta1.ClusterNetworkPolicyRuleActionAccept:
		return true
	case v1beta1.ClusterNetworkPolicyRuleActionDeny:
		return false
	}
	return f.peer != metadata
}

// namespaced evaluates the tier of NetworkPolicy.
func (o *objects) namespaced(f flow) (isolated, allowed bool) {
	for _, p := range o.policies {
		if p.Namespace != f.pod.Namespace || !o.labelsMatch(&p.Spec.PodSelector, f.pod.Labels) {
			continue
		}
		if f.egress {
			if !(len(p.Spec.PolicyTypes) == 0 && len(p.Spec.Egress) > 0) && !slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress) {
				continue
			}
			isolated = true
			for _, r := range p.Spec.Egress {
				allowed = allowed || o.networkPolicyAllows(p.Namespace, f, r.To, r.Ports)
			}
			continue
		}
		if len(p.Spec.PolicyTypes) > 0 && !slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress) {
			continue
		}
		isolated = true
		for _, r := range p.Spec.Ingress {
			allowed = allowed || o.networkPolicyAllows(p.Namespace, f, r.From, r.Ports)
		}
	}
	return isolated, allowed
}

// networkPolicyAllows reports whether a peer and a port both match. In egress a named port counts
// only if the pods at the destination, which the peer matches, name it.
func (o *objects) networkPolicyAllows(namespace string, f flow, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) bool {
	if f.peer == metadata && len(peers) == 0 {
		return false
	}
	if len(peers) > 0 && !slices.ContainsFunc(peers, func(p networkingv1.NetworkPolicyPeer) bool { return o.peerMatches(namespace, f.peer, &p) }) {
		return false
	}
	if len(ports) == 0 {
		return true
	}
	return slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool {
		proto := corev1.ProtocolTCP
		if p.Protocol != nil {
			proto = *p.Protocol
		}
		switch {
		case proto != f.proto:
			return false
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.Int && p.EndPort != nil:
			return p.Port.IntVal <= f.port && f.port <= *p.EndPort
		case p.Port.Type == intstr.Int:
			return p.Port.IntVal == f.port
		case f.egress:
			return o.allAt(f.peer, func(at *corev1.Pod) bool { return namesPort(at, p.Port.StrVal, proto, f.port) })
		}
		return namesPort(f.pod, p.Port.StrVal, proto, f.port)
	})
}

func namesPort(p *corev1.Pod, name string, proto corev1.Protocol, number int32) bool {
	for _, c := range p.Spec.Containers {
		for _, cp := range c.Ports {
			if cp.Name == name && cp.Protocol == proto {
				return cp.ContainerPort == number
			}
		}
	}
	return false
}

func (o *objects) peerMatches(namespace string, a netip.Addr, p *networkingv1.NetworkPolicyPeer) bool {
	if b := p.IPBlock; b != nil {
		network := netip.MustParsePrefix(b.CIDR)
		if a == metadata && network.Bits() < a.BitLen() {
			return false
		}
		return network.Contains(a) && !slices.ContainsFunc(b.Except, func(e string) bool { return netip.MustParsePrefix(e).Contains(a) })
	}
	return o.allAt(a, func(at *corev1.Pod) bool {
		switch {
		case p.NamespaceSelector == nil && at.Namespace != namespace:
			return false
		case p.NamespaceSelector != nil && !o.labelsMatch(p.NamespaceSelector, o.namespaces[at.Namespace]):
			return false
		}
		return p.PodSelector == nil || o.labelsMatch(p.PodSelector, at.Labels)
	})
}

// state returns the objects in the form that the package takes.
func (o *objects) state() *State {
	s := &State{Namespaces: o.namespaces, Host: o.host, NetworkPolicies: o.policies, ClusterNetworkPolicies: o.cluster}
	for _, p := range o.pods {
		s.Pods = append(s.Pods, PodOf(p))
	}
	for _, n := range o.nodes {
		s.Nodes = append(s.Nodes, NodeOf(n))
	}
	return s
}
