package main

// Greetings: what a client says first, by which a rule by domain knows it.
//
//	"tls"    a ClientHello as crypto/tls makes it, post-quantum key share and all: 1.5 KB
//	"http"   the head of a request with a body, whose first bytes are a flow's header
//
// The far side knows them by their first byte and how long they are, and reads no more
// of them: the figures are the proxy's, not a TLS library's.

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"

	"golang.org/x/sys/unix"
)

const (
	// farName is what the far side is called in the policy by domains, and farNamed the
	// address under that name (RFC 5737: for documentation), which leads here: rules by domain
	// lead neither to private addresses nor to the host's own.
	farName  = "far.bench.test"
	farNamed = "203.0.113.1"

	speaksTLS  = "tls"
	speaksHTTP = "http"

	tlsHandshake = 0x16
	tlsHeader    = 5
	httpMethod   = 'P' // of POST
	endOfHead    = "\r\n\r\n"
	manyBytes    = 1 << 50
	answerHead   = "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
)

// greetings are what is spoken to rules by domain.
func greetings(short bool) []string {
	if short {
		return []string{speaksTLS}
	}
	return []string{speaksTLS, speaksHTTP}
}

// greeting is what a client of the protocol says first; nothing for "". body is the
// length of a request's body.
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

// greetingLen is how long the greeting at the front of b is: 0 if there is none, and more
// than len(b) if its end is not to be seen.
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

// readHeader reads the greeting of a connection, if there is one, and the header after
// it, into b, and tells what the client speaks.
func readHeader(fd int, b []byte) (h header, speaks string, ok bool) {
	got := 0
	for want := headerLen; got < want && want <= len(b); {
		n, e := rawRecv(fd, b[got:want])
		if e == unix.EINTR {
			// By the runtime, which wants to stop this goroutine: the kernel restarts no call
			// on a socket with a timeout (signal(7)).
			runtime.Gosched()
			continue
		}
		if e != 0 || n == 0 {
			return h, "", false
		}
		got += n
		want = headerLen
		if l := greetingLen(b[:got]); l > got {
			want = l // at least: no further than the end of a head that is not yet to be seen
		} else {
			want += l
		}
	}
	at := greetingLen(b[:got])
	if got < at+headerLen {
		return h, "", false
	}
	if at > 0 {
		speaks = map[bool]string{true: speaksTLS, false: speaksHTTP}[b[0] == tlsHandshake]
	}
	return parseHeader(b[at:]), speaks, true
}

// answer is what the far side says first of n bytes.
func answer(speaks string, n int) []byte {
	if speaks != speaksHTTP {
		return nil
	}
	return fmt.Appendf(nil, answerHead, n)
}

// listener is a connection that takes the first thing said on it, and fails.
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
