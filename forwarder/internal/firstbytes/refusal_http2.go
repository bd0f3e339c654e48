package firstbytes

// Frames sent to an HTTP/2 client in the server's place: SETTINGS, and the answer to a refused
// request. Fields are encoded so that they change no table (RFC 7541, section 6.2.3), since the
// client's is in step with the server's.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strconv"

	"golang.org/x/net/http2/hpack"

	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// RefusedStream is a request whose client is to be told of its refusal.
type RefusedStream struct {
	Verdict    policy.Verdict
	ID         uint32
	Grpc, Head bool

	// Broken is set in place of the verdict if the client breaks the protocol's rules; id is then
	// the last stream that it began.
	Broken error
}

// Reason is why the flow ends.
func (r *RefusedStream) Reason() nat.Reason {
	if r.Broken != nil {
		return nat.ReasonMalformedRequest
	}
	return nat.ReasonRefusedByPolicy
}

// Answer returns the frames that refuse the request and end the connection. begun says that the
// server's first frame, which must be SETTINGS, was seen.
func (r *RefusedStream) Answer(policyName string, begun bool) string {
	var b []byte
	if !begun {
		b = append(b, sniff.EmptySettings...)
	}
	if r.Broken != nil {
		return string(append(b, GoAway(r.ID, codeOf(r.Broken), "The sandbox's network policy has the requests read, and this connection breaks the rules of HTTP/2 (RFC 9113), or can be read in more than one way, or says too much.")...))
	}
	text := refusalText(r.Verdict, policyName)
	const endStream, endHeaders = 1, 4
	switch {
	case r.Grpc:
		// An answer without content, whose only fields are its trailers.
		const permissionDenied = "7"
		b = append(b, Frame2(1, endStream|endHeaders, r.ID, fieldBlock(":status", "200", "content-type", "application/grpc",
			"grpc-status", permissionDenied, "grpc-message", text[:len(text)-1]))...)
	case r.Head:
		b = append(b, Frame2(1, endStream|endHeaders, r.ID, fieldBlock(":status", "403"))...)
	default:
		b = append(b, Frame2(1, endHeaders, r.ID, fieldBlock(":status", "403", "content-type", "text/plain; charset=utf-8",
			"content-length", strconv.Itoa(len(text))))...)
		b = append(b, Frame2(0, endStream, r.ID, []byte(text))...)
	}
	return string(append(b, GoAway(r.ID, NoErrorCode, "")...))
}

// GoAway returns the frame that ends a connection; last is the highest stream that was looked at.
func GoAway(last uint32, code uint32, text string) []byte {
	content := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, last), code)
	return Frame2(7, 0, 0, append(content, text...))
}

// Error codes (RFC 9113, section 7).
const (
	NoErrorCode      = 0
	protocolError    = 1
	flowControlError = 3
	frameSizeError   = 6
	compressionError = 9
	enhanceYourCalm  = 11
)

// codeOf returns the code for an error from package sniff.
func codeOf(err error) uint32 {
	switch {
	case errors.Is(err, sniff.ErrTooLong):
		return enhanceYourCalm
	case errors.Is(err, sniff.ErrFrameSize):
		return frameSizeError
	case errors.Is(err, sniff.ErrFlowControl):
		return flowControlError
	case errors.Is(err, sniff.ErrCompression):
		return compressionError
	}
	return protocolError
}

// Frame2 is an HTTP/2 frame (RFC 9113, section 4.1).
func Frame2(typ, flags byte, stream uint32, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(typ))
	b = binary.BigEndian.AppendUint32(append(b, flags), stream)
	return append(b, payload...)
}

func fieldBlock(namesAndValues ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(namesAndValues); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: namesAndValues[i], Value: namesAndValues[i+1], Sensitive: true}) // writing to a Buffer cannot fail
	}
	return b.Bytes()
}
