package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// field is one known key of a mapping.
type field struct {
	name     string
	required bool
	read     func(*yaml.Node)
}

// mapping reads the known fields of a mapping, each at most once.
func (p *parser) mapping(n *yaml.Node, what string, fields []field) {
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.name
	}
	if n.Kind != yaml.MappingNode {
		p.errorf(n, "%s is %s; expected a mapping with %s", what, describe(n), strings.Join(names, ", "))
		return
	}
	seen := make(map[string]int) // field → line
	for i := 0; i+1 < len(n.Content) && !p.more; i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			p.errorf(key, "%s has %s as a key; expected one of %s", what, describe(key), strings.Join(names, ", "))
			continue
		}
		at := slices.Index(names, key.Value)
		if at < 0 {
			p.errorf(key, "%s has no field %q; %s", what, clip(key.Value), expectedOneOf(key.Value, names))
			continue
		}
		if line, dup := seen[key.Value]; dup {
			p.errorf(key, "%s is given twice in %s, first on line %d; expected once", key.Value, what, line)
			continue
		}
		seen[key.Value] = key.Line
		fields[at].read(value)
	}
	for _, f := range fields {
		if _, ok := seen[f.name]; f.required && !ok {
			p.errorf(n, "%s lacks %s; expected %s", what, f.name, strings.Join(names, ", "))
		}
	}
}

// list reads a list's items. An empty one is refused where leaving the field
// out would mean "all".
func (p *parser) list(n *yaml.Node, what, items string, emptyOK bool, read func(i int, item *yaml.Node)) {
	switch {
	case n.Kind != yaml.SequenceNode:
		p.errorf(n, "%s is %s; expected a list of %s", what, describe(n), items)
	case len(n.Content) == 0 && !emptyOK:
		p.errorf(n, "%s is an empty list; expected at least one of %s (leave %s out to match all)", what, items, what)
	default:
		for i, item := range n.Content {
			if p.more {
				return
			}
			read(i, item)
		}
	}
}

// str reads a string; want describes a correct value.
func (p *parser) str(n *yaml.Node, what, want string) (string, bool) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		p.errorf(n, "%s is %s; expected %s", what, describe(n), want)
		return "", false
	}
	return n.Value, true
}

// word reads one word of a set and returns its index, or -1.
func (p *parser) word(n *yaml.Node, what string, words []string) int {
	s, ok := p.str(n, what, "one of "+strings.Join(words, ", "))
	if !ok {
		return -1
	}
	i := slices.Index(words, s)
	if i < 0 {
		p.errorf(n, "%s is %q; %s", what, clip(s), expectedOneOf(s, words))
	}
	return i
}

// number reads a decimal integer; it returns 0 on error.
func (p *parser) number(n *yaml.Node, what string, low, high int) int {
	v, err := strconv.Atoi(n.Value)
	ok := n.Kind == yaml.ScalarNode && n.ShortTag() == "!!int" && err == nil &&
		v >= low && v <= high && n.Value == strconv.Itoa(v)
	if !ok {
		p.errorf(n, "%s is %s; expected a decimal number from %d to %d", what, describe(n), low, high)
		return 0
	}
	return v
}

// describe describes what was found in the terms of a person who writes YAML.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.AliasNode:
		return "an alias (*" + clip(n.Value) + "), which policies do not support: write the value out"
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case "!!null":
		return "empty"
	case "!!str":
		return fmt.Sprintf("the string %q", clip(n.Value))
	case "!!int", "!!float":
		return "the number " + clip(n.Value)
	case "!!bool":
		return "the boolean " + clip(n.Value)
	}
	return clip(n.ShortTag() + " " + n.Value)
}

// clip bounds how much of the file a message repeats.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// expectedOneOf lists the known words, or only the one that was almost certainly meant.
func expectedOneOf(got string, known []string) string {
	all := "expected one of " + strings.Join(known, ", ")
	if near := nearest(got, known); near != "" {
		return fmt.Sprintf("did you mean %s? (%s)", near, all)
	}
	return all
}

// nearest returns the known word that differs by at most a third, ignoring case.
func nearest(got string, known []string) string {
	if len(got) > 40 {
		return ""
	}
	best, least := "", 1<<30
	for _, k := range known {
		if d := distance(strings.ToLower(got), strings.ToLower(k)); d < least && d <= max(1, len(k)/3) {
			best, least = k, d
		}
	}
	return best
}

// distance is the Levenshtein distance.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
