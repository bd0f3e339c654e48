package sniff

import (
	"encoding/binary"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// HTTP/2 with prior knowledge (RFC 9113, section 3.3): the preface, SETTINGS, and the
// first request's header block, in HEADERS and CONTINUATION frames. Requests that
// follow on the same connection are not read.

const (
	frameHeader     = 9
	frameMax        = 1 << 14
	frameData       = 0
	frameHeaders    = 1
	framePriority   = 2
	frameReset      = 3
	frameSettings   = 4
	framePush       = 5
	frameGoAway     = 7
	frameContinue   = 9
	flagEndHeaders  = 4
	flagPadded      = 8
	flagHasPriority = 32

	hpackTable  = 4096
	maxFieldLen = 8 << 10
)

func http2(p []byte) (Seen, int, error) {
	seen := Seen{Kind: HTTP2}
	if len(p) < len(preface) {
		return seen, len(preface), nil
	}
	var block []byte
	var stream uint32 // of the header block, once it has begun
	for off, first := len(preface), true; ; first = false {
		if len(p) < off+frameHeader {
			return seen, off + frameHeader, nil
		}
		h := p[off:]
		n := int(h[0])<<16 | int(h[1])<<8 | int(h[2])
		typ, flags, id := h[3], h[4], binary.BigEndian.Uint32(h[5:])&(1<<31-1)
		if n > frameMax || first && typ != frameSettings || stream != 0 && (typ != frameContinue || id != stream) {
			return seen, 0, ErrMalformed
		}
		off += frameHeader + n
		if len(p) < off {
			return seen, off, nil
		}
		payload := h[frameHeader : frameHeader+n]
		switch typ {
		case frameHeaders:
			if id == 0 || id%2 == 0 {
				return seen, 0, ErrMalformed
			}
			c := cursor{b: payload}
			padding := 0
			if flags&flagPadded != 0 {
				padding = c.uint(1)
			}
			if flags&flagHasPriority != 0 {
				c.skip(5)
			}
			if block = c.take(len(c.b) - padding); c.bad {
				return seen, 0, ErrMalformed
			}
			block, stream = block[:len(block):len(block)], id
		case frameContinue:
			if stream == 0 {
				return seen, 0, ErrMalformed
			}
			block = append(block, payload...)
		case frameData, frameReset, framePush, frameGoAway:
			return seen, 0, ErrMalformed // there is no stream yet
		}
		if stream != 0 && flags&flagEndHeaders != 0 {
			return seen, 0, seen.readFields(block)
		}
	}
}

// readFields reads the header block of a request (section 8.3.1).
func (s *Seen) readFields(block []byte) error {
	values := make(map[string]string, 5)
	bad := false
	d := hpack.NewDecoder(hpackTable, func(f hpack.HeaderField) {
		name := f.Name
		if name == "host" || strings.HasPrefix(name, ":") {
			_, twice := values[name]
			bad = bad || twice
			values[name] = f.Value
		}
		bad = bad || name != strings.ToLower(name)
	})
	d.SetMaxStringLength(maxFieldLen)
	if _, err := d.Write(block); err != nil {
		return ErrMalformed
	}
	if d.Close() != nil || bad || values[":method"] == "" {
		return ErrMalformed
	}
	authority, named := values[":authority"]
	host, hosted := values["host"]
	if !named {
		authority, named = host, hosted
	} else if hosted && !strings.EqualFold(host, authority) {
		return ErrMalformed
	}
	if named {
		name, ok := hostOf(authority)
		if !ok {
			return ErrMalformed
		}
		s.Name = name
	}
	s.Method = values[":method"]
	s.Path, _, _ = strings.Cut(values[":path"], "?")
	return nil
}
