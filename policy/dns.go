package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Refusal is how the DNS gate answers a question for a name that is not allowed.
type Refusal string

const (
	RefuseNXDOMAIN Refusal = "nxdomain" // there is no such name
	RefuseREFUSED  Refusal = "refused"  // the resolver will not say
	RefuseDrop     Refusal = "drop"     // no answer
)

var refusals = []Refusal{RefuseNXDOMAIN, RefuseREFUSED, RefuseDrop}

// NamesMode is which names the sandbox may ask for, beyond those of the rules.
type NamesMode string

const (
	NamesByRules NamesMode = ""        // those that a rule allows, and no others
	NamesAny     NamesMode = "any"     // every name that no rule by domain refuses
	NamesUngated NamesMode = "ungated" // the gate is off: questions pass unchanged, and no rule is by domain
)

var namesModes = []NamesMode{NamesAny, NamesUngated}

// DNS is how names are resolved under a policy.
type DNS struct {
	Names    NamesMode `json:"names,omitempty"`
	Refusal  Refusal   `json:"refusal,omitempty"`
	Types    []string  `json:"types,omitempty"` // query types, as DNS spells them
	TTLFloor Duration  `json:"ttlFloor,omitempty"`
	TTLCap   Duration  `json:"ttlCap,omitempty"`

	// Bounds for names under a wildcard, which the sandbox can make up. They apply to the part that
	// the wildcard stands for.
	MaxLabelLength     int     `json:"maxLabelLength,omitempty"`     // bytes of a label
	MaxWildcardLength  int     `json:"maxWildcardLength,omitempty"`  // bytes in all
	MaxWildcardEntropy float64 `json:"maxWildcardEntropy,omitempty"` // bits per byte, for parts long enough to measure
	MaxNamesPerMinute  int     `json:"maxNamesPerMinute,omitempty"`  // distinct names, per pattern
}

// Defaults. Clients keep an answer for at least the floor anyway, whatever its TTL.
const (
	DefaultTTLFloor = 60 * time.Second
	DefaultTTLCap   = time.Hour
	MaxTTL          = 24 * time.Hour

	DefaultMaxLabelLength     = 52
	DefaultMaxWildcardLength  = 100
	DefaultMaxWildcardEntropy = 4.5
	DefaultMaxNamesPerMinute  = 120
)

// Upper bounds of the settings: what DNS can express, and what a sandbox may make us remember.
const (
	mostLabelLength     = 63
	mostWildcardLength  = 253
	mostWildcardEntropy = 8
	mostNamesPerMinute  = 10000
)

// queryTypes are the types that a policy can let through, with those that pass by default: types
// that give an address, or a name on the way to one. Tunnels are made of TXT and NULL.
var queryTypes = []struct {
	name     string
	standard bool
}{
	{"A", true}, {"AAAA", true}, {"CNAME", true}, {"HTTPS", true}, {"SVCB", true}, {"SRV", true}, {"PTR", true},
	{"MX", false}, {"NS", false}, {"SOA", false}, {"TXT", false}, {"CAA", false}, {"NAPTR", false}, {"DS", false}, {"DNSKEY", false}, {"TLSA", false}, {"SSHFP", false},
}

// orDefaults fills in the settings that the policy leaves open.
func (d DNS) orDefaults() DNS {
	d.Refusal = cmp.Or(d.Refusal, RefuseNXDOMAIN)
	d.TTLFloor = cmp.Or(d.TTLFloor, Duration(min(DefaultTTLFloor, time.Duration(cmp.Or(d.TTLCap, Duration(MaxTTL))))))
	d.TTLCap = cmp.Or(d.TTLCap, max(Duration(DefaultTTLCap), d.TTLFloor))
	d.MaxLabelLength = cmp.Or(d.MaxLabelLength, DefaultMaxLabelLength)
	d.MaxWildcardLength = cmp.Or(d.MaxWildcardLength, DefaultMaxWildcardLength)
	d.MaxWildcardEntropy = cmp.Or(d.MaxWildcardEntropy, DefaultMaxWildcardEntropy)
	d.MaxNamesPerMinute = cmp.Or(d.MaxNamesPerMinute, DefaultMaxNamesPerMinute)
	if d.Types == nil {
		for _, t := range queryTypes {
			if t.standard {
				d.Types = append(d.Types, t.name)
			}
		}
	}
	return d
}

func (d DNS) check() error {
	if d.Names != NamesByRules && !slices.Contains(namesModes, d.Names) {
		return fmt.Errorf("dns: unknown names %q", string(d.Names))
	}
	if d.Refusal != "" && !slices.Contains(refusals, d.Refusal) {
		return fmt.Errorf("dns: unknown refusal %q", string(d.Refusal))
	}
	for _, t := range d.Types {
		if !knownQueryType(t) {
			return fmt.Errorf("dns: unknown query type %q", t)
		}
	}
	if d.TTLFloor < 0 || d.TTLCap < 0 || max(d.TTLFloor, d.TTLCap) > Duration(MaxTTL) || d.TTLCap != 0 && d.TTLFloor > d.TTLCap {
		return fmt.Errorf("dns: ttlFloor %v and ttlCap %v are not in order up to %v", d.TTLFloor, d.TTLCap, MaxTTL)
	}
	for _, s := range []struct {
		name        string
		value, most int
	}{
		{"maxLabelLength", d.MaxLabelLength, mostLabelLength},
		{"maxWildcardLength", d.MaxWildcardLength, mostWildcardLength},
		{"maxNamesPerMinute", d.MaxNamesPerMinute, mostNamesPerMinute},
	} {
		if s.value < 0 || s.value > s.most {
			return fmt.Errorf("dns: %s %d is not from 1 to %d", s.name, s.value, s.most)
		}
	}
	if !(d.MaxWildcardEntropy >= 0 && d.MaxWildcardEntropy <= mostWildcardEntropy) { // NaN is not
		return fmt.Errorf("dns: maxWildcardEntropy %v is not from 0.1 to %d", d.MaxWildcardEntropy, mostWildcardEntropy)
	}
	return nil
}

func knownQueryType(s string) bool {
	for _, t := range queryTypes {
		if t.name == s {
			return true
		}
	}
	return false
}

// NameVerdict is whether a name may be asked. The zero value refuses.
type NameVerdict struct {
	Allowed bool
	Audited bool    // only because the policy is in audit mode
	Rule    string  // what decided, as in Verdict.Rule
	Refusal Refusal // how to refuse, if not allowed
	Grants  bool    // addresses in the answer are to be granted: some rule matches by this name
	Pattern string  // the closest domain pattern that allowed the question; empty if none did
	ECH     bool    // answers may carry ECH keys
}

// GatesNames reports whether names are gated: questions are answered by the gate, which asks only
// for names that DecideName allows. Every policy gates names unless it says names: ungated. The
// absence of a policy gates them too.
func (r *Rules) GatesNames() bool { return r == nil || r.dns.Names != NamesUngated }

// OpensNames reports whether every name may be asked.
func (r *Rules) OpensNames() bool {
	return r != nil && r.egress != nil && (r.everyName().Allowed || r.audit || r.domains.allowed)
}

// everyName decides a name that no rule by domain matches.
func (r *Rules) everyName() NameVerdict {
	switch i := r.domains.everyName; {
	case i != noRule:
		return NameVerdict{Rule: r.egress.rules[i].name, Allowed: r.egress.rules[i].action == Allow}
	case r.dns.Names == NamesAny:
		return NameVerdict{Rule: ruleAnyName, Allowed: true}
	}
	return NameVerdict{Rule: ruleDefault, Allowed: r.fallback == Allow}
}

// DNS returns the policy's DNS settings with defaults filled in.
func (r *Rules) DNS() DNS {
	if r == nil {
		return DNS{}.orDefaults()
	}
	return r.dns
}

// DecideName decides whether a name, as NormalizeName returns it, may be asked. It does not
// allocate.
//
// The rules are tried in order, for the name alone, ignoring the port. An allow rule by a matching
// domain, or one for every address, allows the question. A refusing rule that covers every protocol
// and port refuses it. If no rule decides, names: any does, and then the default. Under names: any
// only rules by domain refuse.
func (r *Rules) DecideName(name string) NameVerdict {
	if r == nil || r.egress == nil {
		return NameVerdict{Rule: ruleNoPolicy, Refusal: RefuseREFUSED}
	}
	if !r.GatesNames() {
		return NameVerdict{Allowed: true, Rule: ruleDefault}
	}
	v := r.everyName()
	i := r.domains.everyName
	r.domains.each(name, func(s *settled) {
		i = min(i, s.asked)
		v.Grants = true
		v.ECH = v.ECH || s.ech
		if s.asked == i {
			v.Pattern = s.pattern // the closest comes last
		}
	})
	if i != r.domains.everyName {
		v.Rule, v.Allowed = r.egress.rules[i].name, r.egress.rules[i].action == Allow
	}
	if !v.Allowed && r.audit {
		v.Allowed, v.Audited, v.Grants = true, true, true
	}
	if !v.Allowed {
		v.Refusal, v.Grants, v.ECH, v.Pattern = r.dns.Refusal, false, false, ""
	}
	return v
}

// Grantable reports whether an address in an answer for a name may be granted and shown to the
// sandbox. Special addresses are not. Private ones are not, unless a rule for the name has
// privateAddresses: allow or the policy is in audit mode. Addresses that carry such an address are
// not. An allow rule by address overrides all three.
func (r *Rules) Grantable(name string, addr netip.Addr) bool {
	if r == nil || r.egress == nil || !addr.IsValid() || addr.Zone() != "" {
		return false
	}
	addr = addr.Unmap()
	at, ok := r.grantable(name, addr)
	if !ok {
		return false
	}
	for _, inner := range r.carriers.embedded(at.embeds, addr) {
		if inner.IsValid() {
			if _, ok := r.grantable(name, inner); !ok {
				return false
			}
		}
	}
	return true
}

func (r *Rules) grantable(name string, addr netip.Addr) (*node, bool) {
	i, ok := r.egress.trie.Lookup(addr)
	if !ok {
		return nil, false
	}
	at := &r.egress.nodes[i]
	if classes[at.class].lock == never {
		return at, false
	}
	if r.egress.opens(i) {
		return at, true
	}
	if classes[at.class].lock != open {
		return at, false
	}
	if !isPrivate(addr) {
		return at, true
	}
	private := r.audit
	r.domains.each(name, func(s *settled) { private = private || s.private })
	return at, private
}

// opens reports whether any allow rule by address reaches a node.
func (t *table) opens(at int32) bool {
	for at >= 0 {
		n := &t.nodes[at]
		if n.own != nil && slices.ContainsFunc(n.own.rules, func(i int32) bool { return i != noRule && t.rules[i].action == Allow }) {
			return true
		}
		if n.guard {
			return false // only refusals cross
		}
		at = n.parent
	}
	return false
}

func isPrivate(a netip.Addr) bool {
	for _, p := range privateRanges {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// Duration is a time.Duration in text form: 60s, 5m, 1h.
type Duration time.Duration

func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// MarshalText returns the form that Parse reads back.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }
