package policy

import "strings"

// Builtin is the policy that holds where none was given; it does not gate names. The zero value is the one of
// `sluice run`: public addresses only, every client of a published port. (The host's
// loopback is open too, once the Environment maps the gateway to it.) Refusals are
// rejected at once, and their rule names the flag that would have opened the address.
type Builtin struct {
	// AllowPrivate opens entity private, AllowHost the host's own addresses.
	AllowPrivate bool `json:"allowPrivate,omitempty"`
	AllowHost    bool `json:"allowHost,omitempty"`
	// Pod is the policy of a pod: open in both directions, as pods are in a cluster without
	// policies. The clouds' metadata services hand a node's credentials to whoever asks, so
	// they stay closed until a policy names them; the node itself is open, as its services are; a link-local address that is none of them,
	// as a node's own resolver has, is open. Refusals are dropped, as Kubernetes wants it.
	Pod bool `json:"pod,omitempty"`
}

// BuiltinName is the name of every built-in policy.
const BuiltinName = "default"

// needs begins the name of a rule that refuses for want of the flag that follows.
const needs = "needs"

// Policy is the policy itself, the caller's to change.
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
		// Entity world is whatever is not special, so the last rule refuses exactly the
		// private addresses: a special one keeps the name of its class, for no flag opens it.
		p.Spec.Egress[2].To = publicAddresses()
		p.Spec.Egress = append(p.Spec.Egress,
			Rule{Name: needs + "--allow-private", Action: Reject, To: []Peer{{Entity: EntityWorld}}})
	}
	return p
}

// publicAddresses is entity world without entity private.
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

// OpenedBy is the flag of `sluice run` that opens what the built-in policy refused with
// v; empty if there is none.
func (b Builtin) OpenedBy(v Verdict) string {
	_, rule, _ := strings.Cut(v.Rule(), " ")
	flag, ok := strings.CutPrefix(rule, needs)
	if v.Allowed() || !ok {
		return ""
	}
	return flag
}
