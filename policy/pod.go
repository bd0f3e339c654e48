package policy

// DefaultPod is the policy of a pod that was given none: open in both directions,
// as pods are in a cluster without policies. The clouds' metadata services hand a
// node's credentials to whoever asks, so they stay closed until a policy names
// them; a link-local address that is none of them, as a node's own resolver has, is
// open. What is refused is dropped, as Kubernetes wants it.
func DefaultPod() *Policy {
	return &Policy{
		APIVersion: APIVersion,
		Kind:       Kind,
		Metadata:   Metadata{Name: "default"},
		Spec: Spec{
			DefaultAction: Drop,
			Egress: []Rule{
				{Name: "world", Action: Allow, To: []Peer{{Entity: EntityWorld}}},
				{Name: "link-local", Action: Allow, To: []Peer{{Entity: EntityLinkLocal}}},
			},
			Ingress: []Rule{{Name: "any", Action: Allow}},
		},
	}
}
