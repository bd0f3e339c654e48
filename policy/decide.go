package policy

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"time"
)

// Query asks about one flow, as seen by the sandbox or by the client of a published port. Addresses
// may be 4-in-6 forms. In egress the destination is judged; in ingress the source is, and the
// destination is the sandbox's own address and port.
type Query struct {
	Ingress            bool
	Proto              uint8
	Src, Dst           netip.AddrPort
	ICMPType, ICMPCode uint8

	// Used by rules by domain, none of which matches without them: the names that the sandbox was
	// told, the time, and what the first bytes said.
	Names *Names
	Now   time.Time
	Seen  Seen
	// Held is the Verdict.Name of a flow that was admitted earlier: its grant counts as long as the
	// flow lives.
	Held string
}

// Rules is a compiled policy: immutable, safe for concurrent use. The zero
// value and nil deny everything.
type Rules struct {
	name            string
	egress, ingress *table
	domains         *domains
	deny            Action // of special refusals
	fallback        Action
	audit           bool
	dns             DNS
	carriers        carriers
	limits          Limits
	ruleLimits      map[string]RuleLimits // by the rule's name in verdicts
}

// Name returns the policy's name, empty for the zero value.
func (r *Rules) Name() string {
	if r == nil {
		return ""
	}
	return r.name
}

// Limits returns the policy's limits as written.
func (r *Rules) Limits() Limits {
	if r == nil {
		return Limits{}
	}
	return r.limits
}

// RuleLimits yields the rules that have limits of their own, keyed by the name in verdicts.
func (r *Rules) RuleLimits() iter.Seq2[string, RuleLimits] {
	if r == nil {
		return maps.All[map[string]RuleLimits](nil)
	}
	return maps.All(r.ruleLimits)
}

// Audit reports whether the policy is in audit mode.
func (r *Rules) Audit() bool { return r != nil && r.audit }

// Decide judges one flow. It does not allocate.
func (r *Rules) Decide(q Query) Verdict {
	if r == nil || r.egress == nil {
		return Verdict{rule: ruleNoPolicy, proto: q.Proto}
	}
	if q.Dst.Addr().Zone() != "" {
		return r.refuse(q, ruleZone) // asked before Unmap, which forgets it
	}
	// Unmap before any other question is asked of an address (CVE-2024-24790).
	target := q.Dst.Addr().Unmap()
	peer, t := target, r.egress
	if q.Ingress {
		// Clients on a link are distinguished by zone, which no rule can name and nothing will
		// dial.
		peer, t = q.Src.Addr().Unmap().WithZone(""), r.ingress
	}
	if !target.IsValid() || !peer.IsValid() {
		return r.refuse(q, ruleInvalid)
	}

	var key uint32
	var port uint16
	switch p := Protocol(q.Proto); {
	case p.hasPorts():
		if port = q.Dst.Port(); port == 0 {
			return r.refuse(q, rulePortZero)
		}
		if r.plainDNS(&q) {
			return r.refuse(q, rulePlainDNS)
		}
		key = portKey(p, port)
	case p == ICMPv4 || p == ICMPv6:
		key = portKey(p, uint16(q.ICMPType)<<8|uint16(q.ICMPCode))
	default:
		key = portKey(p, 0)
	}

	j := judgement{rules: r, table: t, query: &q, key: key}
	v, at := j.judge(peer)
	hopeful := v.action == Allow || j.hopeful
	if !hopeful {
		return v
	}
	if q.Ingress {
		if rule := j.closedClient(peer, at); rule != "" {
			return r.refuse(q, rule)
		}
	} else {
		for _, inner := range r.carriers.embedded(at.embeds, target) {
			w := j.judgeInner(inner)
			hopeful = hopeful && (w.action == Allow || j.hopeful)
			switch {
			case v.verify != VerifyNone:
				continue
			case w.action != Allow && w.verify == VerifyNone:
				return w
			case w.action != Allow:
				v = w
				continue
			}
			v.name, v.requests = cmp.Or(v.name, w.name), v.requests || w.requests
			if w.audited && !v.audited {
				v.audited, v.rule, v.tried, v.reason = true, w.rule, w.tried, w.reason
			}
		}
		if at.class == hostLoopback {
			if target.Is4() {
				target = hostLoopback4
			} else {
				target = hostLoopback6
			}
		}
	}
	if hopeful {
		v.target = netip.AddrPortFrom(target, port)
	}
	return v
}

func (r *Rules) refuse(q Query, rule string) Verdict {
	return Verdict{rule: rule, proto: q.Proto, action: r.deny}
}
