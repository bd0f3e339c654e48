package kube

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"
)

// This part of the twin evaluates ClusterNetworkPolicies.

type clusterAction = v1beta1.ClusterNetworkPolicyRuleAction

const (
	acceptIt = v1beta1.ClusterNetworkPolicyRuleActionAccept
	denyIt   = v1beta1.ClusterNetworkPolicyRuleActionDeny
	passIt   = v1beta1.ClusterNetworkPolicyRuleActionPass
)

// tier returns the action of the first matching rule of a tier, or none.
func (o *objects) tier(f flow, tier v1beta1.Tier) clusterAction {
	for priority := range int32(1001) {
		for _, p := range o.cluster { // their names are in order
			if p.Spec.Tier != tier || p.Spec.Priority != priority || !o.isSubject(f.pod, &p.Spec.Subject) {
				continue
			}
			if f.egress {
				for _, r := range p.Spec.Egress {
					if a := o.clusterRule(f, r.Action, r.To, r.Protocols); a != "" {
						return a
					}
				}
				continue
			}
			for _, r := range p.Spec.Ingress {
				var from []v1beta1.ClusterNetworkPolicyEgressPeer
				for _, peer := range r.From {
					from = append(from, v1beta1.ClusterNetworkPolicyEgressPeer{Namespaces: peer.Namespaces, Pods: peer.Pods})
				}
				if a := o.clusterRule(f, r.Action, from, r.Protocols); a != "" {
					return a
				}
			}
		}
	}
	return ""
}

func (o *objects) isSubject(p *corev1.Pod, s *v1beta1.ClusterNetworkPolicySubject) bool {
	if s.Namespaces != nil {
		return o.labelsMatch(s.Namespaces, o.namespaces[p.Namespace])
	}
	return o.labelsMatch(&s.Pods.NamespaceSelector, o.namespaces[p.Namespace]) && o.labelsMatch(&s.Pods.PodSelector, p.Labels)
}

// clusterRule returns the action of a rule if it matches. A rule with a peer without any field is
// from a newer version: an Accept rule matches nothing, any other denies everything.
func (o *objects) clusterRule(f flow, action clusterAction, peers []v1beta1.ClusterNetworkPolicyEgressPeer, protocols []v1beta1.ClusterNetworkPolicyProtocol) clusterAction {
	for _, p := range peers {
		if p.Namespaces == nil && p.Pods == nil && p.Nodes == nil && p.Networks == nil {
			if action == acceptIt {
				return ""
			}
			return denyIt
		}
	}
	if !slices.ContainsFunc(peers, func(p v1beta1.ClusterNetworkPolicyEgressPeer) bool { return o.clusterPeer(f.peer, action, peers, &p) }) {
		return ""
	}
	if len(protocols) == 0 || slices.ContainsFunc(protocols, func(p v1beta1.ClusterNetworkPolicyProtocol) bool { return o.clusterProtocol(f, action, peers, &p) }) {
		return action
	}
	return ""
}

// someAt reports whether the pods at an address satisfy is: any of them for a Deny rule, otherwise
// all.
func (o *objects) someAt(a netip.Addr, action clusterAction, is func(*corev1.Pod) bool) bool {
	if action == denyIt {
		return slices.ContainsFunc(o.at(a), is)
	}
	return o.allAt(a, is)
}

func (o *objects) clusterPeer(a netip.Addr, action clusterAction, all []v1beta1.ClusterNetworkPolicyEgressPeer, p *v1beta1.ClusterNetworkPolicyEgressPeer) bool {
	switch {
	case p.Nodes != nil:
		return slices.ContainsFunc(o.nodes, func(n *corev1.Node) bool {
			return o.labelsMatch(p.Nodes, n.Labels) && slices.ContainsFunc(n.Status.Addresses, func(at corev1.NodeAddress) bool { return at.Address == a.String() })
		})
	case p.Networks != nil:
		return slices.ContainsFunc(p.Networks, func(s v1beta1.CIDR) bool {
			network := netip.MustParsePrefix(string(s))
			return network.Contains(a) && (action != acceptIt || a != metadata || network.IsSingleIP())
		})
	}
	return o.someAt(a, action, func(at *corev1.Pod) bool {
		return slices.ContainsFunc(all, func(p v1beta1.ClusterNetworkPolicyEgressPeer) bool { return o.clusterSelects(&p, at) }) && o.clusterSelects(p, at)
	})
}

func (o *objects) clusterSelects(p *v1beta1.ClusterNetworkPolicyEgressPeer, at *corev1.Pod) bool {
	ns := o.namespaces[at.Namespace]
	switch {
	case p.Namespaces != nil:
		return o.labelsMatch(p.Namespaces, ns)
	case p.Pods != nil:
		return o.labelsMatch(&p.Pods.NamespaceSelector, ns) && o.labelsMatch(&p.Pods.PodSelector, at.Labels)
	}
	return false
}

func (o *objects) clusterProtocol(f flow, action clusterAction, peers []v1beta1.ClusterNetworkPolicyEgressPeer, p *v1beta1.ClusterNetworkPolicyProtocol) bool {
	in := func(port *v1beta1.Port) bool {
		if port.Range != nil {
			return port.Range.Start <= f.port && f.port <= port.Range.End
		}
		return port.Number == f.port
	}
	switch {
	case p.TCP != nil:
		return f.proto == corev1.ProtocolTCP && in(p.TCP.DestinationPort)
	case p.UDP != nil:
		return f.proto == corev1.ProtocolUDP && in(p.UDP.DestinationPort)
	case p.SCTP != nil:
		return f.proto == corev1.ProtocolSCTP && in(p.SCTP.DestinationPort)
	case f.proto == "":
		return false
	case f.egress:
		return o.someAt(f.peer, action, func(at *corev1.Pod) bool {
			return namesPort(at, p.DestinationNamedPort, f.proto, f.port) &&
				slices.ContainsFunc(peers, func(p v1beta1.ClusterNetworkPolicyEgressPeer) bool { return o.clusterSelects(&p, at) })
		})
	}
	return namesPort(f.pod, p.DestinationNamedPort, f.proto, f.port)
}

func (g generator) clusterPolicy(i int) *v1beta1.ClusterNetworkPolicy {
	p := &v1beta1.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: string(rune('a' + i))}}
	p.Spec.Tier = pick(g, v1beta1.AdminTier, v1beta1.AdminTier, v1beta1.BaselineTier)
	p.Spec.Priority = pick[int32](g, 0, 1, 2)
	if g.one(2) {
		p.Spec.Subject.Namespaces = g.selector()
	} else {
		p.Spec.Subject.Pods = &v1beta1.NamespacedPod{NamespaceSelector: *g.selector(), PodSelector: *g.selector()}
	}
	for range g.IntN(4) {
		r := v1beta1.ClusterNetworkPolicyIngressRule{Action: pick(g, acceptIt, denyIt, passIt), Protocols: g.protocols(true)}
		for range 1 + g.IntN(2) {
			peer := g.clusterPods()
			r.From = append(r.From, v1beta1.ClusterNetworkPolicyIngressPeer{Namespaces: peer.Namespaces, Pods: peer.Pods})
		}
		p.Spec.Ingress = append(p.Spec.Ingress, r)
	}
	for range g.IntN(4) {
		r := v1beta1.ClusterNetworkPolicyEgressRule{Action: pick(g, acceptIt, denyIt, passIt)}
		named := true
		for range 1 + g.IntN(2) {
			peer := g.clusterPods()
			switch g.IntN(4) {
			case 0:
				peer, named = v1beta1.ClusterNetworkPolicyEgressPeer{Nodes: g.selector()}, false
			case 1:
				peer, named = v1beta1.ClusterNetworkPolicyEgressPeer{Networks: []v1beta1.CIDR{v1beta1.CIDR(pick(g, networks...)), v1beta1.CIDR(pick(g, networks...))}}, false
			}
			r.To = append(r.To, peer)
		}
		r.Protocols = g.protocols(named)
		p.Spec.Egress = append(p.Spec.Egress, r)
	}
	return p
}

// clusterPods returns a peer, sometimes of a kind that is not known yet.
func (g generator) clusterPods() (p v1beta1.ClusterNetworkPolicyEgressPeer) {
	switch {
	case g.one(30):
	case g.one(2):
		p.Namespaces = g.selector()
	default:
		p.Pods = &v1beta1.NamespacedPod{NamespaceSelector: *g.selector(), PodSelector: *g.selector()}
	}
	return p
}

func (g generator) protocols(named bool) (out []v1beta1.ClusterNetworkPolicyProtocol) {
	for range g.IntN(3) {
		port := &v1beta1.Port{Number: pick[int32](g, 79, 80, 81, 8080)}
		if g.one(3) {
			port = &v1beta1.Port{Range: &v1beta1.PortRange{Start: pick[int32](g, 1, 80), End: pick[int32](g, 81, 8080, 65535)}}
		}
		var p v1beta1.ClusterNetworkPolicyProtocol
		switch g.IntN(5) {
		case 0:
			p.UDP = &v1beta1.ClusterNetworkPolicyProtocolUDP{DestinationPort: port}
		case 1:
			p.SCTP = &v1beta1.ClusterNetworkPolicyProtocolSCTP{DestinationPort: port}
		case 2:
			if named {
				p.DestinationNamedPort = pick(g, "web", "dns", "none")
				break
			}
			fallthrough
		default:
			p.TCP = &v1beta1.ClusterNetworkPolicyProtocolTCP{DestinationPort: port}
		}
		out = append(out, p)
	}
	return out
}
