package policy

import "net/netip"

// Query asks about one flow, as the sandbox or the published port's client sees
// it. Addresses may be 4-in-6 forms. In egress the destination is judged; in
// ingress the source is, and the destination is the sandbox's own address and
// port.
type Query struct {
	Ingress            bool
	Proto              uint8
	Src, Dst           netip.AddrPort
	ICMPType, ICMPCode uint8
}

// Rules is a compiled policy: immutable, safe for concurrent use. The zero
// value and nil deny everything.
type Rules struct {
	name            string
	egress, ingress *table
	deny            Action // of special refusals
	fallback        Action
	limits          Limits
}

// Name is the policy's name, empty for the zero value.
func (r *Rules) Name() string {
	if r == nil {
		return ""
	}
	return r.name
}

// Limits are the policy's limits, as written.
func (r *Rules) Limits() Limits {
	if r == nil {
		return Limits{}
	}
	return r.limits
}

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
		// A client on a link is told apart by zone, which no rule can name and
		// nothing will dial.
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
		key = portKey(p, port)
	case p == ICMPv4 || p == ICMPv6:
		key = portKey(p, uint16(q.ICMPType)<<8|uint16(q.ICMPCode))
	default:
		key = portKey(p, 0)
	}

	v, at := r.judge(t, peer, key, q)
	if v.action != Allow {
		return v
	}
	if !q.Ingress {
		if embeds := classes[at.embeds].embeds; embeds != nil {
			for _, inner := range embeds(target.As16()) {
				if w := r.judgeInner(inner, key, q); w.action != Allow {
					return w
				}
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
	v.target = netip.AddrPortFrom(target, port)
	return v
}

func (r *Rules) refuse(q Query, rule string) Verdict {
	return Verdict{rule: rule, proto: q.Proto, action: r.deny}
}

// judge finds the first rule for one address. The verdict has no target yet;
// the node says what kind of address it was (nil only if
// refused).
func (r *Rules) judge(t *table, peer netip.Addr, key uint32, q Query) (Verdict, *node) {
	i, ok := t.trie.Lookup(peer)
	if !ok {
		return r.refuse(q, ruleInvalid), nil
	}
	at := &t.nodes[i]
	info := &classes[at.class]
	if q.Ingress && info.martian || !q.Ingress && info.lock == never {
		return r.refuse(q, info.rule), at
	}
	if i := t.first(i, key); i != noRule {
		return Verdict{rule: t.rules[i].name, proto: q.Proto, action: t.rules[i].action}, at
	}
	if !q.Ingress && info.lock != open {
		return r.refuse(q, info.rule), at
	}
	return Verdict{rule: ruleDefault, proto: q.Proto, action: r.fallback}, at
}

// judgeInner judges an address that was found inside the destination. The
// gateway means the host's loopback only to a packet addressed to it, not to
// some translator on the way.
func (r *Rules) judgeInner(inner netip.Addr, key uint32, q Query) Verdict {
	if !inner.IsValid() {
		return Verdict{action: Allow} // the range embeds only one address
	}
	v, at := r.judge(r.egress, inner, key, q)
	if v.action == Allow && at.class == hostLoopback {
		return r.refuse(q, classes[gateway].rule)
	}
	return v
}
