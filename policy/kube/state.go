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

// State is what policies are compiled from: one moment of a cluster. It is only read.
type State struct {
	Namespaces map[string]map[string]string // labels by name
	Pods       []Pod
	Nodes      []Node
	// Host is what policy.Environment.Host is on the node of the pods that are compiled.
	Host            []netip.Prefix
	NetworkPolicies []*networkingv1.NetworkPolicy
	// ClusterNetworkPolicies are of either version: see FromV1Alpha2.
	ClusterNetworkPolicies []*v1beta1.ClusterNetworkPolicy
}

// Pod is what a policy can ask of a pod. A Pod that was handed over is not changed any more.
type Pod struct {
	Key
	Labels map[string]string
	Addrs  []netip.Addr // of every family
	Node   string
	Ports  []NamedPort

	// HostNetwork is set for a pod that has its node's addresses: no selector selects it, neither
	// as a subject nor as a peer.
	HostNetwork bool
	// Done is set for a pod whose containers have ended for good. It is nobody's peer.
	Done bool
	// Terminating is set for a pod that is being deleted. It is a peer for as long as it
	// alone has its address.
	Terminating bool
}

// NamedPort is a container port that a policy can name.
type NamedPort struct {
	Name     string
	Protocol policy.Protocol
	Number   uint16
}

// Node is what a policy can ask of a node.
type Node struct {
	Name   string
	Labels map[string]string
	Addrs  []netip.Addr
}

// PodOf takes what policies need out of a Pod object.
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

// addPorts adds the named ports of a container. Where two have one name the first counts.
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

// samePeer reports whether two pods differ in nothing but labels and place.
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

// NodeOf takes what policies need out of a Node object.
func NodeOf(o *corev1.Node) Node {
	n := Node{Name: o.Name, Labels: o.Labels}
	for _, s := range o.Status.Addresses {
		if a, ok := address(s.Address); ok {
			n.Addrs = append(n.Addrs, a)
		}
	}
	return n
}

// address reads an address as the API writes it: the address of a host name is none.
func address(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

// protocol reads a protocol that is TCP where it is not said.
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
