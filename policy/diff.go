package policy

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"sluice.dev/sluice/internal/prefix"
)

// The difference between two policies, as decisions rather than as text. Together the policies cut
// the addresses into regions: a region is a range without the narrower ranges inside it, and every
// address in it is decided alike. Each domain pattern stands for the names that no closer pattern
// matches. A change is a region or pattern under which some port is decided differently. One that
// only repeats a change of its surroundings is left out; one that does not share a change of its
// surroundings is an exception to it.

// Change is one thing that the other policy decides differently.
type Change struct {
	Kind      ChangeKind     `json:"kind"`
	Direction string         `json:"direction,omitempty"`
	To        []string       `json:"to"` // ranges, or a domain pattern; for ingress, the clients; for a setting, its name
	Except    []netip.Prefix `json:"except,omitempty"`
	Ports     []string       `json:"ports,omitempty"` // as Parse spells protocols: "TCP 443", "ICMP type 8"
	Before    string         `json:"before"`          // the action and the rule, or a setting's value
	After     string         `json:"after"`
}

// ChangeKind is the direction of a change.
type ChangeKind string

const (
	Opens  ChangeKind = "opens"
	Closes ChangeKind = "closes"
	Alters ChangeKind = "alters" // still refused or still allowed, but differently: what is read, how it is refused
	Resets ChangeKind = "resets" // a setting outside the rules
)

// Diff returns what changes if after replaces before.
func Diff(before, after *Policy, env Environment) ([]Change, error) {
	a, err := Compile(before, env)
	if err != nil {
		return nil, err
	}
	b, err := Compile(after, env)
	if err != nil {
		return nil, err
	}
	out := append(diffSettings(before, after), diffNames(a, b)...)
	for _, ingress := range []bool{false, true} {
		d := differ{ingress: ingress}
		d.sides[0] = side{rules: a, table: a.egress, list: before.Spec.Egress}
		d.sides[1] = side{rules: b, table: b.egress, list: after.Spec.Egress}
		if ingress {
			d.sides[0].table, d.sides[0].list = a.ingress, before.ingressIn(env)
			d.sides[1].table, d.sides[1].list = b.ingress, after.ingressIn(env)
		} else {
			out = append(out, d.domains()...)
		}
		out = append(out, d.addresses()...)
	}
	return out, nil
}

// side is one of the two policies, in one direction.
type side struct {
	rules *Rules
	table *table
	list  []Rule
}

type differ struct {
	ingress bool
	sides   [2]side
}

// outcome is what a side decides.
type outcome struct {
	action Action
	rule   string
	terms  string // the rule's other conditions
}

func (o outcome) String() string { return o.action.String() + " by " + o.rule }

// item is one change, not yet placed.
type item struct {
	kind          ChangeKind
	before, after string
	ports         string // comma-separated
}

// decide is Decide for an address's node and an optional name.
func (s *side) decide(d *differ, at int32, name string, key uint32) outcome {
	n := &s.table.nodes[at]
	info := &classes[n.class]
	refused := outcome{action: s.rules.deny, rule: info.rule}
	if d.ingress && info.martian || !d.ingress && info.lock == never {
		return refused
	}
	i := s.table.first(at, key)
	named := false
	if name != "" {
		j := s.rules.domains.first(name, viewCandidate, false, key, i)
		named, i = j < i, min(i, j)
	}
	switch {
	case i != noRule:
		o := outcome{action: s.table.rules[i].action, rule: s.table.rules[i].name}
		if o.action == Allow {
			o.terms = terms(&s.list[i], named)
		}
		return o
	case info.closed(d.ingress):
		return refused
	}
	o := outcome{action: s.rules.fallback, rule: ruleDefault}
	if o.action == Allow {
		o.terms = terms(&Rule{}, false)
	}
	return o
}

// terms returns the fields of a rule that matter besides its action, as JSON.
func terms(r *Rule, named bool) string {
	t := Rule{HTTP: r.HTTP, Limits: r.Limits}
	if named {
		t.Verify, t.MissingName, t.ECH, t.QUIC, t.PrivateAddresses = r.Verify, r.MissingName, r.ECH, r.QUIC, r.PrivateAddresses
	}
	text, err := json.Marshal(t)
	if err != nil {
		return err.Error() // never: it holds words and numbers
	}
	return string(text)
}

// items compares the two sides at one place, for all ports.
func (d *differ) items(at [2]int32, name string) []item {
	cuts := []uint32{0}
	for i := range d.sides {
		t := d.sides[i].table
		for n := at[i]; n >= 0; n = t.nodes[n].parent {
			for _, l := range []*line{t.nodes[n].own, t.nodes[n].crossing} {
				if l != nil {
					cuts = append(cuts, l.starts...)
				}
			}
		}
		if name != "" {
			d.sides[i].rules.domains.each(name, func(s *settled) {
				if l := s.lines[0][viewCandidate]; l != nil {
					cuts = append(cuts, l.starts...)
				}
			})
		}
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)

	spans := make(map[item][]span)
	for i, lo := range cuts {
		hi := uint32(keys - 1)
		if i+1 < len(cuts) {
			hi = cuts[i+1] - 1
		}
		x, y := d.sides[0].decide(d, at[0], name, lo), d.sides[1].decide(d, at[1], name, lo)
		it := item{before: x.String(), after: y.String()}
		switch {
		case x.action == y.action && x.terms == y.terms:
			continue
		case x.action != Allow && y.action == Allow:
			it.kind = Opens
		case x.action == Allow && y.action != Allow:
			it.kind = Closes
		default:
			it.kind = Alters
		}
		spans[it] = append(spans[it], span{lo, hi})
	}
	var out []item
	for it, list := range spans {
		it.ports = strings.Join(spanWords(normalSpans(list)), ", ")
		out = append(out, it)
	}
	slices.SortFunc(out, func(a, b item) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.ports, b.ports), cmp.Compare(a.before, b.before), cmp.Compare(a.after, b.after))
	})
	return out
}

func (d *differ) change(it item, to ...string) Change {
	direction := "egress"
	if d.ingress {
		direction = "ingress"
	}
	return Change{Kind: it.kind, Direction: direction, To: to, Ports: strings.Split(it.ports, ", "), Before: it.before, After: it.after}
}

// addresses compares every region.
func (d *differ) addresses() []Change {
	var ranges []netip.Prefix
	seen := make(map[netip.Prefix]bool)
	for _, s := range d.sides {
		for p := range s.table.trie.All() {
			if !seen[p] {
				seen[p] = true
				ranges = append(ranges, p)
			}
		}
	}
	slices.SortFunc(ranges, netip.Prefix.Compare)

	parents, hollow := nest(ranges)
	var out []area
	places := make([]map[item]int, len(ranges)) // index in out where each change of a region is reported
	for i, p := range ranges {
		var outer map[item]int
		if parents[i] >= 0 {
			outer = places[parents[i]]
		}
		if hollow[i] {
			places[i] = outer // nothing is decided by it
			continue
		}
		var at [2]int32
		for j := range d.sides {
			at[j], _ = d.sides[j].table.trie.LookupPrefix(p)
		}
		items := d.items(at, "")
		places[i] = make(map[item]int)
		for it, place := range outer {
			if !slices.Contains(items, it) {
				out[place].except = append(out[place].except, p)
			}
		}
		for _, it := range items {
			place, told := outer[it]
			if !told {
				place = len(out)
				out = append(out, area{it, p, nil})
			}
			places[i][it] = place
		}
	}
	return d.merge(out)
}

// area is one change of a range, with exceptions.
type area struct {
	item
	in     netip.Prefix
	except []netip.Prefix
}

// merge puts the areas of one change together. It lists an area's pieces where that takes fewer
// words than its exceptions.
func (d *differ) merge(areas []area) []Change {
	var out []Change
	at := make(map[item]int)
	for _, a := range areas {
		var pieces []string
		err := subtract(a.in, a.except, func(p netip.Prefix) error {
			if pieces = append(pieces, p.String()); len(pieces) > 1+len(a.except) {
				return errSome
			}
			return nil
		})
		i, told := at[a.item]
		if !told {
			i = len(out)
			at[a.item] = i
			out = append(out, d.change(a.item))
		}
		if err == nil && len(pieces) < 1+len(a.except) {
			out[i].To = append(out[i].To, pieces...)
			continue
		}
		out[i].To = append(out[i].To, a.in.String())
		out[i].Except = append(out[i].Except, a.except...)
	}
	return out
}

// errSome ends a subtraction as soon as it yields enough.
var errSome = errors.New("something is left")

// nest returns, for each range (wider ones first), the index of the next wider one, or -1, and
// whether narrower ones cover all of it.
func nest(ranges []netip.Prefix) (parents []int, hollow []bool) {
	parents, hollow = make([]int, len(ranges)), make([]bool, len(ranges))
	inside := make([][]netip.Prefix, len(ranges))
	var around []int
	for i, p := range ranges {
		for len(around) > 0 && !prefix.Covers(ranges[around[len(around)-1]], p) {
			around = around[:len(around)-1]
		}
		parents[i] = -1
		if len(around) > 0 {
			parents[i] = around[len(around)-1]
			inside[parents[i]] = append(inside[parents[i]], p)
		}
		around = append(around, i)
	}
	for i, p := range ranges {
		hollow[i] = subtract(p, inside[i], func(netip.Prefix) error { return errSome }) == nil
	}
	return parents, hollow
}

// domains compares every pattern, for a name that no closer pattern matches, at a public address
// that no rule names.
func (d *differ) domains() []Change {
	var patterns []string
	for _, s := range d.sides {
		for _, r := range s.list {
			patterns = append(patterns, domainsOf(r)...)
		}
	}
	slices.Sort(patterns)
	var out []Change
	var at [2]int32
	for i := range d.sides {
		at[i], _ = d.sides[i].table.trie.LookupPrefix(everyIPv4)
	}
	for _, p := range slices.Compact(patterns) {
		// A label made of a byte that no name contains is in no pattern.
		name := strings.Replace(strings.Replace(p, "**.", "?.?.", 1), "*.", "?.", 1)
		for _, it := range d.items(at, name) {
			out = append(out, d.change(it, p))
		}
	}
	return out
}

// diffNames compares how a question is answered for a name that is in no rule.
func diffNames(a, b *Rules) []Change {
	outcomeOf := func(r *Rules) outcome {
		v := NameVerdict{Rule: "no gate", Allowed: true}
		if r.GatesNames() {
			v = r.everyName()
		}
		if v.Allowed {
			return outcome{action: Allow, rule: v.Rule}
		}
		return outcome{action: r.deny, rule: v.Rule}
	}
	x, y := outcomeOf(a), outcomeOf(b)
	kind := Closes
	switch {
	case (x.action == Allow) == (y.action == Allow):
		return nil
	case y.action == Allow:
		kind = Opens
	}
	return []Change{{Kind: kind, Direction: "egress", To: []string{"names that no rule lists"}, Ports: []string{"DNS"}, Before: x.String(), After: y.String()}}
}

// diffSettings compares the settings outside the rules.
func diffSettings(a, b *Policy) []Change {
	x, y := settingsOf(a), settingsOf(b)
	var names []string
	for name := range x {
		names = append(names, name)
	}
	for name := range y {
		names = append(names, name)
	}
	slices.Sort(names)
	var out []Change
	for _, name := range slices.Compact(names) {
		if x[name] != y[name] {
			out = append(out, Change{Kind: Resets, To: []string{name}, Before: cmp.Or(x[name], "not set"), After: cmp.Or(y[name], "not set")})
		}
	}
	return out
}

func settingsOf(p *Policy) map[string]string {
	out := map[string]string{"mode": string(cmp.Or(p.Spec.Mode, Enforce))}
	for prefix, v := range map[string]any{"dns": p.Spec.DNS, "limits": p.Spec.Limits} {
		text, err := json.Marshal(v)
		var fields map[string]any
		if err == nil {
			err = json.Unmarshal(text, &fields)
		}
		if err != nil {
			continue // never: they hold words and numbers
		}
		for name, value := range fields {
			out[prefix+"."+name] = fmt.Sprint(value)
		}
	}
	return out
}
