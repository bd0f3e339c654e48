package gatetest

import (
	"bytes"
	"slices"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Spoken collects the bytes that an HTTP/2 client sends.
type Spoken struct {
	bytes.Buffer
	*http2.Framer
	block   bytes.Buffer
	encoder *hpack.Encoder
}

// NewSpoken begins with the preface and SETTINGS.
func NewSpoken() *Spoken {
	s := new(Spoken)
	s.WriteString(http2.ClientPreface)
	s.Framer = http2.NewFramer(&s.Buffer, nil)
	s.AllowIllegalWrites = true
	s.encoder = hpack.NewEncoder(&s.block)
	_ = s.WriteSettings()
	return s
}

// Fields encodes a header block.
func (s *Spoken) Fields(kv ...string) []byte {
	s.block.Reset()
	for i := 0; i < len(kv); i += 2 {
		_ = s.encoder.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	return bytes.Clone(s.block.Bytes())
}

// Request appends a request in one frame, without :authority if that is empty. The frame ends the
// request unless more begins with "open".
func (s *Spoken) Request(stream uint32, method, path, authority string, more ...string) *Spoken {
	kv := []string{":method", method, ":scheme", "http", ":path", path, ":authority", authority}
	if authority == "" {
		kv = kv[:6]
	}
	end := !slices.Contains(more, "open")
	if !end {
		more = slices.Delete(slices.Clone(more), 0, 1)
	}
	_ = s.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: s.Fields(append(kv, more...)...), EndStream: end, EndHeaders: true})
	return s
}

// Data appends a DATA frame.
func (s *Spoken) Data(stream uint32, end bool, data string) *Spoken {
	_ = s.WriteData(stream, end, []byte(data))
	return s
}

// Raw appends a frame of any kind.
func (s *Spoken) Raw(typ http2.FrameType, flags http2.Flags, stream uint32, payload string) *Spoken {
	_ = s.WriteRawFrame(typ, flags, stream, []byte(payload))
	return s
}
