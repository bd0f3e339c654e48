package forwarder

// What is said to an HTTP/2 client in the server's place: SETTINGS, and the answer to a
// refused request. Fields are encoded so that they change no table (RFC 7541, section 6.2.3),
// since the client's is in step with the server's.

import (
	"bytes"
	"encoding/binary"
	"strconv"

	"golang.org/x/net/http2/hpack"

	"sluice/policy"
)

// emptySettings is a SETTINGS frame that announces nothing.
const emptySettings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"

// refusedStream is a request to be told of its refusal.
type refusedStream struct {
	verdict    policy.Verdict
	id         uint32
	grpc, head bool
}

// answer is the frames that refuse the request and end the connection. begun tells
// that the server's first frame, which must be SETTINGS, was seen.
func (r *refusedStream) answer(policyName string, begun bool) string {
	text := refusalText(r.verdict, policyName)
	var b []byte
	if !begun {
		b = append(b, emptySettings...)
	}
	const endStream, endHeaders = 1, 4
	switch {
	case r.grpc:
		// An answer without content, whose only fields are its trailers.
		const permissionDenied = "7"
		b = append(b, frame2(1, endStream|endHeaders, r.id, fieldBlock(":status", "200", "content-type", "application/grpc",
			"grpc-status", permissionDenied, "grpc-message", text[:len(text)-1]))...)
	case r.head:
		b = append(b, frame2(1, endStream|endHeaders, r.id, fieldBlock(":status", "403"))...)
	default:
		b = append(b, frame2(1, endHeaders, r.id, fieldBlock(":status", "403", "content-type", "text/plain; charset=utf-8",
			"content-length", strconv.Itoa(len(text))))...)
		b = append(b, frame2(0, endStream, r.id, []byte(text))...)
	}
	const noError = 0
	goAway := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, r.id), noError)
	return string(append(b, frame2(7, 0, 0, goAway)...))
}

// frame2 is an HTTP/2 frame (RFC 9113, section 4.1).
func frame2(typ, flags byte, stream uint32, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(typ))
	b = binary.BigEndian.AppendUint32(append(b, flags), stream)
	return append(b, payload...)
}

func fieldBlock(namesAndValues ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(namesAndValues); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: namesAndValues[i], Value: namesAndValues[i+1], Sensitive: true}) // a Buffer takes all
	}
	return b.Bytes()
}
