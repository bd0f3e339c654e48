package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Makes a policy from observed flows: every flow that passed passes again, and nothing is wider
// than needed for that. Flows with the same name or address are merged, and then the names and
// addresses that are reached at the same ports in the same way. Nothing is generalized: no pattern,
// no network, no range.

// Observed is a flow that passed, as recorded in a flow log.
type Observed struct {
	Ingress            bool
	Proto              uint8
	Peer               netip.Addr // the destination; for ingress, the client
	Port               uint16     // the destination's; 0 for ICMP
	ICMPType, ICMPCode uint8
	Said               string   // the name in the first bytes
	ECH                bool     // beside an encrypted hello
	Names              []string // under which the address was granted
}

// Suggestion is a policy, with the flows that it could not cover.
type Suggestion struct {
	Policy  *Policy
	Skipped []string // one reason each
}

// access is how a target is reached: the parts of its rule other than peers and ports.
type access struct {
	ingress  bool
	byName   bool
	verify   VerifyRule
	private  Setting
	ech      Setting
	port     Port
	icmpType int16 // -1: not ICMP
}

// Suggest makes the policy; name goes into its metadata.
func Suggest(name string, flows []Observed) (*Suggestion, error) {
	s := &suggester{said: make(map[string]bool), reached: make(map[string]map[access]bool)}
	for _, f := range flows {
		if n := f.said(); n != "" {
			s.said[n] = true
		}
	}
	for _, f := range flows {
		s.add(f)
	}
	p := &Policy{APIVersion: APIVersion, Kind: Kind, Metadata: Metadata{Name: name}, Spec: Spec{DefaultAction: Reject}}
	for _, ingress := range []bool{false, true} {
		list := s.rules(ingress)
		if ingress {
			p.Spec.Ingress = append([]Rule{}, list...) // never nil: in a pod that would leave ingress open
		} else {
			p.Spec.Egress = list
		}
	}
	rules, err := Compile(p, Environment{})
	if err != nil {
		return nil, err
	}
	out := &Suggestion{Policy: p, Skipped: s.skipped}
	for _, f := range flows {
		if why := s.replay(rules, f); why != "" && !slices.Contains(out.Skipped, why) {
			out.Skipped = append(out.Skipped, why)
		}
	}
	return out, nil
}

type suggester struct {
	said    map[string]bool // names that some flow said
	reached map[string]map[access]bool
	skipped []string
}

// said returns the flow's name, if its address is granted under it.
func (f *Observed) said() string {
	if n, err := NormalizeSaid(f.Said); err == nil && slices.Contains(f.Names, n) {
		return n
	}
	return ""
}

// target returns the name by which a flow is allowed, or its address. No name opens a special
// address.
func (s *suggester) target(f Observed) (name string, addr netip.Addr) {
	addr = f.Peer.Unmap().WithZone("")
	if f.Ingress || classes[classOf(netip.PrefixFrom(addr, addr.BitLen()))].lock != open {
		return "", addr
	}
	if n := f.said(); n != "" {
		return n, addr
	}
	names := slices.Sorted(slices.Values(f.Names))
	for _, n := range names {
		if s.said[n] {
			return n, addr
		}
	}
	if len(names) > 0 {
		return names[0], addr
	}
	return "", addr
}

func (s *suggester) add(f Observed) {
	name, a := s.target(f)
	if !a.IsValid() {
		s.skip("a flow without an address")
		return
	}
	how := access{ingress: f.Ingress, byName: name != "", port: Port{Protocol: Protocol(f.Proto), Port: f.Port}, icmpType: -1}
	if !how.port.Protocol.known() {
		s.skip(fmt.Sprintf("protocol %d, which rules can not list", f.Proto))
		return
	}
	if p := how.port.Protocol; p == ICMPv4 || p == ICMPv6 {
		how.icmpType, how.port.Port = int16(f.ICMPType), 0
	}
	to := netip.PrefixFrom(a, a.BitLen())
	if c := classOf(to); !f.Ingress && classes[c].lock == never {
		s.skip(fmt.Sprintf("%v, which is %s and never allowed", a, strings.TrimPrefix(classes[c].rule, "special:")))
		return
	}
	targets := []string{to.String()}
	carried := carriedBy(a)
	if name == "" && !f.Ingress {
		for _, inner := range carried { // it must be allowed too
			targets = append(targets, netip.PrefixFrom(inner, inner.BitLen()).String())
		}
	}
	if name != "" {
		targets = []string{name}
		if isPrivate(a) || slices.ContainsFunc(carried, isPrivate) {
			how.private = SettingAllow
		}
		if f.ECH {
			how.ech = SettingAllow
		}
		if f.said() != name {
			// It passed without saying the name: because of its port, or because the rule has to
			// allow that.
			key := portKey(how.port.Protocol, f.Port)
			if len(intersect([]span{{key, key}}, unverified(&Rule{}))) == 0 {
				how.verify = VerifyRuleGrant
			}
		}
	}
	for _, target := range targets {
		if s.reached[target] == nil {
			s.reached[target] = make(map[access]bool)
		}
		s.reached[target][how] = true
	}
}

// carriedBy returns the addresses embedded in an address, as far as the address alone shows.
func carriedBy(a netip.Addr) []netip.Addr {
	list := new(carriers).embedded(classOf(netip.PrefixFrom(a, a.BitLen())), a)
	return slices.DeleteFunc(list[:], func(a netip.Addr) bool { return !a.IsValid() })
}

func (s *suggester) skip(why string) {
	if !slices.Contains(s.skipped, why) {
		s.skipped = append(s.skipped, why)
	}
}

// shape is a rule without its peers: the part that targets of the same rule share.
type shape struct {
	terms access // without port and ICMP type
	ports string // as spanWords formats them
}

// rules returns the rules of one direction.
func (s *suggester) rules(ingress bool) []Rule {
	type entry struct {
		rule    Rule
		targets []string
	}
	shapes := make(map[shape]*entry)
	for target, hows := range s.reached {
		byTerms := make(map[access]Rule)
		for how := range hows {
			if how.ingress != ingress {
				continue
			}
			terms := how
			terms.port, terms.icmpType = Port{}, 0
			r := byTerms[terms]
			r.Action, r.Verify, r.PrivateAddresses, r.ECH = Allow, how.verify, how.private, how.ech
			if how.icmpType < 0 {
				r.Ports = append(r.Ports, how.port)
			} else {
				m := ICMP{Family: IPv4, Type: new(uint8)}
				if how.port.Protocol == ICMPv6 {
					m.Family = IPv6
				}
				*m.Type = uint8(how.icmpType)
				r.ICMP = append(r.ICMP, m)
			}
			byTerms[terms] = r
		}
		for terms, r := range byTerms {
			at := shape{terms, strings.Join(spanWords(ruleSpans(&r)), ", ")}
			if shapes[at] == nil {
				shapes[at] = &entry{rule: r}
			}
			shapes[at].targets = append(shapes[at].targets, target)
		}
	}
	var out []Rule
	for _, e := range shapes {
		slices.SortFunc(e.rule.Ports, func(a, b Port) int {
			return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
		})
		slices.SortFunc(e.rule.ICMP, func(a, b ICMP) int {
			return cmp.Or(cmp.Compare(a.Family, b.Family), cmp.Compare(*a.Type, *b.Type))
		})
		slices.Sort(e.targets)
		for _, t := range e.targets {
			peer := Peer{Domain: t}
			if cidr, err := netip.ParsePrefix(t); err == nil {
				peer = Peer{CIDR: cidr}
			}
			if ingress {
				e.rule.From = append(e.rule.From, peer)
			} else {
				e.rule.To = append(e.rule.To, peer)
			}
		}
		out = append(out, e.rule)
	}
	slices.SortFunc(out, func(a, b Rule) int { return cmp.Compare(ruleText(&a), ruleText(&b)) })
	nameRules(out)
	return out
}

// ruleText is the sort key of rules: by name before by address, then by content.
func ruleText(r *Rule) string {
	var b strings.Builder
	for _, p := range append(slices.Clone(r.To), r.From...) {
		if p.Domain == "" {
			b.WriteByte('~')
		}
		fmt.Fprintf(&b, "%s%v ", p.Domain, p.CIDR)
	}
	return b.String() + strings.Join(spanWords(ruleSpans(r)), ",") + string(r.Verify) + string(r.ECH)
}

// nameRules names rules after their first peer.
func nameRules(rules []Rule) {
	taken := make(map[string]bool)
	for i := range rules {
		base := "address"
		switch {
		case len(rules[i].From) > 0:
			base = "client"
		case rules[i].To[0].Domain != "":
			base = rules[i].To[0].Domain
		}
		if !ruleNames.MatchString(base) || len(base) > 56 {
			base = "name"
		}
		name := base
		for n := 2; taken[name]; n++ {
			name = fmt.Sprintf("%s-%d", base, n)
		}
		taken[name], rules[i].Name = true, name
	}
}

// replay returns why a flow would not pass again, or the empty string.
func (s *suggester) replay(rules *Rules, f Observed) string {
	if !Protocol(f.Proto).known() {
		return "" // already reported
	}
	name, a := s.target(f)
	q := Query{Ingress: f.Ingress, Proto: f.Proto, Dst: netip.AddrPortFrom(a, f.Port), ICMPType: f.ICMPType, ICMPCode: f.ICMPCode, Names: NewNames(NamesConfig{}), Now: time.Unix(1, 0)}
	if f.Ingress {
		q.Src, q.Dst = netip.AddrPortFrom(a, 1), netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), f.Port)
	}
	if name != "" {
		if err := q.Names.Grant(name, []netip.Addr{a}, time.Minute, q.Now); err != nil {
			return fmt.Sprintf("%s: %v", name, err)
		}
	}
	v := rules.Decide(q)
	if v.Verify() != VerifyNone {
		q.Seen = Seen{Kind: SeenTLS, Name: f.said(), ECH: f.ECH}
		v = rules.Decide(q)
	}
	if v.Allowed() || strings.HasPrefix(v.Rule(), "special:") && s.special(a) {
		return ""
	}
	if v.Rule() == rulePlainDNS {
		return "DNS to other resolvers, which the gate answers itself"
	}
	return fmt.Sprintf("%v to %s: %v", Protocol(f.Proto), cmp.Or(name, a.String()), v)
}

// special reports whether an address is never open and was already reported.
func (s *suggester) special(a netip.Addr) bool {
	return classes[classOf(netip.PrefixFrom(a, a.BitLen()))].lock == never
}
