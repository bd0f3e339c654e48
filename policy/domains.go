package policy

import (
	"math"
	"slices"
	"strings"
)

// The rules by name of the egress list. Each pattern of some rule is an entry under its suffix; the
// entry holds the rules that name it, as painted lines (spans.go). To decide, each suffix of the
// name is looked up once, up to the length of the longest pattern:
//
//	pypi.org       exact: rules 0      one: rules 1,4    many: –
//	example.com    exact: –            one: –            many: rule 2
//
// Whether a rule matches depends on what the first bytes said, so an entry has one line for each
// view of them: the rules that can still match under that view, with the ports for which they can.
type domains struct {
	at      map[string]*[3]*settled // suffix → entry by depth
	labels  int                     // of the longest suffix
	any     bool                    // some egress rule matches by name
	allowed bool                    // ... and allows
	// The first rule that settles every name, and the first of those that allows.
	everyName, everyAllowed int32
}

// view is what is known of a flow whose address is granted under a name.
type view uint8

const (
	viewCandidate   view = iota // nothing was read, or exactly this name was said
	viewECH                     // this name was said beside an encrypted hello
	viewNameless                // no name was said, by what could have said one
	viewNamelessECH             // likewise, beside an encrypted hello
	viewUnread                  // what was said may still be followed by any name
	viewGrant                   // another name was said: only rules that need no name
	viewSaid                    // this name was said, but the address is not granted under it: refusals only
	numViews
)

// settled holds what the rules say about one pattern.
type settled struct {
	// For public addresses first, then for private ones.
	lines [2][numViews]*line

	pattern string
	rules   []int32 // the rules that name it
	asked   int32   // the first rule that settles whether the name may be asked
	ech     bool    // a rule that allows it accepts encrypted hellos
	private bool    // a rule that allows it reaches private addresses
}

// each yields the entries whose pattern matches a name, the closest one last.
func (d *domains) each(name string, yield func(*settled)) {
	if d == nil || len(d.at) == 0 || name == "" {
		return
	}
	labels := 0
	for start := len(name); start > 0 && labels < d.labels; {
		start = strings.LastIndexByte(name[:start], '.')
		labels++
		e := d.at[name[start+1:]]
		if e == nil {
			continue
		}
		switch {
		case start < 0:
			if e[exact] != nil {
				yield(e[exact])
			}
		default:
			if e[manyLabels] != nil {
				yield(e[manyLabels])
			}
			if e[oneLabel] != nil && strings.IndexByte(name[:start], '.') < 0 {
				yield(e[oneLabel])
			}
		}
	}
}

// first returns the lowest rule for a name under a view, below best.
func (d *domains) first(name string, v view, private bool, key uint32, best int32) int32 {
	side := 0
	if private {
		side = 1
	}
	d.each(name, func(s *settled) {
		if l := s.lines[side][v]; l != nil && l.least < best {
			best = min(best, l.first(key))
		}
	})
	return best
}

const portFTP = 21 // control connections

// serverFirst are the ports where the client waits for the server to speak, or speaks without ever
// saying a name: FTP, SSH, SMTP, POP3, IMAP, submission, MySQL, PostgreSQL. On these ports, and for
// protocols that carry no name, a rule matches by grant and port unless it says verify: strict.
var (
	serverFirst = []uint16{portFTP, 22, 25, 110, 143, 587, 3306, 5432}
	nameless    = []uint16{123, 3478} // UDP: NTP, STUN
)

// speaksFirst reports whether a protocol's client speaks first and may say a name.
func speaksFirst(proto uint8, port uint16) bool {
	switch Protocol(proto) {
	case TCP:
		return !slices.Contains(serverFirst, port)
	case UDP:
		return !slices.Contains(nameless, port)
	}
	return false
}

// unverified returns the spans in which a rule requires no name.
func unverified(r *Rule) []span {
	var out []span
	switch r.Verify {
	case VerifyRuleGrant:
		return []span{allSpan}
	case VerifyRuleDefault:
		for _, p := range serverFirst {
			out = append(out, span{portKey(TCP, p), portKey(TCP, p)})
		}
		for _, p := range nameless {
			out = append(out, span{portKey(UDP, p), portKey(UDP, p)})
		}
	}
	// Only TCP and UDP carry bytes that can be read.
	return append(out, span{0, portKey(TCP, 0) - 1}, span{portKey(TCP+1, 0), portKey(UDP, 0) - 1}, span{portKey(UDP+1, 0), keys - 1})
}

// intersect returns the intersection of two span lists. Both are sorted; if b is disjoint too, so
// is the result.
func intersect(a, b []span) []span {
	var out []span
	for _, x := range a {
		for _, y := range b {
			if lo, hi := max(x.lo, y.lo), min(x.hi, y.hi); lo <= hi {
				out = append(out, span{lo, hi})
			}
		}
	}
	return out
}

// domainsBuilder makes a domains.
type domainsBuilder struct {
	caches [numViews]lineCache
	refs   map[pattern][]int32 // pattern → the rules that name it, ascending
	rules  []Rule
}

type pattern struct {
	suffix string
	depth  depth
}

func (p pattern) String() string {
	return [...]string{exact: "", oneLabel: "*.", manyLabels: "**."}[p.depth] + p.suffix
}

// namedSpans returns a rule's spans for the addresses of its domains. A rule that allows a name
// without listing protocols covers only protocols that carry names: an echo request carries none,
// and can smuggle anything to the host at that address.
func namedSpans(r *Rule, spans []span) []span {
	if r.Action != Allow || len(r.Ports) > 0 || len(r.ICMP) > 0 {
		return spans
	}
	return []span{{portKey(TCP, 0), portKey(TCP, math.MaxUint16)}, {portKey(UDP, 0), portKey(UDP, math.MaxUint16)}}
}

// compileDomains builds the index of the rules by name. spans are those of the rules.
func compileDomains(rules []Rule, spans [][]span) (*domains, error) {
	d := &domains{at: make(map[string]*[3]*settled), everyName: noRule, everyAllowed: noRule}
	b := &domainsBuilder{refs: make(map[pattern][]int32), rules: rules}
	for v := range numViews {
		b.caches[v] = lineCache{spans: make([][]span, len(rules)), made: make(map[string]*line)}
	}
	for i := range rules {
		r := &rules[i]
		if settlesEveryName(r) {
			d.everyName = min(d.everyName, int32(i))
			if r.Action == Allow {
				d.everyAllowed = min(d.everyAllowed, int32(i))
			}
		}
		named := false
		for _, p := range r.To {
			if p.Domain == "" {
				continue
			}
			named = true
			suffix, depth, err := parsePattern(p.Domain)
			if err != nil {
				return nil, err
			}
			at := pattern{suffix, depth}
			if list := b.refs[at]; len(list) == 0 || list[len(list)-1] != int32(i) {
				b.refs[at] = append(list, int32(i))
			}
		}
		if named {
			d.any, d.allowed = true, d.allowed || r.Action == Allow
			b.view(int32(i), namedSpans(r, spans[i]))
		}
	}
	for p, list := range b.refs {
		s, err := b.settle(list)
		if err != nil {
			return nil, err
		}
		s.pattern = p.String()
		e := d.at[p.suffix]
		if e == nil {
			e = new([3]*settled)
			d.at[p.suffix] = e
		}
		e[p.depth] = s
		d.labels = max(d.labels, 1+strings.Count(p.suffix, "."))
	}
	return d, nil
}

// view sets the ports for which a rule can match, under each view.
func (b *domainsBuilder) view(i int32, all []span) {
	r := &b.rules[i]
	free := unverified(r)
	if r.QUIC == SettingRefuse {
		// This rule refuses such a flow without needing a name.
		free = append(free, span{portKey(UDP, 0), portKey(UDP+1, 0) - 1})
	}
	byGrant := normalSpans(intersect(all, free))
	put := func(v view, on bool, spans []span) {
		if !on {
			spans = byGrant
		}
		b.caches[v].spans[i] = spans
	}
	deny := r.Action != Allow
	put(viewCandidate, true, all)
	put(viewECH, deny || r.ECH == SettingAllow, all)
	put(viewNameless, deny || r.MissingName == SettingAllow, all)
	put(viewNamelessECH, deny || r.MissingName == SettingAllow && r.ECH == SettingAllow, all)
	put(viewUnread, deny, all)
	put(viewGrant, false, nil)
	if deny {
		put(viewSaid, true, all)
	}
}

// settle makes the entry of one pattern.
func (b *domainsBuilder) settle(list []int32) (*settled, error) {
	s := &settled{rules: list, asked: noRule}
	var private []int32
	for _, i := range list {
		r := &b.rules[i]
		if s.asked == noRule && (r.Action == Allow || len(r.Ports) == 0 && len(r.ICMP) == 0) {
			s.asked = i
		}
		if r.Action != Allow || r.PrivateAddresses == SettingAllow {
			private = append(private, i)
		}
		if r.Action == Allow {
			s.ech = s.ech || r.ECH == SettingAllow
			s.private = s.private || r.PrivateAddresses == SettingAllow
		}
	}
	for side, rules := range [2][]int32{list, private} {
		for v := range numViews {
			// A rule that has no ports under a view does not exist under it.
			var some []int32
			for _, i := range rules {
				if len(b.caches[v].spans[i]) > 0 {
					some = append(some, i)
				}
			}
			l, err := b.caches[v].get(some)
			if err != nil {
				return nil, err
			}
			s.lines[side][v] = l
		}
	}
	return s, nil
}

// settlesEveryName reports whether a rule settles for every name whether it may be asked: an allow
// rule that reaches every address of a family over TCP or UDP (allowing pings to everything is no
// reason to allow every question), or a refusal of every address, protocol and port.
func settlesEveryName(r *Rule) bool {
	all4, all6 := len(r.To) == 0, len(r.To) == 0
	for _, p := range r.To {
		all4 = all4 || p.Entity == EntityWorld || p.CIDR == everyIPv4
		all6 = all6 || p.Entity == EntityWorld || p.CIDR == everyIPv6
	}
	if r.Action == Allow {
		reach := len(r.Ports) == 0 && len(r.ICMP) == 0 || slices.ContainsFunc(r.Ports, func(p Port) bool { return p.Protocol == TCP || p.Protocol == UDP })
		return reach && (all4 || all6)
	}
	return all4 && all6 && len(r.Ports) == 0 && len(r.ICMP) == 0
}
