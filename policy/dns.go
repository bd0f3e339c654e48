package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Refusal is how the DNS gate answers for a name that may not be asked.
type Refusal string

const (
	RefuseNXDOMAIN Refusal = "nxdomain" // there is no such name
	RefuseREFUSED  Refusal = "refused"  // the resolver will not say
	RefuseDrop     Refusal = "drop"     // no answer
)

var refusals = []Refusal{RefuseNXDOMAIN, RefuseREFUSED, RefuseDrop}

// NamesMode says which names the sandbox may ask for, beyond those of the rules.
type NamesMode string

const (
	NamesByRules NamesMode = ""        // those that a rule allows, and no other
	NamesAny     NamesMode = "any"     // every name that no rule by domain refuses
	NamesUngated NamesMode = "ungated" // the gate is off: questions pass as they are, and no rule is by domain
)

var namesModes = []NamesMode{NamesAny, NamesUngated}

// DNS is how names are resolved under a policy.
type DNS struct {
	Names    NamesMode `json:"names,omitempty"`
	Refusal  Refusal   `json:"refusal,omitempty"`
	Types    []string  `json:"types,omitempty"` // query types, as DNS spells them
	TTLFloor Duration  `json:"ttlFloor,omitempty"`
	TTLCap   Duration  `json:"ttlCap,omitempty"`

	// Of names under a wildcard, which the sandbox makes up: bounds of the part that the
	// wildcard stands for.
	MaxLabelLength     int     `json:"maxLabelLength,omitempty"`     // bytes of a label
	MaxWildcardLength  int     `json:"maxWildcardLength,omitempty"`  // bytes in all
	MaxWildcardEntropy float64 `json:"maxWildcardEntropy,omitempty"` // bits in a byte, of parts long enough to tell
	MaxNamesPerMinute  int     `json:"maxNamesPerMinute,omitempty"`  // different names, for each pattern
}

// What holds where a policy is silent. The floor is what clients keep an
// answer for anyway, whatever it says.
const (
	DefaultTTLFloor = 60 * time.Second
	DefaultTTLCap   = time.Hour
	MaxTTL          = 24 * time.Hour

	DefaultMaxLabelLength     = 52
	DefaultMaxWildcardLength  = 100
	DefaultMaxWildcardEntropy = 4.5
	DefaultMaxNamesPerMinute  = 120
)

// What the settings may be at most: what DNS can say, and what a sandbox may make us
// remember.
const (
	mostLabelLength     = 63
	mostWildcardLength  = 253
	mostWildcardEntropy = 8
	mostNamesPerMinute  = 10000
)

// queryTypes are the types that a policy can let through, and which of them pass
// if it says nothing: those that name an address, or a name on the way to one.
// TXT and NULL are what tunnels are made of.
var queryTypes = []struct {
	name     string
	standard bool
}{
	{"A", true}, {"AAAA", true}, {"CNAME", true}, {"HTTPS", true}, {"SVCB", true}, {"SRV", true}, {"PTR", true},
	{"MX", false}, {"NS", false}, {"SOA", false}, {"TXT", false}, {"CAA", false}, {"NAPTR", false}, {"DS", false}, {"DNSKEY", false}, {"TLSA", false}, {"SSHFP", false},
}

// orDefaults fills in what the policy leaves open.
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

// NameVerdict says whether a name may be asked. The zero value refuses.
type NameVerdict struct {
	Allowed bool
	Audited bool    // only because the policy is in audit mode
	Rule    string  // what decided, as in Verdict.Rule
	Refusal Refusal // how to refuse, if not allowed
	Grants  bool    // the addresses in the answer are to be granted: some rule matches by this name
	Pattern string  // the closest domain pattern that let it be asked; empty if none did
	ECH     bool    // answers may tell how to encrypt a ClientHello
}

// GatesNames reports whether names are gated: questions are answered by the gate,
// which asks only for names that DecideName allows. Every policy gates them that
// does not say names: ungated; so does the absence of a policy.
func (r *Rules) GatesNames() bool { return r == nil || r.dns.Names != NamesUngated }

// OpensNames reports whether any name at all may be asked.
func (r *Rules) OpensNames() bool {
	return r != nil && r.egress != nil && (r.everyName().Allowed || r.audit || r.domains.allowed)
}

// everyName decides about a name that no rule by domain matches.
func (r *Rules) everyName() NameVerdict {
	switch i := r.domains.everyName; {
	case i != noRule:
		return NameVerdict{Rule: r.egress.rules[i].name, Allowed: r.egress.rules[i].action == Allow}
	case r.dns.Names == NamesAny:
		return NameVerdict{Rule: ruleAnyName, Allowed: true}
	}
	return NameVerdict{Rule: ruleDefault, Allowed: r.fallback == Allow}
}

// DNS gives the policy's DNS settings, defaults filled in.
func (r *Rules) DNS() DNS {
	if r == nil {
		return DNS{}.orDefaults()
	}
	return r.dns
}

// DecideName says whether a name, as NormalizeName gives it, may be asked. It
// does not allocate.
//
// The rules are tried in their order for the name alone, whatever the port. An
// allow rule by a domain that matches, or one for every address, lets it be
// asked; a refusing one that does so for every protocol and port refuses it;
// names: any and then the default decide at the end. Under names: any only rules
// by domain refuse.
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

// Grantable reports whether an address in an answer for a name may be granted
// and shown to the sandbox. Special addresses are not, nor private ones unless a
// rule for the name has privateAddresses: allow or the policy is in audit mode,
// nor what carries such an address – except where an allow rule by address opens
// it anyway.
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

// Duration is a time.Duration that is written as such: 60s, 5m, 1h.
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

// MarshalText gives the form that Parse reads back.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }
