package policy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"sluice.dev/sluice/internal/prefix"
)

// A direction's rules become a tree of address ranges. Each range that some
// rule or special class names is a node; its parent is the next wider such
// range. A node holds the rules that name exactly its range, as one painted
// line (spans.go), so memory is linear in what was written. To decide, find the
// innermost node (one trie lookup) and walk up, keeping the lowest rule found,
// until no rule further up could be lower:
//
//	0.0.0.0/0        rules 3,7      ◄─┐
//	└ 10.0.0.0/8     rules 1,2,9    ◄─┤ parent
//	  └ 10.1.2.0/24  rule  5        ◄─┘ found by the trie
//
// A special range is a node that guards the addresses inside it. Once the walk leaves it upwards,
// only rules that cross count: the reject and drop rules in egress, all rules in ingress. Rules of
// entity world never cross, because entity world excludes special ranges. Where an ingress rule has
// to name its client, only reject and drop rules cross, and the node holds those itself. Exceptions
// are cut out of a CIDR before it gets here: 10.0.0.0/8 except 10.1.0.0/16 is eight ranges.

// Bounds on what Compile builds, about 64 MiB at worst.
const (
	MaxRanges = 1 << 19 // address ranges, exceptions cut out
	MaxPieces = 1 << 21 // pieces of painted lines, before merging neighbours
)

// Errors for a policy that is valid but too large to compile.
var (
	ErrTooManyRanges = fmt.Errorf("more than %d address ranges: where a rule has many exceptions, put a reject rule for them before it instead", MaxRanges)
	ErrTooManyPieces = fmt.Errorf("more than %d combinations of address and port ranges: put rules that share addresses together, or use wider port ranges", MaxPieces)
)

var errUngated = errors.New("dns: names are ungated, and rules by domain need the gate: say names: any, or leave it out")

type table struct {
	trie  bart.Table[int32] // range → node; holds 0.0.0.0/0 and ::/0, so it answers for every address
	nodes []node
	rules []ruleInfo
}

type ruleInfo struct {
	name   string
	action Action
	noQUIC bool // it refuses UDP that it would otherwise allow by domain
	http   []HTTPMatch

	// Ways around the gate that the rule names explicitly (bypass.go).
	listsDNSOverTLS bool
	resolvers       *bart.Lite
}

type node struct {
	own, crossing        *line // nil: no such rules
	parent               int32 // -1 at the two roots
	least, leastCrossing int32 // the lowest rule that counts, here or further up
	class                class // of the innermost special range around it
	embeds               class // of the innermost range around it whose addresses carry others, else ordinary
	guard                bool  // it is a special range that is not open
}

func (t *table) first(at int32, key uint32) int32 {
	best, crossed := int32(noRule), false
	for at >= 0 {
		n := &t.nodes[at]
		l, least := n.own, n.least
		if crossed {
			l, least = n.crossing, n.leastCrossing
		}
		if least >= best {
			break
		}
		if l != nil && l.least < best {
			best = min(best, l.first(key))
		}
		crossed = crossed || n.guard
		at = n.parent
	}
	return best
}

// Compile compiles a policy for one environment. A policy that Parse returned fails only if it is
// too large. Where the host's own addresses are unknown or too many, the returned Rules deny
// everything.
func Compile(p *Policy, env Environment) (*Rules, error) {
	if p == nil {
		return nil, errors.New("compile policy: there is none")
	}
	r := &Rules{
		name:     p.Metadata.Name,
		limits:   p.Spec.Limits,
		fallback: p.Spec.DefaultAction,
		deny:     p.Spec.DefaultAction,
		audit:    p.Spec.Mode == Audit,
		dns:      p.Spec.DNS.orDefaults(),
		carriers: carriers{nat64: env.NAT64, metadata: env.Metadata},
	}
	if p.Spec.Mode != "" && !slices.Contains(modes, p.Spec.Mode) {
		return nil, fmt.Errorf("compile policy %s: unknown mode %q", p.Metadata.Name, string(p.Spec.Mode))
	}
	if err := p.Spec.DNS.check(); err != nil {
		return nil, fmt.Errorf("compile policy %s: %w", p.Metadata.Name, err)
	}
	if err := env.check(); err != nil {
		return nil, fmt.Errorf("compile policy %s: %w", p.Metadata.Name, err)
	}
	if r.fallback > Allow {
		return nil, fmt.Errorf("compile policy %s: defaultAction: %v", p.Metadata.Name, r.fallback)
	}
	if r.deny == Allow {
		r.deny = Reject
	}
	var err error
	if r.egress, r.domains, err = compileTable(p.Spec.Egress, env, false); err == nil {
		r.ingress, _, err = compileTable(p.ingressIn(env), env, true)
	}
	if err != nil {
		return nil, fmt.Errorf("compile policy %s: %w", p.Metadata.Name, err)
	}
	if r.domains.any && !r.GatesNames() {
		return nil, fmt.Errorf("compile policy %s: %w", p.Metadata.Name, errUngated)
	}
	if r.dns.Names == NamesAny {
		r.domains.everyName = r.domains.everyAllowed
	}
	if env.HostUnknown || len(env.Host) > MaxHostRanges {
		return &Rules{name: r.name, limits: r.limits}, nil
	}
	r.ruleLimits = make(map[string]RuleLimits)
	for i, rule := range p.Spec.Egress {
		if rule.Limits != (RuleLimits{}) {
			r.ruleLimits[ruleName(false, i, rule.Name)] = rule.Limits
		}
	}
	for i, rule := range p.Spec.Ingress {
		if rule.Limits != (RuleLimits{}) {
			r.ruleLimits[ruleName(true, i, rule.Name)] = rule.Limits
		}
	}
	return r, nil
}

// notInPolicy names the rule that leaves a pod's ingress open when its policy has no ingress key.
const notInPolicy = "not-in-policy"

// ingressIn returns the ingress rules that hold in an environment.
func (p *Policy) ingressIn(env Environment) []Rule {
	if env.OpenIngress && p.Spec.Ingress == nil && len(p.Spec.Egress) > 0 {
		return []Rule{{Name: notInPolicy, Action: Allow}}
	}
	return p.Spec.Ingress
}

// ref is one rule at one range.
type ref struct {
	rule    int32
	crosses bool
}

type builder struct {
	env     Environment
	ingress bool
	special map[netip.Prefix]class
	guards  bart.Table[netip.Prefix] // the special ranges that are not open
	at      map[netip.Prefix][]ref
	refs    int
}

func compileTable(rules []Rule, env Environment, ingress bool) (*table, *domains, error) {
	b := &builder{env: env, ingress: ingress, special: env.boundaries(ingress), at: map[netip.Prefix][]ref{everyIPv4: nil, everyIPv6: nil}}
	for p, c := range b.special {
		b.at[p] = nil
		if classes[c].lock != open {
			b.guards.Insert(p, p)
		}
	}
	t := &table{}
	spans := make([][]span, len(rules))
	for i := range rules {
		r := &rules[i]
		name := ruleName(ingress, i, r.Name)
		if err := r.check(ingress); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", name, err)
		}
		info := ruleInfo{name: name, action: r.Action, noQUIC: r.QUIC == SettingRefuse, http: r.HTTP}
		info.nameBypass(r)
		t.rules = append(t.rules, info)
		spans[i] = ruleSpans(r)
		if err := b.addRule(int32(i), r); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := b.link(t, spans); err != nil || ingress {
		return t, nil, err
	}
	d, err := compileDomains(rules, spans)
	return t, d, err
}

func ruleName(ingress bool, i int, name string) string {
	direction := "egress"
	if ingress {
		direction = "ingress"
	}
	if name != "" {
		name = " " + name
	}
	return fmt.Sprintf("%s[%d]%s", direction, i, name)
}

func (b *builder) addRule(i int32, r *Rule) error {
	peers := r.To
	if b.ingress {
		peers = r.From
	}
	crosses := b.ingress || r.Action != Allow
	if len(peers) == 0 {
		return errors.Join(b.add(everyIPv4, ref{i, crosses}), b.add(everyIPv6, ref{i, crosses}))
	}
	for _, peer := range peers {
		if peer.Domain != "" {
			continue
		}
		var err error
		switch peer.Entity {
		case "":
			err = b.addCIDR(peer, ref{i, crosses}, r.Action)
		case EntityWorld:
			err = errors.Join(b.add(everyIPv4, ref{i, false}), b.add(everyIPv6, ref{i, false}))
			if b.ingress && b.env.HostClients {
				err = errors.Join(err, b.addEntity(EntityHost, ref{i, false}))
			}
		default:
			err = b.addEntity(peer.Entity, ref{i, crosses})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) addEntity(e Entity, r ref) error {
	for _, p := range members(e, b.special, b.ingress) {
		if _, guarded := b.guards.LookupPrefix(p); guarded && e == EntityPrivate && !r.crosses {
			continue // a host address is not named by being private
		}
		if err := b.add(p, r); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) addCIDR(peer Peer, r ref, action Action) error {
	return subtract(peer.CIDR, peer.Except, func(p netip.Prefix) error {
		// A piece may lie inside a special range even though the whole CIDR does not: cutting a
		// hole into the internet names nothing special.
		guard, ok := b.guards.LookupPrefix(p)
		if ok && action == Allow && classes[b.special[guard]].closed(b.ingress) && !prefix.Covers(guard, peer.CIDR) {
			return nil
		}
		if err := b.add(p, r); err != nil {
			return err
		}
		return b.addLoopback(p, r)
	})
}

// addLoopback lets a CIDR of the host's loopback stand for the gateway address
// that maps to it.
func (b *builder) addLoopback(p netip.Prefix, r ref) error {
	if b.ingress || !b.env.HostLoopback {
		return nil
	}
	for _, m := range []struct{ gateway, loop netip.Addr }{{b.env.Gateway4, hostLoopback4}, {b.env.Gateway6, hostLoopback6}} {
		g := m.gateway.Unmap()
		if g.IsValid() && b.special[netip.PrefixFrom(g, g.BitLen())] == hostLoopback && p.Contains(m.loop) && (r.crosses || classOf(p) == loopback) {
			if err := b.add(netip.PrefixFrom(g, g.BitLen()), r); err != nil {
				return err
			}
		}
	}
	return nil
}

// classOf returns the fixed class whose range p lies in.
func classOf(p netip.Prefix) class {
	best, bits := ordinary, -1
	for c := range numClasses {
		for _, q := range classes[c].ranges {
			if prefix.Covers(q, p) && q.Bits() > bits {
				best, bits = c, q.Bits()
			}
		}
	}
	return best
}

func (b *builder) add(p netip.Prefix, r ref) error {
	list := b.at[p]
	if n := len(list); n > 0 && list[n-1].rule == r.rule {
		list[n-1].crosses = list[n-1].crosses || r.crosses
		return nil
	}
	if b.refs++; b.refs > MaxRanges {
		return ErrTooManyRanges
	}
	b.at[p] = append(list, r)
	return nil
}

// subtract yields the ranges that make up p without the exceptions.
func subtract(p netip.Prefix, except []netip.Prefix, yield func(netip.Prefix) error) error {
	var inside []netip.Prefix
	for _, e := range except {
		if prefix.Covers(e, p) {
			return nil
		}
		if prefix.Covers(p, e) {
			inside = append(inside, e)
		}
	}
	if len(inside) == 0 {
		return yield(p)
	}
	lower, upper := prefix.Halves(p)
	if err := subtract(lower, inside, yield); err != nil {
		return err
	}
	return subtract(upper, inside, yield)
}

// enclosed returns the rules that count at p, a range whose clients must be named: the rules that
// name it, and the reject and drop rules of the ranges around it.
func (b *builder) enclosed(p netip.Prefix, around []netip.Prefix, rules []ruleInfo) []ref {
	list := slices.Clone(b.at[p])
	for _, outer := range around {
		for _, r := range b.at[outer] {
			if r.crosses && rules[r.rule].action != Allow {
				list = append(list, r)
			}
		}
	}
	slices.SortFunc(list, func(x, y ref) int { return int(x.rule - y.rule) })
	return slices.CompactFunc(list, func(x, y ref) bool { return x.rule == y.rule })
}

// link makes the nodes, parents before children.
func (b *builder) link(t *table, spans [][]span) error {
	order := make([]netip.Prefix, 0, len(b.at))
	for p := range b.at {
		order = append(order, p)
	}
	// By address, wider first: a range follows everything that contains it.
	slices.SortFunc(order, func(x, y netip.Prefix) int {
		if c := x.Addr().Compare(y.Addr()); c != 0 {
			return c
		}
		return x.Bits() - y.Bits()
	})
	lines := lineCache{spans: spans, made: make(map[string]*line)}
	t.nodes = make([]node, len(order))
	var around []int32 // the nodes that contain the current one, innermost last
	for i, p := range order {
		for len(around) > 0 && !prefix.Covers(order[around[len(around)-1]], p) {
			around = around[:len(around)-1]
		}
		n := &t.nodes[i]
		*n = node{parent: -1, least: noRule, leastCrossing: noRule, class: b.special[p]}
		n.guard = classes[n.class].lock != open
		refs := b.at[p]
		switch c, special := b.special[p]; {
		case special && b.ingress && classes[c].namedClient:
			var outer []netip.Prefix
			for _, j := range around {
				outer = append(outer, order[j])
			}
			refs = b.enclosed(p, outer, t.rules)
		case len(around) > 0:
			n.parent = around[len(around)-1]
			up := &t.nodes[n.parent]
			n.leastCrossing = up.leastCrossing
			if n.least = up.least; n.guard {
				n.least = up.leastCrossing
			}
			if _, named := b.special[p]; !named {
				n.class = up.class
			}
		}
		if len(around) > 0 {
			n.embeds = t.nodes[around[len(around)-1]].embeds
		}
		if _, special := b.special[p]; special {
			if fixed := classOf(p); classes[fixed].embeds != nil {
				n.embeds = fixed
			}
		}
		if n.class == metadata && (n.embeds == linkLocal || n.embeds == uniqueLocal) {
			n.embeds = ordinary // it is the address that it spells out
		}
		var own, crossing []int32
		for _, r := range refs {
			own = append(own, r.rule)
			if r.crosses {
				crossing = append(crossing, r.rule)
			}
		}
		var err error
		if n.own, err = lines.get(own); err == nil {
			n.crossing, err = lines.get(crossing)
		}
		if err != nil {
			return err
		}
		if n.own != nil {
			n.least = min(n.least, n.own.least)
		}
		if n.crossing != nil {
			n.leastCrossing = min(n.leastCrossing, n.crossing.least)
		}
		around = append(around, int32(i))
		t.trie.Insert(p, int32(i))
	}
	return nil
}

// lineCache paints each distinct list of rules once: a rule with ten thousand
// CIDRs has one line.
type lineCache struct {
	spans  [][]span
	made   map[string]*line
	pieces int
	sig    []byte
}

func (c *lineCache) get(rules []int32) (*line, error) {
	if len(rules) == 0 {
		return nil, nil
	}
	c.sig = c.sig[:0]
	for _, r := range rules {
		c.sig = binary.AppendUvarint(c.sig, uint64(r))
	}
	if l, ok := c.made[string(c.sig)]; ok {
		return l, nil
	}
	for _, r := range rules {
		c.pieces += 2 * len(c.spans[r])
	}
	if c.pieces > MaxPieces {
		return nil, ErrTooManyPieces
	}
	l := paint(rules, c.spans)
	c.made[string(c.sig)] = l
	return l, nil
}
