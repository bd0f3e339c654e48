// Package kube compiles the policies that users of Kubernetes write into package policy's
// own, one for each pod, which the pod's worker enforces.
//
// It is a pure library: State holds what it needs to know of a cluster, and nothing in it
// watches, dials or keeps time. It must not know the API server, workers or sockets. Neither
// workers nor the CNI plugin import it: the API's types are large.
//
//	Pods, Namespaces, Nodes ──► State ──Compile──► Compiled.Policy ──► a worker's policy.set
//	NetworkPolicies ───────────►                   Compiled.Notes  ──► a person
//
// # NetworkPolicy
//
// The whole of networking.k8s.io/v1 is followed, as its reference says:
// https://kubernetes.io/docs/reference/kubernetes-api/networking/network-policy-v1/ and
// https://kubernetes.io/docs/concepts/services-networking/network-policies/. Policies that select a pod add
// up: an allow rule for each of their rules, then, if any of them isolates the pod in that
// direction, a rule that drops the rest ("isolated"), else one that allows it ("not-selected").
//
//   - A pod's own node always reaches it ("node", the first rule): kubelet's probes come from there.
//     The way out to the node has to be allowed, as the reference has it.
//   - A pod with host network is selected by nothing. It is its node's address, which an ipBlock
//     can name.
//   - A pod that has ended is no peer. One that is being deleted is still a peer, because it is
//     still at work during its grace period; but not beside another pod with the same address, which
//     has been given to that one then. Its own policies hold for as long as it is there.
//   - A named port in ingress is the port that the pod itself names. In egress it is the port that each
//     destination pod names, with any kind of peer, so that an address which is no pod has none.
//   - What a policy says of SCTP is compiled, but no worker carries SCTP: a rule for it alone lets
//     nothing pass, and a Note says so.
//   - A rule without ports allows every protocol, ICMP included. One with ports allows no ICMP.
//   - What cannot be read matches nothing, and is told in a Note.
//
// An ipBlock, and a rule without peers, holds the addresses inside it that are special to package
// policy where pods have business there: link-local ones, class E and the node's own. It does not hold
// the others: a metadata service is opened only by an ipBlock of its address, or of a network
// that has nothing but metadata services, because it hands a node's credentials to who asks. Multicast
// likewise needs a network inside of 224.0.0.0/4 or ff00::/8.
//
// # Names, order, size
//
// A rule is named NetworkPolicy/NAMESPACE/NAME/INDEX, the index being that in the object's list for
// the direction. Where one rule takes several of package policy the others have a
// suffix: NetworkPolicy/default/web/0.1. Objects are taken by namespace and name, so that one State
// has one result.
//
// A selector becomes the addresses that its pods have at this moment, joined into networks where
// they fill them: an address that no pod has now may be another pod's a moment later, so that no
// network is ever rounded up. All rules and pods share one list of each selector. Matching is a
// lookup in a trie, however many addresses there are. With 10 000 scattered pods in one selector a policy has about
// 300 KB of text; MaxPeers bounds all of it, and a pod with more is closed to all but its node, and
// told in a Note.
package kube
