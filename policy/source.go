package policy

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Source says where a sandbox's rules come from: a Document that was given or, where it
// was decided that none is, a Builtin. It travels whole from the flag to the worker, through
// records, upgrades and restarts, and is one or the other wherever it is decoded: an
// absent, empty or damaged one is an error, never the Builtin. The zero value is neither.
type Source struct {
	document Document
	builtin  *Builtin
}

// ErrNoSource is the error of the zero Source.
var ErrNoSource = errors.New("it is not said which policy applies, nor that none was given")

// Given is the source of a sandbox that was given a policy.
func Given(d Document) Source { return Source{document: d} }

// NotGiven is the source of a sandbox that was given none.
func NotGiven(b Builtin) Source { return Source{builtin: &b} }

// IsZero reports whether s is the zero value, which denies.
func (s Source) IsZero() bool { return s.builtin == nil && s.document == Document{} }

// Document is the policy that was given, and whether one was.
func (s Source) Document() (Document, bool) { return s.document, s.builtin == nil && !s.IsZero() }

// Builtin is what holds in the place of a policy, and whether none was given.
func (s Source) Builtin() (Builtin, bool) {
	if s.builtin == nil {
		return Builtin{}, false
	}
	return *s.builtin, true
}

// Name is the document's, or BuiltinName.
func (s Source) Name() string {
	if s.builtin != nil {
		return BuiltinName
	}
	return s.document.name
}

// Policy is the policy, the caller's to change.
func (s Source) Policy() (*Policy, error) {
	switch {
	case s.IsZero():
		return nil, ErrNoSource
	case s.builtin != nil:
		return s.builtin.Policy(), nil
	}
	return s.document.Policy()
}

// Text is the policy as a person reads it: as it was given, or the Builtin in YAML.
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

// UnmarshalJSON takes a document or a built-in policy, and nothing that is neither or both.
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
