package dns

// Reading the sections of an answer, record by record.
//
// dnsmessage holds names as text, which cannot express a dot inside a label, and it rejects a whole
// message for one. Such names are ordinary in record data: a zone's contact of the form
// john.doe@example.com (RFC 1035 section 8) comes with every negative answer of the zone, and
// services are named "Printer (2.0)" (RFC 6763 section 4.1.1). The data of such a record is kept in
// wire form, with its names written out.

import (
	"bytes"
	"errors"
	"fmt"

	"golang.org/x/net/dns/dnsmessage"
)

// maxPointers bounds the compression pointers in one name, as dnsmessage does.
const maxPointers = 10

// readSections reads the answer and the authority section of msg, which p has started to read and
// whose question ends at qend. Owners are returned in lower case, and names in data without the
// case that we mixed.
func readSections(p *dnsmessage.Parser, msg []byte, qend int) (answers, authorities []dnsmessage.Resource, err error) {
	if err := p.SkipAllQuestions(); err != nil {
		return nil, nil, fmt.Errorf("reading the question: %w", err)
	}
	var places [3][]record
	if _, ok := walk(msg, qend, func(rec record) bool {
		places[rec.section] = append(places[rec.section], rec)
		return true
	}); !ok {
		return nil, nil, errMalformed
	}
	asked := name(msg[headerLen : qend-4]).dotted()
	answers, err = readSection(msg, asked, places[0], p.AnswerHeader, p.Answer, p.SkipAnswer)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the answer: %w", err)
	}
	authorities, err = readSection(msg, asked, places[1], p.AuthorityHeader, p.Authority, p.SkipAuthority)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the authority section: %w", err)
	}
	return answers, authorities, nil
}

// readSection reads one section to its end with the parser's methods for it.
func readSection(msg []byte, asked string, places []record, header func() (dnsmessage.ResourceHeader, error), whole func() (dnsmessage.Resource, error), skip func() error) ([]dnsmessage.Resource, error) {
	var section []dnsmessage.Resource
	for i := 0; ; i++ {
		h, err := header()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return section, nil
		}
		if err != nil {
			return nil, err
		}
		r := dnsmessage.Resource{Header: h}
		if data := dottedData(msg, places[i], asked); data != nil {
			r.Body = &dnsmessage.UnknownResource{Type: h.Type, Data: data}
			err = skip()
		} else {
			r, err = whole()
		}
		if err != nil {
			return nil, err
		}
		fold(&r.Header.Name)
		for _, n := range namesIn(r.Body) {
			unmix(n.Data[:n.Length], asked)
		}
		section = append(section, r)
	}
}

// nameLayout says where record data holds names: after so many bytes, so many names, and only plain
// bytes after them.
var nameLayout = map[uint16]struct{ before, names int }{
	2: {0, 1}, 6: {0, 2}, typePTR: {0, 1}, 15: {2, 1}, 33: {6, 1}, // NS, SOA, PTR, MX, SRV
}

// dottedData returns the data of a record with its names written out, if one of them has a dot
// inside a label; nil otherwise.
func dottedData(msg []byte, rec record, asked string) []byte {
	layout, ok := nameLayout[rec.rtype]
	off, _ := skipName(msg, rec.start)
	off += 10
	if !ok || off+layout.before > rec.end {
		return nil
	}
	data, dotted := bytes.Clone(msg[off:off+layout.before]), false
	off += layout.before
	for range layout.names {
		n, ok := expandName(msg[:rec.end], off)
		if !ok {
			return nil
		}
		off, _ = skipName(msg, off)
		for rest := n; len(rest) > 1; rest = rest[1+rest[0]:] {
			dotted = dotted || bytes.IndexByte(rest[1:1+rest[0]], '.') >= 0
		}
		text := []byte(name(n).dotted()) // n[i+1] is text[i], or a length where that is a dot
		unmix(text, asked)
		for i, c := range text {
			if c != '.' {
				n[i+1] = c
			}
		}
		data = append(data, n...)
	}
	if !dotted || off > rec.end {
		return nil
	}
	return append(data, msg[off:rec.end]...)
}

// expandName returns the name at off in wire form, with pointers followed.
func expandName(msg []byte, off int) (n []byte, ok bool) {
	pointers := 0
	for off < len(msg) {
		c := int(msg[off])
		switch {
		case c >= 0xc0:
			if pointers++; pointers > maxPointers || off+2 > len(msg) {
				return nil, false
			}
			off = int(be16(msg, off) & 0x3fff)
			continue
		case c > maxLabel || off+1+c > len(msg) || len(n)+1+c > maxName:
			return nil, false
		}
		n = append(n, msg[off:off+1+c]...)
		if c == 0 {
			return n, true
		}
		off += 1 + c
	}
	return nil, false
}
