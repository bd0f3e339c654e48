package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// Document is the text of one policy as it was given. It is the only form in which a policy's text
// travels, and only ReadDocument and its variants, NewDocument, and decoding make one. All of them
// refuse text that is empty or not UTF-8, so a policy that was lost on its way cannot be mistaken
// for none. The zero value has no policy.
type Document struct{ name, text string }

// NewDocument makes a document of text that is known to be complete, such as a string in a request.
// The name is for people and for error messages.
func NewDocument(name string, text []byte) (Document, error) {
	d := Document{name, string(text)}
	if _, err := d.Policy(); err != nil {
		return Document{}, err
	}
	return d, nil
}

// Name returns the document's name, such as its file.
func (d Document) Name() string { return d.name }

// Text returns the text as it was given.
func (d Document) Text() string { return d.text }

// Policy parses the text. Each call returns a new Policy.
func (d Document) Policy() (*Policy, error) { return Parse(d.name, []byte(d.text)) }

type documentJSON struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

// MarshalJSON fails for the zero value.
func (d Document) MarshalJSON() ([]byte, error) {
	if err := checkText([]byte(d.text)); err != nil {
		return nil, fmt.Errorf("encode the policy: %w", err)
	}
	return json.Marshal(documentJSON{d.name, d.text})
}

// UnmarshalJSON refuses text that cannot be a policy. It leaves parsing to Policy, which every use
// of a document calls.
func (d *Document) UnmarshalJSON(b []byte) error {
	var in documentJSON
	if err := decodeStrict(b, &in); err != nil {
		return fmt.Errorf("decode the policy: %w", err)
	}
	if err := checkText([]byte(in.Text)); err != nil {
		return fmt.Errorf("decode the policy %s: %w", in.Name, err)
	}
	*d = Document{in.Name, in.Text}
	return nil
}

// decodeStrict decodes one JSON value without fields that v does not have.
func decodeStrict(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}

// textError is a position in text that no policy can contain. Line and column count from 1.
type textError struct {
	line, col int
	msg       string
}

func (e *textError) Error() string { return e.msg }

// checkText refuses text that is not clean UTF-8 before it is parsed: the YAML library reads UTF-16
// and ignores a byte order mark, where another program may not.
func checkText(text []byte) error {
	at := func(i int, format string, args ...any) error {
		before := text[:i]
		return &textError{1 + bytes.Count(before, []byte{'\n'}), i - bytes.LastIndexByte(before, '\n'), fmt.Sprintf(format, args...)}
	}
	switch {
	case len(text) > MaxPolicyBytes:
		return at(0, "the file has %d bytes; expected at most %d", len(text), MaxPolicyBytes)
	case len(bytes.TrimSpace(text)) == 0:
		return at(0, emptyText)
	}
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRune(text[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			return at(i, "a byte that is not UTF-8 (0x%02x); expected a policy in UTF-8", text[i])
		case r == utf8.RuneError:
			return at(i, "U+FFFD, which stands for bytes that were not UTF-8; expected a policy in UTF-8")
		case r == '\ufeff':
			return at(i, "a byte order mark; expected UTF-8 without one")
		case r == 0:
			return at(i, "a zero byte; expected text")
		}
		i += n
	}
	return nil
}

const emptyText = "the file is empty; expected a policy that starts with apiVersion: " + APIVersion + " and kind: " + Kind
