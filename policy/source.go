package policy

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Source is where a sandbox's rules come from: a Document or, by explicit decision, a Builtin. It
// travels as one value from the flag to the worker, through records, upgrades and restarts, and is
// one or the other wherever it is decoded. An absent, empty or damaged Source is an error, never
// the Builtin. The zero value is neither.
type Source struct {
	document Document
	builtin  *Builtin
}

// ErrNoSource is returned for the zero Source.
var ErrNoSource = errors.New("it is not said which policy applies, nor that none was given")

// Given returns the source of a sandbox with a policy.
func Given(d Document) Source { return Source{document: d} }

// NotGiven returns the source of a sandbox without a policy.
func NotGiven(b Builtin) Source { return Source{builtin: &b} }

// IsZero reports whether s is the zero value, which denies.
func (s Source) IsZero() bool { return s.builtin == nil && s.document == Document{} }

// Document returns the policy that was given, and whether one was.
func (s Source) Document() (Document, bool) { return s.document, s.builtin == nil && !s.IsZero() }

// Builtin returns the built-in policy, and whether it applies.
func (s Source) Builtin() (Builtin, bool) {
	if s.builtin == nil {
		return Builtin{}, false
	}
	return *s.builtin, true
}

// Name returns the document's name, or BuiltinName.
func (s Source) Name() string {
	if s.builtin != nil {
		return BuiltinName
	}
	return s.document.name
}

// Policy returns the policy, which the caller may change.
func (s Source) Policy() (*Policy, error) {
	switch {
	case s.IsZero():
		return nil, ErrNoSource
	case s.builtin != nil:
		return s.builtin.Policy(), nil
	}
	return s.document.Policy()
}

// Text returns the policy in readable form: as it was given, or the Builtin in YAML.
func (s Source) Text() (string, error) {
	switch {
	case s.IsZero():
		return "", ErrNoSource
	case s.builtin != nil:
		text, err := s.builtin.Policy().YAML()
		return string(text), err
	}
	return s.document.text, nil
}

type sourceJSON struct {
	Given    *Document `json:"given,omitempty"`
	NotGiven *Builtin  `json:"notGiven,omitempty"`
}

// MarshalJSON fails for the zero value.
func (s Source) MarshalJSON() ([]byte, error) {
	switch {
	case s.IsZero():
		return nil, fmt.Errorf("encode the policy: %w", ErrNoSource)
	case s.builtin != nil:
		return json.Marshal(sourceJSON{NotGiven: s.builtin})
	}
	return json.Marshal(sourceJSON{Given: &s.document})
}

// UnmarshalJSON accepts a document or a built-in policy, and refuses neither or both.
func (s *Source) UnmarshalJSON(b []byte) error {
	var in sourceJSON
	if err := decodeStrict(b, &in); err != nil {
		return fmt.Errorf("decode the policy: %w", err)
	}
	switch {
	case in.Given != nil && in.NotGiven != nil:
		return errors.New("decode the policy: one was given, and none was given")
	case in.Given != nil:
		*s = Given(*in.Given)
	case in.NotGiven != nil:
		*s = NotGiven(*in.NotGiven)
	default:
		return fmt.Errorf("decode the policy: %w", ErrNoSource)
	}
	return nil
}
