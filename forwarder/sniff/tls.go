package sniff

import "encoding/binary"

// A ClientHello in TLS records (RFC 8446, sections 4.1.2 and 5.1; RFC 6066, section 3). It may be
// cut into records anywhere. More bytes in its last record, a second server_name extension, or a
// list of several names are refused: the server might read another name than we do.

const (
	recordHandshake  = 22
	recordHeader     = 5
	recordMax        = 1 << 14
	handshakeHeader  = 4
	typeClientHello  = 1
	extServerName    = 0
	extEncryptedHelo = 0xfe0d // RFC 9849
	nameTypeHost     = 0
	maxNameLen       = 255
)

// Hello reads the ClientHello at the front of p, in records of size bytes together. If it does not
// end in p, need says how many bytes there must be to go on.
func Hello(p []byte) (seen Seen, size, need int, err error) {
	seen.Kind = TLS
	var msg []byte // the handshake message so far
	whole := -1    // its length, once known
	for off := 0; ; {
		if off+recordHeader >= MaxFirst {
			return seen, 0, 0, ErrTooLong
		}
		rest := p[off:]
		if len(rest) < recordHeader {
			if len(rest) > 0 && rest[0] != recordHandshake || len(rest) > 1 && rest[1] != 3 {
				return notTLS(off)
			}
			return seen, 0, off + recordHeader + max(1, whole-len(msg)), nil
		}
		n := int(binary.BigEndian.Uint16(rest[3:]))
		if rest[0] != recordHandshake || rest[1] != 3 || n == 0 || n > recordMax {
			return notTLS(off)
		}
		part := rest[recordHeader:min(len(rest), recordHeader+n)]
		if msg == nil {
			msg = part[:len(part):len(part)] // appending copies
		} else {
			msg = append(msg, part...)
		}
		if whole < 0 && len(msg) > 0 {
			if msg[0] != typeClientHello {
				return notTLS(off)
			}
			if len(msg) >= handshakeHeader {
				whole = handshakeHeader + int(msg[1])<<16 + int(msg[2])<<8 + int(msg[3])
				if recordHeader+whole > MaxFirst {
					return seen, 0, 0, ErrTooLong
				}
			}
		}
		switch {
		case whole >= 0 && len(msg) > whole, whole >= 0 && len(msg) == whole && len(part) < n:
			return seen, 0, 0, ErrMalformed
		case whole >= 0 && len(msg) == whole && off+recordHeader+n > MaxFirst:
			return seen, 0, 0, ErrTooLong // the same error as before all of it has come
		case whole >= 0 && len(msg) == whole:
			err = seen.readHello(msg[handshakeHeader:])
			return seen, off + recordHeader + n, 0, err
		case len(part) < n:
			// The missing bytes are in this record, or in another one with a header. Asking for all
			// of them at once bounds how often tiny records are scanned.
			missing := max(handshakeHeader, whole) - len(msg)
			if len(part)+missing > n {
				missing += recordHeader
			}
			return seen, 0, len(p) + missing, nil
		}
		off += recordHeader + n
	}
}

// notTLS classifies bytes that are no handshake record: another protocol if they are the first
// record, and later something that no server understands.
func notTLS(off int) (seen Seen, size, need int, err error) {
	if off == 0 {
		return Seen{Kind: Opaque}, 0, 0, nil
	}
	return Seen{Kind: TLS}, 0, 0, ErrMalformed
}

// readHello reads the body of a ClientHello.
func (s *Seen) readHello(b []byte) error {
	c := cursor{b: b}
	c.skip(2 + 32) // legacy_version, random
	c.vector(1)    // legacy_session_id
	c.vector(2)    // cipher_suites
	c.vector(1)    // legacy_compression_methods
	if c.bad {
		return ErrMalformed
	}
	if len(c.b) == 0 {
		return nil // no extensions: TLS 1.2 without a name
	}
	ext := cursor{b: c.vector(2)}
	if c.bad || len(c.b) > 0 {
		return ErrMalformed
	}
	named := false
	for len(ext.b) > 0 {
		typ := ext.uint(2)
		data := cursor{b: ext.vector(2)}
		if ext.bad {
			return ErrMalformed
		}
		switch typ {
		case extServerName:
			list := cursor{b: data.vector(2)}
			kind := list.uint(1)
			name := list.vector(2)
			if named || data.bad || len(data.b) > 0 || list.bad || len(list.b) > 0 ||
				kind != nameTypeHost || !isServerName(name) {
				return ErrMalformed
			}
			named = true
			s.Name = string(name)
		case extEncryptedHelo:
			s.ECH = true
		}
	}
	return nil
}

// isServerName reports whether a name has the form that RFC 6066, section 3, requires: ASCII,
// without a trailing dot. Servers disagree about what any other name stands for.
func isServerName(name []byte) bool {
	for _, c := range name {
		if c <= ' ' || c >= 0x7f {
			return false
		}
	}
	return len(name) > 0 && len(name) <= maxNameLen && name[len(name)-1] != '.'
}

// cursor takes fields off the front of b. After an overrun all its methods return empty values, and
// bad is set.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n int) []byte {
	if n < 0 || n > len(c.b) {
		c.bad, c.b = true, nil
		return nil
	}
	v := c.b[:n]
	c.b = c.b[n:]
	return v
}

func (c *cursor) skip(n int) { c.take(n) }

// uint reads a big-endian number of n bytes.
func (c *cursor) uint(n int) int {
	v := 0
	for _, b := range c.take(n) {
		v = v<<8 | int(b)
	}
	return v
}

// vector reads a field preceded by a length of n bytes.
func (c *cursor) vector(n int) []byte { return c.take(c.uint(n)) }
