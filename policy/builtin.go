package policy

import "strings"

// Builtin is the policy used when none is given. It does not gate names. The zero value is that of
// `sluice run`: egress to public addresses only, and any client may connect to a published port.
// (The host's loopback is open too, once the Environment maps the gateway to it.) Refused flows are
// rejected at once, and the rule's name gives the flag that would have opened the address.
type Builtin struct {
	// AllowPrivate opens entity private, AllowHost the host's own addresses.
	AllowPrivate bool `json:"allowPrivate,omitempty"`
	AllowHost    bool `json:"allowHost,omitempty"`
	// Pod is the policy of a pod: open in both directions, as pods are in a cluster without
	// policies. Cloud metadata services hand a node's credentials to any client, so they stay
	// closed until a policy names them. The node itself is open, as are its services, and so are
	// other link-local addresses, such as a node's own resolver. Refused flows are dropped, as in
	// Kubernetes.
	Pod bool `json:"pod,omitempty"`
}

// BuiltinName is the name of every built-in policy.
const BuiltinName = "default"

// needs prefixes the name of a rule that refuses because the flag that follows is missing.
const needs = "needs"

// Policy returns the policy itself, which the caller may change.
func (b Builtin) Policy() *Policy {
	p := &Policy{APIVersion: APIVersion, Kind: Kind, Metadata: Metadata{Name: BuiltinName}}
	if b.Pod {
		p.Spec = Spec{
			DefaultAction: Drop,
			Egress: []Rule{
				{Name: "world", Action: Allow, To: []Peer{{Entity: EntityWorld}}},
				{Name: "link-local", Action: Allow, To: []Peer{{Entity: EntityLinkLocal}}},
				{Name: "node", Action: Allow, To: []Peer{{Entity: EntityHost}}},
			},
			Ingress: []Rule{{Name: "any", Action: Allow}},
			DNS:     DNS{Names: NamesUngated},
		}
		return p
	}
	hostRule := Rule{Name: "host", Action: Allow, To: []Peer{{Entity: EntityHost}}}
	if !b.AllowHost {
		hostRule.Name, hostRule.Action = needs+"--allow-host", Reject
	}
	p.Spec = Spec{
		DefaultAction: Reject,
		Egress: []Rule{
			hostRule,
			{Name: "host-loopback", Action: Allow, To: []Peer{{Entity: EntityHostLoopback}}},
			{Name: "internet", Action: Allow, To: []Peer{{Entity: EntityWorld}}},
		},
		Ingress: []Rule{{Name: "published", Action: Allow}},
		DNS:     DNS{Names: NamesUngated},
	}
	if !b.AllowPrivate {
		// Entity world is every address that is not special, so the last rule refuses exactly the
		// private addresses. A special address keeps the name of its class, because no flag opens
		// it.
		p.Spec.Egress[2].To = publicAddresses()
		p.Spec.Egress = append(p.Spec.Egress,
			Rule{Name: needs + "--allow-private", Action: Reject, To: []Peer{{Entity: EntityWorld}}})
	}
	return p
}

// publicAddresses returns entity world without entity private.
func publicAddresses() []Peer {
	v4, v6 := Peer{CIDR: everyIPv4}, Peer{CIDR: everyIPv6}
	for _, p := range privateRanges {
		if p.Addr().Is4() {
			v4.Except = append(v4.Except, p)
		} else {
			v6.Except = append(v6.Except, p)
		}
	}
	return []Peer{v4, v6}
}

// OpenedBy returns the flag of `sluice run` that opens what the built-in policy refused with v, or
// the empty string if there is none.
func (b Builtin) OpenedBy(v Verdict) string {
	_, rule, _ := strings.Cut(v.Rule(), " ")
	flag, ok := strings.CutPrefix(rule, needs)
	if v.Allowed() || !ok {
		return ""
	}
	return flag
}
