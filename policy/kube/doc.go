// Package kube compiles the policies that Kubernetes users write into package policy's own,
// one for each pod. The pod's worker enforces it.
//
// It is a pure library: State and Index hold what it needs to know about a cluster, and nothing in
// it watches, dials or keeps time. It must not know the API server, workers or sockets. Neither
// workers nor the CNI plugin import it, because the API's types are large.
//
//	Pods, Namespaces, Nodes ──► State ──Compile──► Compiled.Policy ──► a worker's policy.set
//	NetworkPolicies,
//	ClusterNetworkPolicies ────►                   Compiled.Notes  ──► a person
//
//	the same, one by one ──► Index ──Changes──► the pods of one node whose policy has changed
//
// # NetworkPolicy
//
// The package implements all of networking.k8s.io/v1 as its reference describes it:
// https://kubernetes.io/docs/reference/kubernetes-api/networking/network-policy-v1/ and
// https://kubernetes.io/docs/concepts/services-networking/network-policies/. Policies that select a
// pod add up: each of their rules becomes an allow rule. If any of them isolates the pod in that
// direction, a rule that drops the rest follows ("isolated"), otherwise one that allows it
// ("not-selected").
//
//   - A pod's own node always reaches it ("node", the first rule), because kubelet's probes come
//     from there. Traffic to the node must be allowed, as the reference says.
//   - No policy selects a pod with host network. Its address is its node's, which an ipBlock can
//     name.
//   - A pod that has ended is no peer. A pod that is being deleted is still a peer, because it
//     still works during its grace period, unless another pod has its address: the address has
//     then passed to that pod. Its own policies apply for as long as it exists.
//   - A named port in ingress is the port that the pod itself names. In egress it is the port that
//     each destination pod names, with any kind of peer; an address that is not a pod's has none.
//   - Rules for SCTP are compiled, but no worker carries SCTP: a rule for SCTP alone lets nothing
//     pass, and a Note says so.
//   - A rule without ports allows every protocol, ICMP included. One with ports allows no ICMP.
//   - Anything unreadable matches nothing, and a Note says so.
//
// Some addresses are special to package policy. An ipBlock, and a rule without peers, includes those
// inside it that pods have a use for: link-local addresses, class E and the node's own. It excludes
// the others. A metadata service hands a node's credentials to anyone who asks, so only an ipBlock
// of its address, or of a network of nothing but metadata services, opens it. Multicast likewise
// needs a network inside 224.0.0.0/4 or ff00::/8.
//
// # ClusterNetworkPolicy
//
// The package implements policy.networking.k8s.io/v1beta1, and v1alpha2 by FromV1Alpha2, as
// https://network-policy-api.sigs.k8s.io/reference/spec/ describes them. For each direction of a pod
// the order is
//
//	node         its own node, to the pod
//	Admin        by priority, then by name, then by index
//	NetworkPolicy
//	Baseline     as Admin, for pods that no NetworkPolicy isolates
//	             accepted: all pods can communicate
//
// Accept and Deny become rules of package policy, where the first match decides; Deny drops. Package
// policy has no tiers and no Pass. The rules of the lower tiers therefore replace a Pass rule, each
// cut to what the Pass rule matches. A last rule drops the special addresses that none of them opens
// ("not-opened"). Neighbouring Pass rules are cut together, and one for everything ends the tier. The
// cost is a copy of the lower tiers for each run of Pass rules. Below Baseline, what applies without
// policies applies.
//
//   - A rule is unknown if it has a peer, protocol or port with no known field or with two, an
//     unreadable selector or network, a named port with a peer that is not a pod, or domain names
//     in a rule other than Accept. An unknown Accept rule matches nothing; an unknown Deny or Pass
//     rule denies everything in its direction.
//   - A policy of an unknown tier, or with an unreadable subject, accepts nothing, and its other
//     rules deny: in the tier Admin, and for every pod. A rule with an unknown action denies too.
//   - A Deny rule takes the wider reading of anything not known yet: it matches pods whose namespace
//     is not known, and an address that two pods claim if it would deny either.
//   - domainNames are rules by domain (docs/policy.md); their "*." is "**." there. The API asks only
//     for the address of a name; the worker also reads the name in the flow's first bytes, and
//     accepts no private address for it. A policy with such rules turns on the gate of names, which
//     answers the pod's questions: all of them if the pod may send any to port 53 of anything,
//     otherwise those for the names of its rules. Only a Pass rule for everything includes them.
//
// # Names, order, size
//
// A rule is named NetworkPolicy/NAMESPACE/NAME/INDEX, where INDEX counts in the object's list for
// the direction, and ClusterNetworkPolicy/NAME/INDEX or, if the rule has a name, .../INDEX/RULE.
// Where one rule becomes several of package policy, the others have a suffix:
// NetworkPolicy/default/web/0.1. Objects are taken by namespace and name, so that one State has one
// result.
//
// A selector becomes the current addresses of its pods, joined into networks where they fill them. No
// network is ever rounded up, because an address that no pod has now may belong to another pod a
// moment later. All rules and pods share one list for each selector. Matching is a lookup in a trie,
// however many addresses there are. A selector of 10 000 pods, scattered as badly as possible, is
// 300 KB of text in a policy. MaxPeers bounds all of it: a pod with more is closed to everything but
// its node, and a Note says so.
//
// An Index of 10 000 pods and 1 000 policies holds about 6 MiB; bench_test.go measures it and the
// cost of each kind of change. It keeps the parsed policies, not the objects.
package kube
