package policy

import (
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"
)

// Where names are gated, flows that would resolve names past the gate are refused, even by a policy
// that opens the internet. Plain DNS is refused at every address, since the gate answers all of it.
// Where some names may not be asked, or rules by domain need to know which names were asked, two
// more kinds of flow are refused: DNS over TLS and QUIC, unless the allow rule lists their port
// explicitly; and everything to public resolvers (resolvers.go), unless the rule names the address
// by a CIDR not much wider than a site or by its exact domain.

const (
	// Allows a query for a name that no rule settles.
	ruleAnyName = "builtin:any-name"

	rulePlainDNS   = "builtin:dns"
	ruleDNSOverTLS = "builtin:dns-over-tls"
	ruleDoH        = "builtin:dns-over-https"

	portDNS        = 53
	portDNSOverTLS = 853
)

// plainDNS reports whether the gate must answer a flow.
func (r *Rules) plainDNS(q *Query) bool {
	return r.GatesNames() && !q.Ingress && carriesDNS(q.Proto) && q.Dst.Port() == portDNS
}

// hidesNames reports whether a resolver other than the gate could tell the sandbox
// more than the gate does.
func (r *Rules) hidesNames() bool {
	return r.GatesNames() && (r.domains.any || !r.everyName().Allowed)
}

func carriesDNS(proto uint8) bool { return proto == uint8(TCP) || proto == uint8(UDP) }

// bypass returns the name under which an allowed flow is refused after all, or the empty string.
// info is the rule that allowed it, nil for the default.
func (j *judgement) bypass(peer netip.Addr, info *ruleInfo, m match) string {
	q := j.query
	if q.Ingress || !carriesDNS(q.Proto) || !j.rules.hidesNames() {
		return ""
	}
	if q.Dst.Port() == portDNSOverTLS && (info == nil || !info.listsDNSOverTLS) {
		return ruleDNSOverTLS
	}
	if !isPublicResolver(peer) || info != nil && info.resolvers != nil && info.resolvers.Contains(peer) {
		return ""
	}
	if m.rule != noRule && j.namedExactly(m.rule) {
		return ""
	}
	return ruleDoH
}

// namedExactly reports whether a rule names the destination itself, not as part of a wider pattern.
func (j *judgement) namedExactly(rule int32) bool {
	found := false
	j.query.Names.each(j.query.Dst.Addr(), j.query.Now, j.query.Held, func(name string) {
		e := j.rules.domains.at[name]
		found = found || e != nil && e[exact] != nil && slices.Contains(e[exact].rules, rule)
	})
	return found
}

// nameBypass records the ways around the gate that a rule names explicitly.
func (info *ruleInfo) nameBypass(r *Rule) {
	for _, p := range r.Ports {
		if p.Port == portDNSOverTLS && (p.EndPort == 0 || p.EndPort == portDNSOverTLS) {
			info.listsDNSOverTLS = true
		}
	}
	for _, p := range r.To {
		narrow := 48
		if p.CIDR.Addr().Is4() {
			narrow = 24
		}
		if p.CIDR.IsValid() && p.CIDR.Bits() >= narrow && publicResolvers.OverlapsPrefix(p.CIDR) {
			if info.resolvers == nil {
				info.resolvers = new(bart.Lite)
			}
			info.resolvers.Insert(p.CIDR)
		}
	}
}
