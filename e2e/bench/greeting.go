package main

// Greetings are what a client says first; a rule by domain recognizes it by that.
//
//	"tls"    a ClientHello as crypto/tls makes it, post-quantum key share and all: 1.5 KB
//	"http"   the head of a request with a body, whose first bytes are a flow's header
//
// The far side looks only at their first byte and length, so that the figures are the proxy's, not
// a TLS library's. It answers a ClientHello with a ServerHello. The flow's header follows in a
// record, and then bytes outside of any.

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// farName is the far side's name in the policy by domains. Its address farNamed (RFC 5737: for
	// documentation) leads here: rules by domain lead neither to private addresses nor to the
	// host's own.
	farName  = "far.bench.test"
	farNamed = "203.0.113.1"

	speaksTLS  = "tls"
	speaksHTTP = "http"

	tlsHandshake, tlsData, tlsHeader = 0x16, 0x17, 5
	httpMethod                       = 'P' // of POST
	endOfHead                        = "\r\n\r\n"
	manyBytes                        = 1 << 50
	answerHead                       = "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
)

// greetings lists the protocols spoken to rules by domain.
func greetings(short bool) []string {
	if short {
		return []string{speaksTLS}
	}
	return []string{speaksTLS, speaksHTTP}
}

// greeting returns what a client of the protocol says first; nothing for "". body is the length of
// a request's body.
func greeting(speaks string, body int) ([]byte, error) {
	switch speaks {
	case "":
		return nil, nil
	case speaksTLS:
		said := &listener{}
		err := tls.Client(said, &tls.Config{ServerName: farName}).HandshakeContext(context.Background())
		if !errors.Is(err, errSaid) {
			return nil, fmt.Errorf("making a ClientHello: %w", err)
		}
		return said.first, nil
	case speaksHTTP:
		return fmt.Appendf(nil, "POST /bench HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nContent-Length: %d%s", farName, body, endOfHead), nil
	}
	return nil, fmt.Errorf("nobody speaks %q", speaks)
}

// serverHello answers a ClientHello: version 1.3, no session, AES-128, and no key.
var serverHello = []byte("\x16\x03\x03\x00\x32\x02\x00\x00\x2e\x03\x03" + strings.Repeat("\x00", 33) +
	"\x13\x01\x00\x00\x06\x00\x2b\x00\x02\x03\x04")

// record returns b as one TLS record.
func record(kind byte, b []byte) []byte {
	return append([]byte{kind, 3, 3, byte(len(b) >> 8), byte(len(b))}, b...)
}

// greet sends the greeting on a new connection, then the header.
func greet(fd int, speaks string, first []byte, h header) error {
	b := append(first[:len(first):len(first)], h.bytes()...)
	if speaks == speaksTLS {
		if _, e := rawSend(fd, first); e != 0 {
			return fmt.Errorf("send: %w", e)
		}
		said := make([]byte, len(serverHello))
		for got := 0; got < len(said); {
			n, e := rawRecv(fd, said[got:])
			if e != 0 || n == 0 {
				return fmt.Errorf("receive: %d bytes of a ServerHello, %w", got, e)
			}
			got += n
		}
		b = record(tlsData, h.bytes())
	}
	if _, e := rawSend(fd, b); e != 0 {
		return fmt.Errorf("send: %w", e)
	}
	return nil
}

// greetingLen returns the length of the greeting at the front of b: 0 if there is none, and more
// than len(b) if its end has not arrived.
func greetingLen(b []byte) int {
	switch {
	case len(b) == 0:
	case b[0] == tlsHandshake && len(b) < tlsHeader:
		return tlsHeader
	case b[0] == tlsHandshake:
		return tlsHeader + int(binary.BigEndian.Uint16(b[tlsHeader-2:]))
	case b[0] == httpMethod:
		if at := bytes.Index(b, []byte(endOfHead)); at >= 0 {
			return at + len(endOfHead)
		}
		return len(b) + 1
	}
	return 0
}

// readHeader reads a connection's greeting, if there is one, and the header after it into b, and
// returns what the client speaks. It answers a ClientHello.
func readHeader(fd int, b []byte) (h header, speaks string, ok bool) {
	at := 0 // where the header begins
	for got, want := 0, headerLen; got < want; {
		if want > len(b) {
			return h, "", false
		}
		n, e := rawRecv(fd, b[got:want])
		if e == unix.EINTR {
			// The runtime interrupted it to stop this goroutine: the kernel restarts no call on a
			// socket with a timeout (signal(7)).
			runtime.Gosched()
			continue
		}
		if e != 0 || n == 0 {
			return h, "", false
		}
		got += n
		switch l := greetingLen(b[:got]); {
		case speaks != "" || l == 0:
		case l > got:
			want = l // at least: no further than the end of a head that has not arrived
		case b[0] == tlsHandshake:
			if _, e := rawSend(fd, serverHello); e != 0 {
				return h, "", false
			}
			speaks, at = speaksTLS, l+tlsHeader
			want = at + headerLen
		default:
			speaks, at = speaksHTTP, l
			want = at + headerLen
		}
	}
	return parseHeader(b[at:]), speaks, true
}

// answer returns an HTTP head for n bytes.
func answer(n int) []byte { return fmt.Appendf(nil, answerHead, n) }

// listener is a connection that keeps the first thing said on it, and fails.
type listener struct {
	net.Conn
	first []byte
}

var errSaid = errors.New("said")

func (l *listener) Write(b []byte) (int, error) {
	l.first = append([]byte(nil), b...)
	return 0, errSaid
}

func (l *listener) Close() error { return nil }
