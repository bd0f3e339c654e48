package sniff

import (
	"encoding/binary"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// HTTP/2 with prior knowledge (RFC 9113, section 3.3), as its client speaks it: the preface,
// SETTINGS, and then frames. The lengths alone say where one frame ends and the next begins. A
// frame's content is checked only so far that a server cannot see another boundary, or another
// request, than we do. The rest is left to the server.

const (
	frameHeader = 9
	frameMax    = 1 << 14 // for frames whose content is read here

	frameData         = 0
	frameHeaders      = 1
	framePriority     = 2
	frameReset        = 3
	frameSettings     = 4
	framePush         = 5
	framePing         = 6
	frameGoAway       = 7
	frameWindowUpdate = 8
	frameContinue     = 9

	flagEndStream   = 1
	flagAck         = 1
	flagEndHeaders  = 4
	flagPadded      = 8
	flagHasPriority = 32
)

// FrameLook is the most bytes that Frames.Next needs to see.
const FrameLook = frameHeader + 1

// Preface is how many bytes come before the first frame.
const Preface = len(preface)

// IsPreface reports whether p, of at most Preface bytes, is the start of the preface.
func IsPreface(p []byte) bool { return strings.HasPrefix(preface, string(p)) }

// Frame is one frame from a client.
type Frame struct {
	Size   int    // the whole frame
	Stream uint32 // 0: the connection
	Fields bool   // it begins a header block, which Frames.Fields reads
	Ack    bool   // it acknowledges SETTINGS
	Ping   bool   // it asks for an answer
	Data   int    // bytes of a request's content
	End    bool   // it ends the request
	Reset  bool   // it ends the stream
}

// Frames walks the frames that a client sends after the preface. The zero value stands before the
// first frame.
type Frames struct {
	settled bool   // the first frame was SETTINGS
	last    uint32 // the highest stream begun
	decoder *hpack.Decoder
	fields  fieldList
}

// Begin marks the stream as begun, by a request that came as HTTP/1.
func (f *Frames) Begin(stream uint32) { f.last = stream }

// Next looks at the frame at the front of p. If p holds too little of it, need says how many bytes,
// at most FrameLook, there must be. The caller then skips all Size bytes of the frame or, if Fields
// is set, as many as the method Fields returns.
func (f *Frames) Next(p []byte) (fr Frame, need int, err error) {
	if len(p) < frameHeader {
		return fr, frameHeader, nil
	}
	n := length(p)
	typ, flags, id := p[3], p[4], streamOf(p)
	fr.Size, fr.Stream = frameHeader+n, id
	first := !f.settled
	f.settled = true
	switch {
	case first && (typ != frameSettings || flags&flagAck != 0), !f.belongs(typ, id):
		return fr, 0, ErrMalformed
	case !fits(typ, flags, n):
		return fr, 0, ErrFrameSize
	}
	switch typ {
	case frameData:
		fr.Data, fr.End = n, flags&flagEndStream != 0
		if flags&flagPadded != 0 {
			if len(p) < FrameLook {
				return fr, FrameLook, nil
			}
			if fr.Data -= 1 + int(p[frameHeader]); fr.Data < 0 {
				return fr, 0, ErrMalformed
			}
		}
	case frameHeaders:
		fr.Fields = true
	case frameReset:
		fr.Reset = true
	case frameSettings:
		fr.Ack = flags&flagAck != 0
	case framePing:
		fr.Ping = flags&flagAck == 0
	case framePush, frameContinue: // a client pushes nothing, and Fields takes the continuations of a block
		return fr, 0, ErrMalformed
	}
	return fr, 0, nil
}

// length is the payload length in a frame's header.
func length(header []byte) int { return int(header[0])<<16 | int(header[1])<<8 | int(header[2]) }

// streamOf is the stream in a frame's header. The bit before it is reserved, and ignored (RFC 9113,
// section 4.1).
func streamOf(header []byte) uint32 { return binary.BigEndian.Uint32(header[5:]) &^ (1 << 31) }

// Last is the highest stream begun.
func (f *Frames) Last() uint32 { return f.last }

// belongs reports whether frames of the type may be about the stream: the connection, or a stream
// begun, and begun by the client if the frame sends something on it.
func (f *Frames) belongs(typ byte, id uint32) bool {
	switch typ {
	case frameData:
		return id%2 == 1 && id <= f.last
	case frameHeaders:
		return id%2 == 1
	case framePriority:
		return id != 0
	case frameReset:
		return id != 0 && (id%2 == 0 || id <= f.last)
	case frameWindowUpdate:
		return id%2 == 0 || id <= f.last
	case frameSettings, framePing, frameGoAway:
		return id == 0
	}
	return true
}

// fits reports whether a frame of the type may have n bytes. The length of DATA is left to the
// server, which announces how much it accepts, and so is that of unknown types.
func fits(typ, flags byte, n int) bool {
	switch typ {
	case frameData:
		return n > 0 || flags&flagPadded == 0
	case frameHeaders:
		return n <= frameMax
	case framePriority:
		return n == 5
	case frameReset, frameWindowUpdate:
		return n == 4
	case frameSettings:
		return n%6 == 0 && n <= frameMax && (n == 0 || flags&flagAck == 0)
	case framePing:
		return n == 8
	case frameGoAway:
		return n >= 8
	}
	return true
}

// Fields reads the header block at the front of p, in HEADERS and CONTINUATION frames. If it does
// not end in p, need says how many bytes there must be to go on, and nothing was read. A block of
// more than MaxFirst bytes is refused. Fields must read each block exactly once.
func (f *Frames) Fields(p []byte) (req StreamRequest, need int, err error) {
	id := streamOf(p)
	for off := 0; ; {
		if off+frameHeader > MaxFirst {
			return req, 0, ErrTooLong
		}
		if len(p) < off+frameHeader {
			return req, off + frameHeader, nil
		}
		h := p[off:]
		n := length(h)
		if off > 0 && (h[3] != frameContinue || streamOf(h) != id) {
			return req, 0, ErrMalformed
		}
		off += frameHeader + n
		if n > frameMax || off > MaxFirst {
			return req, 0, ErrTooLong
		}
		if len(p) < off {
			return req, off, nil
		}
		if h[4]&flagEndHeaders != 0 {
			req.Size = off
			break
		}
	}
	req.Stream = id
	req.End = p[4]&flagEndStream != 0
	again := id <= f.last
	f.last = max(f.last, id)
	if err := f.decode(p[:req.Size]); err != nil {
		return req, 0, err
	}
	if !f.fields.finish(&req, again) {
		return req, 0, ErrMalformed
	}
	return req, 0, nil
}

// decode collects the fields of a whole block.
func (f *Frames) decode(p []byte) error {
	f.fields.reset()
	if f.decoder == nil {
		f.decoder = hpack.NewDecoder(hpackTable, f.fields.add)
		f.decoder.SetAllowedMaxDynamicTableSize(maxHpackTable)
		f.decoder.SetMaxStringLength(maxFieldLen)
	}
	for first := true; len(p) > 0; first = false {
		n := frameHeader + length(p)
		c := cursor{b: p[frameHeader:n]}
		if flags := p[4]; first {
			padding := 0
			if flags&flagPadded != 0 {
				padding = c.uint(1)
			}
			if flags&flagHasPriority != 0 {
				c.skip(5)
			}
			c.b = c.take(len(c.b) - padding)
		}
		if c.bad {
			return ErrMalformed
		}
		if _, err := f.decoder.Write(c.b); err != nil {
			return ErrCompression
		}
		p = p[n:]
	}
	if f.decoder.Close() != nil {
		return ErrCompression
	}
	return nil
}

// firstStream reads the first request of a connection.
func firstStream(p []byte) (Seen, int, error) {
	seen := Seen{Kind: HTTP2}
	if len(p) < len(preface) {
		return seen, len(preface), nil
	}
	var f Frames
	for off := len(preface); ; {
		rest := p[min(off, len(p)):]
		fr, need, err := f.Next(rest)
		var req StreamRequest
		if err == nil && need == 0 && fr.Fields {
			req, need, err = f.Fields(rest)
		}
		switch {
		case err != nil:
			return seen, 0, err
		case need > 0:
			return seen, off + need, nil
		case fr.Fields:
			seen.Name, seen.Method, seen.Path, seen.Override = req.Name, req.Method, req.Path, req.Override
			seen.Stream, seen.GRPC = req.Stream, req.GRPC
			return seen, 0, nil
		}
		off += fr.Size
	}
}

// OnlyAck reports whether a server's frame with this header acknowledges SETTINGS, which has no
// content.
func OnlyAck(header []byte) bool {
	return length(header) == 0 && header[3] == frameSettings && header[4]&flagAck != 0
}

// FrameSize is the length of a frame with this header.
func FrameSize(header []byte) int { return frameHeader + length(header) }

// FrameHeader is the length of a frame's header.
const FrameHeader = frameHeader

// FrameEnds finds the boundaries between the frames that an HTTP/2 server sends. It holds no more
// than the start of a frame.
type FrameEnds struct {
	// Ended, if set, is called with each stream on which nothing more follows.
	Ended func(stream uint32, reset bool)

	head  [frameHeader]byte
	n     int // of head, so far
	left  int // of the frame
	block bool
	begun bool
}

// Feed consumes bytes that the server sent.
func (e *FrameEnds) Feed(p []byte) {
	for len(p) > 0 {
		if e.left > 0 {
			n := min(e.left, len(p))
			e.left -= n
			p = p[n:]
			continue
		}
		n := copy(e.head[e.n:], p)
		e.n += n
		p = p[n:]
		if e.n < len(e.head) {
			return
		}
		e.n, e.begun = 0, true
		e.left = length(e.head[:])
		typ, flags := e.head[3], e.head[4]
		switch typ {
		case frameHeaders, framePush, frameContinue:
			e.block = flags&flagEndHeaders == 0
		}
		ended := typ == frameReset || (typ == frameData || typ == frameHeaders) && flags&flagEndStream != 0
		if ended && e.Ended != nil {
			e.Ended(streamOf(e.head[:]), typ == frameReset)
		}
	}
}

// Until is the least number of bytes left before a frame from another sender may be inserted; 0
// means that it may be inserted here.
func (e *FrameEnds) Until() int {
	switch {
	case e.left > 0:
		return e.left
	case e.n > 0 || e.block:
		return frameHeader - e.n
	}
	return 0
}

// Begun reports whether the server has sent a frame.
func (e *FrameEnds) Begun() bool { return e.begun }
