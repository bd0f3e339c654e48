package policy

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// The twin's idea of rules by domain: one rule and one name at a time, patterns
// compared label by label, no index and no views.

var (
	twinNow   = time.Unix(1_000_000, 0)
	twinNames = []string{"a.test", "b.test", "x.a.test", "y.x.a.test", "xa.test", "a.test.evil", "test"}
)

// twinMatch is how one rule matches by name.
type twinMatch struct{ hit, pending bool }

func (w twin) gates() bool {
	return w.p.Spec.DNS.Names != "ungated"
}

// byDomain reports whether some rule is by domain.
func (w twin) byDomain() bool {
	return slices.ContainsFunc(w.p.Spec.Egress, func(r Rule) bool {
		return slices.ContainsFunc(r.To, func(p Peer) bool { return p.Domain != "" })
	})
}

func twinMatches(r Rule, name string) bool {
	for _, p := range r.To {
		want, got := strings.Split(p.Domain, "."), strings.Split(name, ".")
		switch {
		case p.Domain == "":
		case want[0] == "**":
			if len(got) >= len(want) && slices.Equal(want[1:], got[len(got)-len(want)+1:]) {
				return true
			}
		case want[0] == "*":
			if len(got) == len(want) && slices.Equal(want[1:], got[1:]) {
				return true
			}
		case p.Domain == name:
			return true
		}
	}
	return false
}

// granted are the names that count for a query.
func twinGranted(q Query) []string {
	var out []string
	if q.Held != "" {
		out = append(out, q.Held)
	}
	for _, n := range twinNames {
		if q.Names.Holds(n, q.Dst.Addr(), q.Now) {
			out = append(out, n)
		}
	}
	return out
}

// free reports whether a rule asks for no name from such a flow.
func twinFree(r Rule, q Query) bool {
	if r.Verify == "grant" || q.Proto != 6 && q.Proto != 17 || r.QUIC == "refuse" && q.Proto == 17 {
		return true
	}
	port := q.Dst.Port()
	return r.Verify == "" && (q.Proto == 6 && slices.Contains([]uint16{21, 22, 25, 110, 143, 587, 3306, 5432}, port) ||
		q.Proto == 17 && (port == 123 || port == 3478))
}

// fits is all but the name.
func (w twin) fits(r Rule, q Query, a netip.Addr) bool {
	private := false
	for _, p := range privateRanges {
		private = private || p.Contains(a)
	}
	silent := r.Action == Allow && len(r.Ports)+len(r.ICMP) == 0 && q.Proto != 6 && q.Proto != 17
	return twinPorts(r, q) && !silent && (r.Action != Allow || !private || r.PrivateAddresses == "allow")
}

// candidate reports whether a rule is right but for what was said.
func (w twin) candidate(i int, q Query, a netip.Addr) bool {
	r := w.p.Spec.Egress[i]
	return w.fits(r, q, a) && slices.ContainsFunc(twinGranted(q), func(n string) bool { return twinMatches(r, n) })
}

func (w twin) byName(i int, q Query, a netip.Addr) twinMatch {
	r := w.p.Spec.Egress[i]
	if !w.fits(r, q, a) {
		return twinMatch{}
	}
	granted, said, deny, free := twinGranted(q), q.Seen.Name, r.Action != Allow, twinFree(r, q)
	some := slices.ContainsFunc(granted, func(n string) bool { return twinMatches(r, n) })
	every := !slices.ContainsFunc(granted, func(n string) bool { return !twinMatches(r, n) })
	switch {
	case q.Seen.Kind == SeenNone:
		return twinMatch{some, some && !free && !(deny && every)}
	case said == "":
		here := !q.Seen.Address.IsValid() || q.Seen.Address == q.Dst.Addr().Unmap()
		nameless := q.Seen.Nameless && here && (!q.Seen.ECH || r.ECH == "allow")
		return twinMatch{hit: some && (deny || free || nameless && r.MissingName == "allow")}
	case free && some:
		return twinMatch{hit: true}
	case !twinMatches(r, said):
		return twinMatch{}
	case !slices.Contains(granted, said):
		return twinMatch{hit: deny}
	}
	return twinMatch{hit: deny || !q.Seen.ECH || r.ECH == "allow"}
}

// says is the verdict of the rule that matched.
func (w twin) says(i int, r Rule, q Query, m twinMatch) twinVerdict {
	name := ruleName(q.Ingress, i, r.Name)
	v := twinVerdict{action: r.Action, rule: name}
	refused := func(why Reason) twinVerdict {
		return twinVerdict{action: w.deny(), rule: name, tried: name, reason: why}
	}
	isHTTP := q.Seen.Kind == SeenHTTP || q.Seen.Kind == SeenHTTP2
	switch {
	case m.hit && r.QUIC == "refuse" && q.Proto == 17:
		v = refused(ReasonQUIC)
		v.action = Reject
	case m.pending || len(r.HTTP) > 0 && q.Seen.Kind == SeenNone:
		v = refused(ReasonUnread)
		v.verify = VerifyFirstBytes
		if len(r.HTTP) > 0 {
			v.verify = VerifyRequest
		}
	case r.Action != Allow:
	case len(r.HTTP) > 0:
		ok := false
		for _, h := range r.HTTP {
			ok = ok || (len(h.Methods) == 0 || slices.Contains(h.Methods, q.Seen.Method)) && (h.Path == "" || h.Path == q.Seen.Path)
		}
		switch {
		case !isHTTP:
			return refused(ReasonNotHTTP)
		case !ok:
			return refused(ReasonRequest)
		case q.Seen.Override:
			return refused(ReasonOverride)
		}
		v.requests = true
	case m.hit && q.Seen.Method == "CONNECT":
		return refused(ReasonRequest)
	case m.hit:
		v.requests = isHTTP
	}
	return v
}

// tried is the first rule that was right but for what was said, else one that was
// right but for the address being private.
func (w twin) tried(rules []Rule, q Query, a netip.Addr, v twinVerdict) (string, Reason) {
	for i, r := range rules {
		if q.Seen.Kind != SeenNone && w.candidate(i, q, a) {
			return ruleName(false, i, r.Name), w.whyNot(r, q, a)
		}
	}
	for i, r := range rules {
		r.PrivateAddresses = "allow"
		named := func(n string) bool { return twinMatches(r, n) }
		if w.fits(w.p.Spec.Egress[i], q, a) != w.fits(r, q, a) && slices.ContainsFunc(twinGranted(q), named) {
			return ruleName(false, i, r.Name), ReasonPrivate
		}
	}
	for i, r := range rules {
		if v.reason == ReasonNone && r.Action == Allow && w.fits(r, q, a) && slices.ContainsFunc(twinFormer(q), func(n string) bool { return twinMatches(r, n) }) {
			return ruleName(false, i, r.Name), ReasonGrantExpired
		}
	}
	return v.tried, v.reason
}

// twinFormer are the names under which a query's address was granted: none was given up before
// its time.
func twinFormer(q Query) (out []string) {
	for name, list := range q.Names.byName {
		if slices.ContainsFunc(list, func(g *grant) bool { return g.addr == q.Dst.Addr().Unmap() && !g.until.After(q.Now) }) {
			out = append(out, name)
		}
	}
	for _, g := range q.Names.gone.ring {
		if g.addr == q.Dst.Addr().Unmap() {
			out = append(out, g.name)
		}
	}
	return out
}

// whyNot says why a candidate did not match.
func (w twin) whyNot(r Rule, q Query, a netip.Addr) Reason {
	switch {
	case q.Seen.Name == "":
		return ReasonNoName
	case q.Seen.ECH && twinMatches(r, q.Seen.Name) && slices.Contains(twinGranted(q), q.Seen.Name):
		return ReasonECH
	}
	return ReasonMismatch
}

// around names the way around the gate that a flow is.
func (w twin) around(rules []Rule, decided int, q Query, a netip.Addr, byName bool) string {
	enforced := w
	plain := *w.p
	plain.Spec.Mode = ""
	enforced.p = &plain
	if !w.gates() || q.Proto != 6 && q.Proto != 17 || !w.byDomain() && enforced.decideName("nothing.example").Allowed {
		return ""
	}
	var r Rule
	if decided < len(rules) {
		r = rules[decided]
	}
	if q.Dst.Port() == 853 && !slices.ContainsFunc(r.Ports, func(p Port) bool { return p.Port == 853 && (p.EndPort == 0 || p.EndPort == 853) }) {
		return "builtin:dns-over-tls"
	}
	if !isPublicResolver(a) {
		return ""
	}
	for _, p := range r.To {
		if p.CIDR.IsValid() && p.CIDR.Contains(a) && p.CIDR.Bits() >= map[bool]int{true: 24, false: 48}[p.CIDR.Addr().Is4()] {
			return ""
		}
		if byName && slices.Contains(twinGranted(q), p.Domain) {
			return ""
		}
	}
	return "builtin:dns-over-https"
}

func (w twin) decideName(name string) NameVerdict {
	if !w.gates() {
		return NameVerdict{Allowed: true, Rule: "default"}
	}
	refusal := w.p.Spec.DNS.orDefaults().Refusal
	v := NameVerdict{Rule: "default", Allowed: w.p.Spec.DefaultAction == Allow}
	openly := w.p.Spec.DNS.Names == "any"
	if openly {
		v = NameVerdict{Rule: "builtin:any-name", Allowed: true}
	}
	grants := false
	for _, r := range w.p.Spec.Egress {
		grants = grants || twinMatches(r, name)
	}
	for i, r := range w.p.Spec.Egress {
		every4, every6 := len(r.To) == 0, len(r.To) == 0
		for _, p := range r.To {
			every4 = every4 || p.Entity == "world" || p.CIDR == everyIPv4
			every6 = every6 || p.Entity == "world" || p.CIDR == everyIPv6
		}
		always := len(r.Ports) == 0 && len(r.ICMP) == 0
		reach := always
		for _, p := range r.Ports {
			reach = reach || p.Protocol == TCP || p.Protocol == UDP
		}
		if r.Action == Allow && (twinMatches(r, name) || reach && (every4 || every6)) ||
			r.Action != Allow && always && (twinMatches(r, name) || every4 && every6 && !openly) {
			v.Rule, v.Allowed = ruleName(false, i, r.Name), r.Action == Allow
			break
		}
	}
	switch {
	case v.Allowed:
		v.Grants = grants
	case w.p.Spec.Mode == Audit:
		v.Allowed, v.Audited, v.Grants = true, true, true
	default:
		v.Refusal = refusal
	}
	return v
}

// byName throws the dice for the fields about names and requests, of which only
// some go together.
func (d dice) byName(r *Rule) {
	pick := func() Setting { return []Setting{"", "allow", "refuse"}[d(3)] }
	if slices.ContainsFunc(r.To, func(p Peer) bool { return p.Domain != "" }) {
		r.Verify = []VerifyRule{"", "", "strict", "grant"}[d(4)]
		if r.Action == Allow {
			r.MissingName, r.ECH, r.QUIC, r.PrivateAddresses = pick(), pick(), pick(), pick()
		}
	}
	if r.Action == Allow && r.Verify != VerifyRuleGrant && d(4) == 0 {
		r.Ports, r.ICMP = []Port{{Protocol: TCP}}, nil
		r.HTTP = []HTTPMatch{{Methods: []string{"GET"}, Path: "/a"}, {Methods: []string{"POST"}}}[:1+d(2)]
	}
}

func (d dice) seen() Seen {
	if d(3) == 0 {
		return Seen{}
	}
	s := Seen{Kind: SeenKind(1 + d(6))}
	if d(4) != 0 {
		s.Name = twinNames[d(len(twinNames))]
	} else if s.Nameless = d(3) != 0; s.Nameless && d(3) == 0 {
		s.Address = d.addr().Unmap().WithZone("")
	}
	switch s.Kind {
	case SeenHTTP, SeenHTTP2:
		s.Method, s.Path = []string{"GET", "POST", "CONNECT"}[d(3)], []string{"/a", "/b"}[d(2)]
		s.Override = d(4) == 0
	case SeenTLS, SeenQUIC:
		s.ECH = d(3) == 0
	}
	return s
}

func (d dice) held() string {
	if d(6) != 0 {
		return ""
	}
	return twinNames[d(len(twinNames))]
}

// names grants some names some addresses, some of which are over by twinNow.
func (d dice) names() *Names {
	n := NewNames(NamesConfig{})
	for range d(40) {
		at := twinNow
		if d(5) == 0 {
			at = twinNow.Add(-2 * time.Hour)
		}
		if a := d.addr(); a.Zone() == "" {
			if err := n.Grant(twinNames[d(len(twinNames))], []netip.Addr{a}, time.Minute, at); err != nil {
				panic(err)
			}
		}
	}
	return n
}
