package policy

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

// A name has one spelling: lower case, A-labels, no trailing dot. Names in rules, DNS questions,
// ClientHellos and HTTP requests all come through here, so two names are equal exactly if their
// strings are. Only names written by people may contain non-ASCII letters.
//
// A name that a resolver or server might read differently is refused, not interpreted: escapes,
// bytes other than letters, digits, - and _, and any form that a C library would parse as an
// address (127.1, 0x7f000001, 2130706433).

// Bounds on a name, RFC 1035 section 2.3.4.
const (
	MaxName  = 253
	MaxLabel = 63
)

// Errors for strings that are not names.
var (
	errNameEmpty   = errors.New("it is empty")
	errNameLong    = fmt.Errorf("it has more than %d characters", MaxName)
	errLabelLong   = fmt.Errorf("it has a label of more than %d characters", MaxLabel)
	errLabelEmpty  = errors.New("it has an empty label")
	errNameAddress = errors.New("it is an address, not a name")
	errNameIDN     = errors.New("it is no valid internationalised name")
)

// NormalizeName returns the normal form of a host name written by a person, or an error if it is
// not a name. It allocates only if it changes something.
func NormalizeName(s string) (string, error) {
	if len(s) > 4*MaxName {
		return "", errNameLong
	}
	if strings.IndexFunc(s, func(r rune) bool { return r >= utf8.RuneSelf }) >= 0 {
		if !utf8.ValidString(s) {
			return "", errNameIDN
		}
		// The Lookup profile maps case, width and the ideographic full stops, and refuses misplaced
		// bidi characters and joiners, which can make labels look alike.
		a, err := idna.Lookup.ToASCII(strings.TrimSuffix(s, "."))
		if err != nil {
			return "", errNameIDN
		}
		s = a
	}
	return NormalizeSaid(s)
}

// NormalizeSaid returns the normal form of a name that a program sent, in a ClientHello or a
// request. Servers compare its bytes, so only the case of ASCII letters is mapped; a name with any
// other character is refused.
func NormalizeSaid(s string) (string, error) {
	for i := range len(s) {
		if 'A' <= s[i] && s[i] <= 'Z' {
			s = strings.ToLower(s)
			break
		}
	}
	s = strings.TrimSuffix(s, ".")
	if err := checkName(s); err != nil {
		return "", err
	}
	return s, nil
}

// checkName checks a lower-case name without a trailing dot.
func checkName(s string) error {
	if s == "" {
		return errNameEmpty
	}
	if len(s) > MaxName {
		return errNameLong
	}
	start := 0
	for i := 0; i <= len(s); i++ {
		if i < len(s) && s[i] != '.' {
			if !nameByte(s[i]) {
				return fmt.Errorf("it has the character %q, which names do not have", s[i])
			}
			continue
		}
		switch n := i - start; {
		case n == 0:
			return errLabelEmpty
		case n > MaxLabel:
			return errLabelLong
		}
		if i < len(s) {
			start = i + 1
		}
	}
	if numeric(s[start:]) {
		return errNameAddress
	}
	return nil
}

func nameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

// numeric reports whether a C library or a browser would parse a name with this last label as an
// IPv4 address: all digits, or 0x and hexadecimal digits.
func numeric(label string) bool {
	if rest, ok := strings.CutPrefix(label, "0x"); ok {
		return strings.Trim(rest, "0123456789abcdef") == ""
	}
	return strings.Trim(label, "0123456789") == ""
}

// NormalizeWire returns the normal form of a name in DNS wire form without compression: length,
// label, …, 0. A label with a dot in it is refused, like any other byte that is invalid in a name.
func NormalizeWire(wire []byte) (string, error) {
	var buf [MaxName + 1]byte
	n := 0
	for len(wire) > 0 && wire[0] != 0 {
		size := int(wire[0])
		switch {
		case size > MaxLabel:
			return "", errLabelLong
		case size >= len(wire):
			return "", errors.New("it ends within a label")
		case n+size+1 > len(buf):
			return "", errNameLong
		}
		for _, c := range wire[1 : 1+size] {
			if 'A' <= c && c <= 'Z' {
				c += 'a' - 'A'
			}
			if !nameByte(c) {
				return "", fmt.Errorf("it has the byte %#x, which names do not have", c)
			}
			buf[n] = c
			n++
		}
		buf[n] = '.'
		n++
		wire = wire[1+size:]
	}
	switch {
	case len(wire) != 1:
		return "", errors.New("it does not end in the root")
	case n == 0:
		return "", errNameEmpty
	}
	s := string(buf[:n-1])
	if err := checkName(s); err != nil {
		return "", err
	}
	return s, nil
}

// depth is how many labels a pattern leaves open before its suffix.
type depth uint8

const (
	exact      depth = iota // "x": x itself
	oneLabel                // "*.x": one label before x
	manyLabels              // "**.x": one or more labels before x
)

// parsePattern splits a domain pattern into the parts of its normal form.
func parsePattern(s string) (suffix string, d depth, err error) {
	rest, many := strings.CutPrefix(s, "**.")
	rest, one := strings.CutPrefix(rest, "*.")
	switch {
	case many && one, strings.Contains(rest, "*"):
		return "", 0, errors.New("a * stands for one whole label and ** for one or more, only in front: *.example.com, **.example.com")
	case many:
		d = manyLabels
	case one:
		d = oneLabel
	}
	suffix, err = NormalizeName(rest)
	return suffix, d, err
}

// NormalizePattern returns the normal form of a domain pattern.
func NormalizePattern(s string) (string, error) {
	suffix, d, err := parsePattern(s)
	if err != nil {
		return "", err
	}
	return pattern{suffix, d}.String(), nil
}
