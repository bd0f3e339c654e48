package dns

// The wire form of a message, RFC 1035 section 4 and RFC 6891 section 6.
//
// The code here walks a message record by record without ever following a compression pointer: when
// stepping over a name, the two bytes of a pointer end it. That makes every walk linear in the
// message and free of loops. It also makes truncation simple: cutting between two records leaves
// every remaining pointer intact, because pointers point backwards.

import (
	"encoding/binary"
	"strings"
)

const (
	headerLen    = 12
	maxName      = 255
	maxLabel     = 63
	minUDPSize   = 512   // RFC 1035 section 4.2.1, without EDNS
	ednsUDPSize  = 1232  // what our own OPT records advertise
	maxMessage   = 65535 // the length prefix of RFC 1035 section 4.2.2
	optRecordLen = 11
)

// Header bits, RFC 1035 section 4.1.1 and RFC 4035 section 3.
const (
	bitQR      = 1 << 15
	bitTC      = 1 << 9
	bitRD      = 1 << 8
	bitRA      = 1 << 7
	bitCD      = 1 << 4
	maskOpcode = 0xf << 11
	maskRcode  = 0xf
)

type rcode uint16

const (
	rcodeSuccess  rcode = 0
	rcodeFormErr  rcode = 1
	rcodeServFail rcode = 2
	rcodeNXDomain rcode = 3
	rcodeNotImp   rcode = 4
	rcodeRefused  rcode = 5
	rcodeBadVers  rcode = 16 // RFC 6891 section 9; the upper bits are in the OPT record
)

const (
	typeA     = 1
	typeCNAME = 5
	typePTR   = 12
	typeAAAA  = 28
	typeOPT   = 41
	typeTKEY  = 249
	typeTSIG  = 250
	typeIXFR  = 251
	typeAXFR  = 252
	typeANY   = 255
	classIN   = 1
)

// EDNS options: cookies (RFC 7873) and extended errors (RFC 8914).
const (
	optionCookie  = 10
	optionEDE     = 15
	edeProhibited = 18
)

func be16(b []byte, off int) uint16 { return binary.BigEndian.Uint16(b[off:]) }

func put16(b []byte, off int, v uint16) { binary.BigEndian.PutUint16(b[off:], v) }

// name is a domain name in uncompressed wire form, with ASCII letters in lower case: two names are
// the same exactly when they are equal, with no escapes.
type name string

// parseName encodes s ("example.com", final dot optional). It returns false if s is not a valid
// name.
func parseName(s string) (name, bool) {
	s = strings.TrimSuffix(s, ".")
	if s == "" {
		return "", false
	}
	var b []byte
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > maxLabel {
			return "", false
		}
		b = append(b, byte(len(label)))
		b = append(b, label...)
	}
	b = append(b, 0)
	if len(b) > maxName {
		return "", false
	}
	for i := range b {
		b[i] = lower(b[i])
	}
	return name(b), true
}

// under reports whether n is zone or a name below it.
func (n name) under(zone name) bool {
	for s := n; len(s) >= len(zone); s = s[1+int(s[0]):] {
		if s == zone {
			return true
		}
		if s[0] == 0 {
			break
		}
	}
	return false
}

// lower folds ASCII only (RFC 4343). A length byte, at most 63, is below 'A'.
func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// skipName returns the offset after the name at off.
func skipName(msg []byte, off int) (int, bool) {
	for off < len(msg) {
		c := int(msg[off])
		switch {
		case c == 0:
			return off + 1, true
		case c <= maxLabel:
			off += 1 + c
		case c >= 0xc0:
			return off + 2, off+2 <= len(msg)
		default:
			return 0, false
		}
	}
	return 0, false
}

// question is the sole entry of a question section.
type question struct {
	name  name
	qtype uint16
	class uint16
	end   int // offset after it in its message
}

// readQuestion reads the question at the start of the question section. Its name may not be
// compressed: there is nothing before it to point to.
func readQuestion(msg []byte) (question, bool) {
	off := headerLen
	for {
		if off >= len(msg) || off-headerLen >= maxName {
			return question{}, false
		}
		c := int(msg[off])
		if c == 0 {
			off++
			break
		}
		if c > maxLabel {
			return question{}, false
		}
		off += 1 + c
	}
	if off-headerLen > maxName || off+4 > len(msg) {
		return question{}, false
	}
	var b [maxName]byte
	n := copy(b[:], msg[headerLen:off])
	for i, c := range b[:n] {
		b[i] = lower(c)
	}
	return question{name: name(b[:n]), qtype: be16(msg, off), class: be16(msg, off+2), end: off + 4}, true
}

// record is the place of one resource record in a message.
type record struct {
	start, end int
	rtype      uint16
	class      uint16
	section    int // 0 answer, 1 authority, 2 additional
}

// walk calls visit for each record after the question, which ends at off, and returns the offset
// after the last one. It returns false if the message is malformed or visit returned false.
func walk(msg []byte, off int, visit func(record) bool) (int, bool) {
	for section := range 3 {
		for range be16(msg, 6+2*section) {
			start := off
			var ok bool
			if off, ok = skipName(msg, off); !ok || off+10 > len(msg) {
				return 0, false
			}
			rec := record{start: start, rtype: be16(msg, off), class: be16(msg, off+2), section: section}
			off += 10 + int(be16(msg, off+8))
			if off > len(msg) {
				return 0, false
			}
			rec.end = off
			if !visit(rec) {
				return 0, false
			}
		}
	}
	return off, true
}

// truncate cuts msg, a well-formed message longer than limit whose question ends at qend, to at
// most limit bytes: as many whole records as fit in front of the OPT record, which is kept, and TC
// set (RFC 2181 section 9, RFC 6891 section 7). Signatures over the whole message cannot survive
// this and are dropped too.
func truncate(msg []byte, qend, limit int) []byte {
	limit = max(limit, minUDPSize)
	var opt record
	walk(msg, qend, func(r record) bool {
		if r.rtype == typeOPT && r.section == 2 {
			opt = r
		}
		return true
	})
	room := limit - (opt.end - opt.start)
	if room < qend { // an OPT record that leaves no room for the question
		opt, room = record{}, limit
	}
	cut := qend
	var counts [3]uint16
	full := false
	walk(msg, qend, func(r record) bool {
		if r.rtype == typeTSIG || r == opt {
			return true
		}
		if full = full || r.end > room || (opt.end != 0 && r.start > opt.start); full {
			return true
		}
		cut = r.end
		counts[r.section]++
		return true
	})
	out := make([]byte, 0, limit)
	out = append(out, msg[:cut]...)
	if opt.end != 0 {
		out = append(out, msg[opt.start:opt.end]...)
		counts[2]++
	}
	put16(out, 2, be16(out, 2)|bitTC)
	for i, n := range counts {
		put16(out, 6+2*i, n)
	}
	return out
}

// reply starts an answer to query: its header, its question (if it could be read, qend > 0) and
// nothing else.
func reply(query []byte, qend int, code rcode) []byte {
	n := max(qend, headerLen)
	out := make([]byte, headerLen, n+optRecordLen+64)
	if qend > 0 {
		out = append(out, query[headerLen:qend]...)
		put16(out, 4, 1)
	}
	put16(out, 0, be16(query, 0))
	bits := be16(query, 2) & (maskOpcode | bitRD | bitCD)
	put16(out, 2, bits|bitQR|bitRA|uint16(code)&maskRcode)
	return out
}

// appendRecord appends an answer record owned by the question's name.
func appendRecord(msg []byte, rtype uint16, ttl uint32, rdata []byte) []byte {
	msg = append(msg, 0xc0, headerLen)
	msg = binary.BigEndian.AppendUint16(msg, rtype)
	msg = binary.BigEndian.AppendUint16(msg, classIN)
	msg = binary.BigEndian.AppendUint32(msg, ttl)
	msg = binary.BigEndian.AppendUint16(msg, uint16(len(rdata)))
	msg = append(msg, rdata...)
	put16(msg, 6, be16(msg, 6)+1)
	return msg
}

// appendOPT appends our own OPT record, of version 0, with the given options, the upper bits of
// code, and the query's DO bit, which every answer repeats (RFC 3225 section 3).
func appendOPT(msg []byte, code rcode, do bool, options ...byte) []byte {
	flags := uint32(code>>4) << 24
	if do {
		flags |= 1 << 15
	}
	msg = append(msg, 0)
	msg = binary.BigEndian.AppendUint16(msg, typeOPT)
	msg = binary.BigEndian.AppendUint16(msg, ednsUDPSize)
	msg = binary.BigEndian.AppendUint32(msg, flags)
	msg = binary.BigEndian.AppendUint16(msg, uint16(len(options)))
	msg = append(msg, options...)
	put16(msg, 10, be16(msg, 10)+1)
	return msg
}

// extendedError returns an option that gives the reason, in text of up to 100 bytes.
func extendedError(info uint16, text string) []byte {
	text = text[:min(len(text), 100)]
	b := binary.BigEndian.AppendUint16(nil, optionEDE)
	b = binary.BigEndian.AppendUint16(b, uint16(2+len(text)))
	b = binary.BigEndian.AppendUint16(b, info)
	return append(b, text...)
}

// goodOptions reports whether b is a well-formed list of options, and any cookie in it has a valid
// length: a client cookie of 8 bytes, alone or with a server cookie of 8 to 32 (RFC 7873 section
// 5.2.2 wants FORMERR for others). The content of other options does not matter to a server that
// implements none of them (RFC 6891 section 6.1.2).
func goodOptions(b []byte) bool {
	for len(b) > 0 {
		if len(b) < 4 {
			return false
		}
		code, n := be16(b, 0), int(be16(b, 2))
		if b = b[4:]; n > len(b) || code == optionCookie && n != 8 && (n < 16 || n > 40) {
			return false
		}
		b = b[n:]
	}
	return true
}

// sameQuestion compares two messages' question bytes, names as RFC 4343 says. Type and class are
// compared exactly: folding would confuse 0x41 with 0x61.
func sameQuestion(a, b []byte, qend int) bool {
	if len(a) < qend || len(b) < qend {
		return false
	}
	for i := headerLen; i < qend-4; i++ {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return string(a[qend-4:qend]) == string(b[qend-4:qend])
}
