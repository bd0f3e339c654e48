// Package kube compiles the policies that users of Kubernetes write into package policy's
// own, one for each pod, which the pod's worker enforces.
//
// It is a pure library: State and Index hold what it needs to know of a cluster, and nothing in it
// watches, dials or keeps time. It must not know the API server, workers or sockets. Neither
// workers nor the CNI plugin import it: the API's types are large.
//
//	Pods, Namespaces, Nodes ──► State ──Compile──► Compiled.Policy ──► a worker's policy.set
//	NetworkPolicies,
//	ClusterNetworkPolicies ────►                   Compiled.Notes  ──► a person
//
//	the same, one by one ──► Index ──Changes──► the pods of one node whose policy is another now
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
// # ClusterNetworkPolicy
//
// policy.networking.k8s.io/v1beta1, and v1alpha2 by FromV1Alpha2, are followed as the text of
// https://network-policy-api.sigs.k8s.io/reference/spec/ says. For each direction of a pod the order is
//
//	node         its own node, to the pod
//	Admin        by priority, then by name, then by index
//	NetworkPolicy
//	Baseline     as Admin, for pods that no NetworkPolicy isolates
//	             accepted: all pods can communicate
//
// Accept and Deny are rules of package policy, where the first that matches decides; Deny drops.
// Package policy has no tiers and no Pass. A Pass rule is therefore replaced by what the
// lower tiers say, each of their rules cut to what the Pass rule matches, and closed by
// a rule that drops what is special and opened by none of them ("not-opened"). Neighbouring Pass
// rules are cut together, and one for everything ends the tier. The cost is a copy of the lower tiers
// for each run of Pass rules. Below Baseline there is what holds without policies.
//
//   - A peer, protocol or port without a field that is known, or with two, a selector or network that
//     cannot be read, a named port of what is no pod, and domain names that are not
//     accepted make the rule unknown. An Accept rule matches nothing then, a Deny or Pass rule denies
//     everything in its direction.
//   - A policy of an unknown tier, or without a subject that can be read, accepts nothing, and its
//     other rules deny: in the tier Admin, and for every pod. So does a rule with an unknown action.
//   - A Deny rule takes the wider reading of what is not known yet: pods whose namespace is not
//     known, and an address that two pods claim, if it would deny either.
//   - domainNames are rules by domain (docs/policy.md): "*." is "**." there. The API asks for the address
//     of a name alone; the worker reads the name in the flow's first bytes as well, and takes no private
//     address for it. A policy with such rules turns the gate of names on, which answers the pod's
//     questions: all of them, if the pod may send any to port 53 of anything, else those for the
//     names of its rules. A Pass rule takes them along only if it is for everything.
//
// # Names, order, size
//
// A rule is named NetworkPolicy/NAMESPACE/NAME/INDEX, the index being that in the object's list for
// the direction, and ClusterNetworkPolicy/NAME/INDEX or, if the rule has a name, .../INDEX/RULE. Where one rule takes several of package policy the others have a
// suffix: NetworkPolicy/default/web/0.1. Objects are taken by namespace and name, so that one State
// has one result.
//
// A selector becomes the addresses that its pods have at this moment, joined into networks where
// they fill them: an address that no pod has now may be another pod's a moment later, so that no
// network is ever rounded up. All rules and pods share one list of each selector. Matching is a
// lookup in a trie, however many addresses there are. A selector of 10 000 pods that are scattered as badly
// as can be is 300 KB of text in a policy. MaxPeers bounds all of it: a pod with more is closed
// to all but its node, and told of in a Note.
//
// An Index of 10 000 pods and 1 000 policies holds about 6 MiB; bench_test.go measures it and what
// each kind of change costs. It keeps the parsed policies, not the objects.
package kube
