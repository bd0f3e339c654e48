package kube

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	"sluice.dev/sluice/policy"
)

// Key names a namespaced object.
type Key struct{ Namespace, Name string }

func (k Key) String() string { return k.Namespace + "/" + k.Name }

func (k Key) compare(l Key) int {
	return cmp.Or(strings.Compare(k.Namespace, l.Namespace), strings.Compare(k.Name, l.Name))
}

// State is one moment of a cluster, from which policies are compiled. The package only reads it.
type State struct {
	Namespaces map[string]map[string]string // labels by name
	Pods       []Pod
	Nodes      []Node
	// Host is policy.Environment.Host on the node of the compiled pods.
	Host            []netip.Prefix
	NetworkPolicies []*networkingv1.NetworkPolicy
	// ClusterNetworkPolicies are of either version: see FromV1Alpha2.
	ClusterNetworkPolicies []*v1beta1.ClusterNetworkPolicy
}

// Pod holds what a policy can ask about a pod. A Pod must not be changed once it is handed over.
type Pod struct {
	Key
	Labels map[string]string
	Addrs  []netip.Addr // of every family
	Node   string
	Ports  []NamedPort

	// HostNetwork is set for a pod that has its node's addresses: no selector selects it, either as
	// a subject or as a peer.
	HostNetwork bool
	// Done is set for a pod whose containers have ended for good. It is never a peer.
	Done bool
	// Terminating is set for a pod that is being deleted. It is a peer while no other pod has its
	// address.
	Terminating bool
}

// NamedPort is a container port that a policy can name.
type NamedPort struct {
	Name     string
	Protocol policy.Protocol
	Number   uint16
}

// Node holds what a policy can ask about a node.
type Node struct {
	Name   string
	Labels map[string]string
	Addrs  []netip.Addr
}

// PodOf extracts what policies need from a Pod object.
func PodOf(o *corev1.Pod) Pod {
	p := Pod{
		Key: Key{o.Namespace, o.Name}, Labels: o.Labels, Node: o.Spec.NodeName, HostNetwork: o.Spec.HostNetwork,
		Done:        o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed,
		Terminating: o.DeletionTimestamp != nil,
	}
	for _, ip := range o.Status.PodIPs {
		p.addAddr(ip.IP)
	}
	if len(o.Status.PodIPs) == 0 {
		p.addAddr(o.Status.PodIP)
	}
	for i := range o.Spec.Containers {
		p.addPorts(&o.Spec.Containers[i])
	}
	for i := range o.Spec.InitContainers {
		if c := &o.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			p.addPorts(c) // a sidecar runs beside the containers
		}
	}
	return p
}

func (p *Pod) addAddr(s string) {
	if a, ok := address(s); ok {
		p.Addrs = append(p.Addrs, a)
	}
}

// addPorts adds the named ports of a container. Of two with one name, the first counts.
func (p *Pod) addPorts(c *corev1.Container) {
	for _, cp := range c.Ports {
		proto, ok := protocol(&cp.Protocol)
		if !ok || cp.Name == "" || cp.ContainerPort < 1 || cp.ContainerPort > 65535 {
			continue
		}
		if _, taken := p.port(cp.Name, proto); !taken {
			p.Ports = append(p.Ports, NamedPort{cp.Name, proto, uint16(cp.ContainerPort)})
		}
	}
}

// samePeer reports whether two pods differ only in labels and node.
func (p *Pod) samePeer(q *Pod) bool {
	return p.Key == q.Key && p.HostNetwork == q.HostNetwork && p.Done == q.Done && p.Terminating == q.Terminating &&
		slices.Equal(p.Addrs, q.Addrs) && slices.Equal(p.Ports, q.Ports)
}

// port finds a named port.
func (p *Pod) port(name string, proto policy.Protocol) (uint16, bool) {
	for _, n := range p.Ports {
		if n.Name == name && n.Protocol == proto {
			return n.Number, true
		}
	}
	return 0, false
}

// NodeOf extracts what policies need from a Node object.
func NodeOf(o *corev1.Node) Node {
	n := Node{Name: o.Name, Labels: o.Labels}
	for _, s := range o.Status.Addresses {
		if a, ok := address(s.Address); ok {
			n.Addrs = append(n.Addrs, a)
		}
	}
	return n
}

// address parses an address as the API writes it. It fails for a host name.
func address(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

// protocol parses a protocol; the default is TCP.
func protocol(p *corev1.Protocol) (policy.Protocol, bool) {
	if p == nil {
		return policy.TCP, true
	}
	switch *p {
	case "", corev1.ProtocolTCP:
		return policy.TCP, true
	case corev1.ProtocolUDP:
		return policy.UDP, true
	case corev1.ProtocolSCTP:
		return policy.SCTP, true
	}
	return 0, false
}
