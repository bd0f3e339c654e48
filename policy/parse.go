package policy

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// Parsing is strict, because a misunderstood policy is not enforced: a misspelt field, an alias, a
// second document or a value of the wrong type is an error, and each error gives its position, what
// was found and what was expected. yaml.v3 only builds the tree of nodes with their positions. The
// rest is read by hand, so nothing is guessed from Go types.

// MaxPolicyBytes bounds a policy file.
const MaxPolicyBytes = 4 << 20

// MaxRuleName bounds a rule's name. It leaves room for the kind, namespace and name of a Kubernetes
// object and the index of a rule in it.
const MaxRuleName = 512

// maxErrors bounds how many mistakes one Parse reports.
const maxErrors = 20

// Error is one mistake in a policy file. Lines and columns count from 1.
type Error struct {
	File      string
	Line, Col int
	Msg       string
}

func (e *Error) Error() string { return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Col, e.Msg) }

// Parse parses a policy in YAML, or in JSON, which is a subset of it. Its error joins one *Error
// for each mistake; name appears only in those.
func Parse(name string, data []byte) (*Policy, error) {
	p := &parser{file: name}
	var bad *textError
	if errors.As(checkText(data), &bad) {
		p.errorAt(bad.line, bad.col, "%s", bad.msg)
		return nil, p.err()
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		p.errorAt(1, 1, emptyText)
		return nil, p.err()
	case err != nil:
		p.syntaxError(err)
		return nil, p.err()
	}
	out := p.policy(doc.Content[0])
	switch err := dec.Decode(&more); {
	case errors.Is(err, io.EOF):
	case err != nil:
		p.syntaxError(err)
	default:
		p.errorf(&more, "a second YAML document starts here; expected one policy per file: put the rules into one document, or into two files")
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return out, nil
}

// parser collects the mistakes of one file.
type parser struct {
	file string
	errs []*Error
	more bool
}

// err joins the mistakes in order of position.
func (p *parser) err() error {
	slices.SortStableFunc(p.errs, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
	})
	var all []error
	for _, e := range p.errs {
		all = append(all, e)
	}
	if p.more {
		all = append(all, fmt.Errorf("%s: more mistakes follow; these are %d of them", p.file, maxErrors))
	}
	return errors.Join(all...)
}

func (p *parser) errorf(n *yaml.Node, format string, args ...any) {
	p.errorAt(n.Line, n.Column, format, args...)
}

func (p *parser) errorAt(line, col int, format string, args ...any) {
	if len(p.errs) == maxErrors {
		p.more = true
		return
	}
	// Text quoted from the file must not reach a terminal as control sequences.
	msg := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, fmt.Sprintf(format, args...))
	p.errs = append(p.errs, &Error{p.file, max(line, 1), max(col, 1), msg})
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(?s:(.*))$`)

// syntaxError extracts the line from a yaml.v3 message, which has no column.
func (p *parser) syntaxError(err error) {
	m := yamlLine.FindStringSubmatch(err.Error())
	if m == nil {
		p.errorAt(1, 1, "invalid YAML: %v", err)
		return
	}
	line, _ := strconv.Atoi(m[1]) // 0 if there is none
	p.errorAt(line, 1, "invalid YAML: %s", m[2])
}

func (p *parser) policy(n *yaml.Node) *Policy {
	out := &Policy{}
	p.mapping(n, "the policy", []field{
		{"apiVersion", true, func(v *yaml.Node) { out.APIVersion = p.constant(v, "apiVersion", APIVersion) }},
		{"kind", true, func(v *yaml.Node) { out.Kind = p.constant(v, "kind", Kind) }},
		{"metadata", true, func(v *yaml.Node) { p.metadata(v, &out.Metadata) }},
		{"spec", true, func(v *yaml.Node) { p.spec(v, &out.Spec) }},
	})
	return out
}

func (p *parser) constant(n *yaml.Node, what, want string) string {
	s, ok := p.str(n, what, want)
	if ok && s != want {
		p.errorf(n, "%s is %q; expected %s", what, s, want)
	}
	return s
}

var (
	policyName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$`)
	ruleNames  = regexp.MustCompile(`^[A-Za-z0-9]([-_./A-Za-z0-9]*[A-Za-z0-9])?$`)
)

func (p *parser) metadata(n *yaml.Node, out *Metadata) {
	const want = "a name of lower-case letters, digits, - and ., at most 253"
	p.mapping(n, "metadata", []field{{"name", true, func(v *yaml.Node) {
		s, ok := p.str(v, "metadata.name", want)
		if ok && (!policyName.MatchString(s) || len(s) > 253) {
			p.errorf(v, "metadata.name is %q; expected %s", s, want)
		}
		out.Name = s
	}}})
}

func (p *parser) spec(n *yaml.Node, out *Spec) {
	out.DefaultAction = Reject
	p.mapping(n, "spec", []field{
		{"mode", false, func(v *yaml.Node) { out.Mode = oneOf(p, v, "mode", modes) }},
		{"defaultAction", false, func(v *yaml.Node) { out.DefaultAction = p.action(v, "defaultAction") }},
		{"egress", false, func(v *yaml.Node) { out.Egress = p.rules(v, "egress") }},
		{"ingress", false, func(v *yaml.Node) { out.Ingress = p.rules(v, "ingress") }},
		{"dns", false, func(v *yaml.Node) { p.dns(v, &out.DNS) }},
		{"limits", false, func(v *yaml.Node) { p.limits(v, &out.Limits) }},
	})
}

// quantity returns the text of a scalar, whether YAML reads it as a number or a string. It returns
// the empty string for other nodes, which are no valid quantity.
func (p *parser) quantity(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode {
		return describe(n)
	}
	return n.Value
}
