// Package sniff reads the name that a client asks for out of the first bytes it sends.
//
//	stream    ──Stream───► TLS ClientHello · HTTP/1 head · HTTP/2 preface ──► Seen
//	datagrams ──Initial.Add──► QUIC v1 and v2 Initial packets, decrypted ───► Seen
//	stream    ──NextRecord, Hello, HelloAnswer──► whether another ClientHello follows, and its name
//	stream    ──ParseHead, Body, Responses──► where one HTTP/1 message ends and the next begins
//	stream    ──Frames, FrameEnds──► the requests of an HTTP/2 connection, and its frames' ends
//	stream    ──Greeting──► what is said to a client of HTTP/2 before its first request
//
// The bytes may be hostile. Every reader is bounded (MaxFirst, MaxHead), keeps no reference to its
// input, refuses input that two implementations might read differently, and reports bytes of any
// other protocol as Opaque.
//
// Names, methods and paths are returned as sent, without a port or a query; the caller normalises
// and judges them. The package knows nothing of sockets, flows or policy.
package sniff

import (
	"errors"
	"fmt"
)

// MaxFirst is how many bytes of a stream, or of a QUIC connection's handshake, are read at most
// before its Kind must be known.
const MaxFirst = 16 << 10

// MaxHead bounds the length of an HTTP/1 request's head.
const MaxHead = 64 << 10

// Kind is the protocol of a stream's first bytes.
type Kind uint8

const (
	None   Kind = iota // not known yet
	TLS                // a ClientHello
	HTTP               // an HTTP/1 request
	HTTP2              // the HTTP/2 preface, with prior knowledge
	QUIC               // an Initial packet with a ClientHello
	Opaque             // something else
)

var kindNames = [...]string{"none", "tls", "http", "http2", "quic", "opaque"}

func (k Kind) String() string { return kindNames[k] }

// Seen holds what the first bytes reveal.
type Seen struct {
	Kind Kind
	// Name is the server name (TLS, QUIC) or the authority's host (HTTP). It is empty if the client
	// named none.
	Name string
	// ECH reports that the ClientHello carries an encrypted one, whose name cannot be seen.
	// Browsers send the extension with random content too (RFC 9849, section 6.2).
	ECH bool
	// Method, Path and Override are those of the first HTTP request, as in Request.
	Method, Path string
	Override     bool
	// Stream and GRPC are those of the first HTTP/2 request, as in StreamRequest.
	Stream uint32
	GRPC   bool
}

var (
	// ErrTooLong says that MaxFirst bytes, or MaxHead, were not enough.
	ErrTooLong = errors.New("the first message is too long")
	// ErrMalformed says that the bytes break their protocol's rules, or could be
	// read in more than one way.
	ErrMalformed = errors.New("the first message is malformed")
	// ErrFrameSize, ErrFlowControl and ErrCompression wrap ErrMalformed for errors that have HTTP/2
	// codes of their own (RFC 9113, section 7).
	ErrFrameSize   = fmt.Errorf("%w: a frame of that type cannot be that long", ErrMalformed)
	ErrFlowControl = fmt.Errorf("%w: a window is too large", ErrMalformed)
	ErrCompression = fmt.Errorf("%w: a header block cannot be decoded", ErrMalformed)
)

// Stream reads the first bytes of a TCP stream. While it cannot tell yet, it returns a Seen of Kind
// None and the number of bytes, more than len(p), that it needs to go on. With an error, Seen holds
// the Kind, if it is known.
func Stream(p []byte) (s Seen, need int, err error) {
	if len(p) == 0 {
		return Seen{}, 1, nil
	}
	most := MaxFirst
	switch {
	case p[0] == recordHandshake:
		s, _, need, err = Hello(p)
	case hasPrefix(p, preface):
		s, need, err = firstStream(p)
	default:
		most = MaxHead
		s, need, err = firstRequest(p)
	}
	if err == nil && need > 0 {
		if need > most {
			return s, 0, ErrTooLong
		}
		return Seen{}, need, nil
	}
	return s, 0, err
}

// hasPrefix reports whether p and prefix agree as far as both go, and p is long enough to be told
// from anything else: "PRI " begins no HTTP/1 request.
func hasPrefix(p []byte, prefix string) bool {
	n := min(len(p), len(prefix))
	return n >= 4 && string(p[:n]) == prefix[:n]
}
