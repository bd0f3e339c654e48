package policy

import (
	"cmp"
	"net/netip"
)

// An address is judged by the lower of two rules: the first by address, from the tree of ranges
// (compile.go), and the first by domain, from the names under which the address is granted
// (domains.go). A name never reaches a special address that is not open.
//
// A rule by domain that requires a name is a candidate until the first bytes are read. Until then
// the verdict asks for them and does not allow; the same query with the answer filled in is decided
// for good.
type judgement struct {
	rules *Rules
	table *table
	query *Query
	key   uint32
	// hopeful reports, for the address that was judged last, that an unread flow is allowed if it
	// says the right thing.
	hopeful bool
}

// match is the rule by domain that matches, or may match once the first bytes are read.
type match struct {
	rule    int32
	name    string
	pending bool
	allows  bool  // pending, and some granted name leads to an allow rule
	tried   int32 // the candidate that did not match what was seen, else noRule
	reason  Reason
}

// judge finds the first rule for one address. The verdict has no target yet. The node gives the
// kind of address, and is nil only if the flow is refused.
func (j *judgement) judge(peer netip.Addr) (Verdict, *node) {
	r, t, q := j.rules, j.table, j.query
	j.hopeful = false
	i, ok := t.trie.Lookup(peer)
	if !ok {
		return r.refuse(*q, ruleInvalid), nil
	}
	at := &t.nodes[i]
	info := &classes[at.class]
	if q.Ingress && info.martian || !q.Ingress && info.lock == never {
		return r.refuse(*q, info.rule), at
	}
	byAddress := t.first(i, j.key)
	first := byAddress
	m := match{rule: noRule, tried: noRule}
	if !q.Ingress && info.lock == open && r.domains.any {
		if m = j.byName(isPrivate(peer), first); m.rule != noRule {
			first = m.rule
		}
	}

	v := Verdict{rule: ruleDefault, proto: q.Proto, action: r.fallback, requests: r.fallback == Allow && m.tried != noRule && q.Seen.isHTTP()}
	var decided *ruleInfo
	switch {
	case first != noRule:
		decided = &t.rules[first]
		v = j.verdict(decided, m)
	case info.closed(q.Ingress):
		return r.refuse(*q, info.rule), at
	}
	if v.action == Allow {
		if rule := j.bypass(peer, decided, m); rule != "" {
			v = r.refuse(*q, rule)
		}
	}
	if v.verify != VerifyNone {
		j.hopeful = r.audit && !info.closed(q.Ingress) || j.mayAllow(peer, info, decided, m, byAddress)
	}
	if v.verify == VerifyNone && v.action != Allow {
		if m.tried == noRule && !q.Ingress && info.lock == open {
			if isPrivate(peer) {
				m.tried, m.reason = j.candidate(false, first), ReasonPrivate
			}
			if m.tried == noRule && v.reason == ReasonNone {
				m.tried, m.reason = j.former(isPrivate(peer), first)
			}
		}
		if m.tried != noRule {
			v.tried, v.reason = t.rules[m.tried].name, m.reason
		}
		switch {
		case !r.audit || info.closed(q.Ingress):
		case j.learns():
			v = Verdict{rule: v.rule, proto: v.proto, action: r.deny, reason: ReasonUnread, verify: VerifyFirstBytes}
			j.hopeful = true
		default:
			v.action, v.audited = Allow, true
		}
	}
	return v, at
}

// mayAllow reports whether any possible first bytes lead to a rule that allows the flow: the rule
// that decides regardless of them, the rule of a granted name, or the rule by address or default
// behind them all.
func (j *judgement) mayAllow(peer netip.Addr, info *classInfo, decided *ruleInfo, m match, byAddress int32) bool {
	r, t, q := j.rules, j.table, j.query
	if !m.pending {
		return j.bypass(peer, decided, m) == ""
	}
	unnamed := match{rule: noRule}
	may := r.fallback == Allow && !info.closed(q.Ingress) && j.bypass(peer, nil, unnamed) == ""
	if byAddress != noRule {
		info := &t.rules[byAddress]
		may = info.action == Allow && j.bypass(peer, info, unnamed) == ""
	}
	if may || !m.allows || j.bypass(peer, nil, unnamed) == "" {
		return may || m.allows
	}
	q.Names.each(q.Dst.Addr(), q.Now, q.Held, func(name string) {
		if i := r.domains.first(name, viewCandidate, isPrivate(peer), j.key, byAddress); i != byAddress {
			may = may || t.rules[i].action == Allow && j.bypass(peer, &t.rules[i], match{rule: i, name: name}) == ""
		}
	})
	return may
}

// learns reports whether a flow that passes only because of audit mode should be read for its name
// first. It should if its destination was granted under a name and its client speaks first. Rules
// will be made from what is logged about it.
func (j *judgement) learns() bool {
	q := j.query
	if q.Ingress || q.Seen.Kind != SeenNone || !speaksFirst(q.Proto, q.Dst.Port()) {
		return false
	}
	granted := false
	q.Names.each(q.Dst.Addr(), q.Now, q.Held, func(string) { granted = true })
	return granted
}

// verdict returns the verdict of a rule that was found. The match says how, if it was found by
// domain.
func (j *judgement) verdict(info *ruleInfo, m match) Verdict {
	r, seen := j.rules, &j.query.Seen
	v := Verdict{rule: info.name, proto: j.query.Proto, action: info.action, name: m.name}
	byName := m.rule != noRule
	switch {
	case byName && info.noQUIC && v.proto == uint8(UDP):
		v.action, v.name, v.tried, v.reason = Reject, "", info.name, ReasonQUIC
	case m.pending, info.http != nil && seen.Kind == SeenNone:
		v = Verdict{rule: info.name, proto: v.proto, action: r.deny, tried: info.name, reason: ReasonUnread, verify: VerifyFirstBytes}
		if info.http != nil {
			v.verify = VerifyRequest
		}
	case info.action != Allow:
		v.name = ""
	case info.http != nil:
		v.requests = true
		switch {
		case !seen.isHTTP():
			v = Verdict{rule: info.name, proto: v.proto, action: r.deny, tried: info.name, reason: cmp.Or(seen.Flaw, ReasonNotHTTP)}
		case !requestMatches(info.http, seen.Method, seen.Path):
			v = Verdict{rule: info.name, proto: v.proto, action: r.deny, tried: info.name, reason: ReasonRequest}
		case seen.Override:
			v = Verdict{rule: info.name, proto: v.proto, action: r.deny, tried: info.name, reason: ReasonOverride}
		}
	case byName && seen.Method == methodConnect:
		// Nobody sees where a tunnel through a proxy leads.
		v = Verdict{rule: info.name, proto: v.proto, action: r.deny, tried: info.name, reason: ReasonRequest}
	default:
		// The next request may say another name, for which another rule decides.
		v.requests = (byName || m.tried != noRule) && seen.isHTTP()
	}
	return v
}

// byName finds the lowest rule by domain below best. Names are granted for the destination; the
// judged address may be one that it embeds.
func (j *judgement) byName(private bool, best int32) match {
	q, d := j.query, j.rules.domains
	dst, said := q.Dst.Addr(), q.Seen.Name
	m := match{rule: noRule, tried: noRule}
	if q.Seen.Kind == SeenNone {
		same := true // every name leads to the same rule
		q.Names.each(dst, q.Now, q.Held, func(name string) {
			i := d.first(name, viewCandidate, private, j.key, best)
			same = same && (m.name == "" || i == m.rule)
			m.allows = m.allows || i < best && j.table.rules[i].action == Allow
			if m.name == "" || i < m.rule {
				m.rule, m.name = i, name
			}
		})
		if m.rule >= best {
			return match{rule: noRule, tried: noRule}
		}
		byGrant := d.first(m.name, viewGrant, private, j.key, best) == m.rule
		m.pending = !byGrant && (!same || j.table.rules[m.rule].action == Allow)
		return m
	}

	others := viewUnread
	held := false
	switch {
	case q.Seen.namelessAt(dst) && q.Seen.ECH:
		others = viewNamelessECH
	case q.Seen.namelessAt(dst):
		others = viewNameless
	}
	if said != "" {
		others = viewGrant
		held = said == q.Held || q.Names.Holds(said, dst, q.Now)
		own := viewSaid
		switch {
		case held && q.Seen.ECH:
			own = viewECH
		case held:
			own = viewCandidate
		}
		if i := d.first(said, own, private, j.key, best); i < best {
			m.rule, m.name = i, said
		}
	}
	q.Names.each(dst, q.Now, q.Held, func(name string) {
		if i := d.first(name, others, private, j.key, min(best, m.rule)); i < min(best, m.rule) {
			m.rule, m.name = i, name
		}
	})
	if m.tried = j.candidate(private, min(best, m.rule)); m.tried != noRule {
		switch {
		case said == "":
			m.reason = cmp.Or(q.Seen.Flaw, ReasonNoName)
		case held && q.Seen.ECH && d.first(said, viewCandidate, private, j.key, best) == m.tried:
			m.reason = ReasonECH
		default:
			m.reason = ReasonMismatch
		}
	}
	return m
}

// candidate returns the lowest rule by domain below best that would match but for the name, or
// noRule.
func (j *judgement) candidate(private bool, best int32) int32 {
	q, lowest := j.query, best
	q.Names.each(q.Dst.Addr(), q.Now, q.Held, func(name string) {
		lowest = j.rules.domains.first(name, viewCandidate, private, j.key, lowest)
	})
	if lowest == best {
		return noRule
	}
	return lowest
}

// former returns the lowest rule by domain below best that would allow the flow, or ask for its
// first bytes, if one of the address's earlier grants still held, or noRule. why is the reason that
// the grant ended.
func (j *judgement) former(private bool, best int32) (tried int32, why Reason) {
	q, tried := j.query, noRule
	q.Names.former(q.Dst.Addr(), q.Now, func(name string, evicted bool) {
		i := j.rules.domains.first(name, viewCandidate, private, j.key, best)
		if i >= best || j.table.rules[i].action != Allow {
			return
		}
		best, tried, why = i, i, ReasonGrantExpired
		if evicted {
			why = ReasonGrantEvicted
		}
	})
	return tried, why
}

// closedClient returns the name under which a client is refused although the rules allow it, or the
// empty string. The sandbox answers a client whatever the egress rules say, so two kinds of address
// cannot be clients: one that carries an address closed to every rule, and, while names are gated,
// a server that would resolve names past the gate.
func (j *judgement) closedClient(peer netip.Addr, at *node) string {
	q := j.query
	for _, inner := range j.rules.carriers.embedded(at.embeds, peer) {
		if c := j.classOf(inner); classes[c].lock == never || classes[c].namedClient {
			return classes[c].rule
		}
	}
	if !carriesDNS(q.Proto) || !j.rules.GatesNames() {
		return ""
	}
	switch port := q.Src.Port(); {
	case port == portDNS:
		return rulePlainDNS
	case port != portDNSOverTLS && !isPublicResolver(peer):
	case j.rules.Decide(Query{Proto: q.Proto, Src: q.Dst, Dst: netip.AddrPortFrom(peer, port), Names: q.Names, Now: q.Now}).Allowed():
	case port == portDNSOverTLS:
		return ruleDNSOverTLS
	default:
		return ruleDoH
	}
	return ""
}

// classOf returns the class of an address found inside the peer.
func (j *judgement) classOf(inner netip.Addr) class {
	i, ok := j.table.trie.Lookup(inner)
	if !ok {
		return ordinary // the range embeds only one address
	}
	return j.table.nodes[i].class
}

// judgeInner judges an address found inside the destination. The gateway stands for the host's
// loopback only in a packet addressed to it, not for a translator on the way.
func (j *judgement) judgeInner(inner netip.Addr) Verdict {
	if !inner.IsValid() {
		j.hopeful = false
		return Verdict{action: Allow} // the range embeds only one address
	}
	v, at := j.judge(inner)
	if at != nil && at.class == hostLoopback {
		j.hopeful = false
	}
	if v.action == Allow && at.class == hostLoopback {
		return j.rules.refuse(*j.query, classes[gateway].rule)
	}
	return v
}
