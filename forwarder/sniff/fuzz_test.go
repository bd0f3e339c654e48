package sniff

import (
	"bytes"
	"testing"
)

// FuzzStream feeds arbitrary bytes as the start of a stream, whole and byte by byte. The answer
// must not depend on how they are cut, and Stream must never ask for less than it has.
func FuzzStream(f *testing.F) {
	sni := hello(f, "example.com", nil)
	for _, seed := range [][]byte{
		sni, records(sni, 50), withExtension(sni, extServerName, []byte{0, 4, 0, 0, 1, 'x'}),
		[]byte("GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n"), []byte("SSH-2.0-x\r\n"),
		h2(nil, headers(":method", "GET", ":scheme", "http", ":authority", "example.com", ":path", "/")),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 2*MaxFirst {
			return
		}
		// The bytes first asked for, and no more, must be enough for the same answer.
		s, _, err := feed(t, p)
		if err == nil && s.Kind == None {
			t.Fatal("nothing is known, and nothing asked for")
		}
		if len(s.Name) > maxNameLen {
			t.Fatalf("a name of %d bytes", len(s.Name))
		}
		if len(p) > 600 {
			return
		}
		if one, oneErr := bytewise(t, p); err == nil && oneErr == nil && one != s {
			t.Fatalf("as asked for: %+v; byte by byte: %+v", s, one)
		}
	})
}

// FuzzInitial feeds arbitrary bytes as datagrams, and also as the frames of a packet, so that they
// get past the decryption.
func FuzzInitial(f *testing.F) {
	msg := quicHello(f, "quic.example")
	f.Add(cryptoFrame(0, msg), seal(f, version1, rfcConnID, 1, cryptoFrame(0, msg), 1200))
	f.Add([]byte{2, 0, 0, 0, 0}, []byte{0xc0, 0, 0, 0, 1, 0, 0, 0, 20})
	f.Fuzz(func(t *testing.T, frames, datagram []byte) {
		if len(frames) > 4096 {
			return
		}
		var q reader
		if len(frames) > 20 {
			_, _ = q.add(seal(t, version1, rfcConnID, 0, frames, 0))
		}
		before := bytes.Clone(datagram)
		SourceIDs(datagram, func(id []byte) {
			if len(id) > 255 {
				t.Fatal("an ID that no header can carry")
			}
		})
		s, err := q.add(datagram)
		if err == nil && s.Kind == QUIC && q.q.Err() != nil {
			t.Fatalf("%+v of what is broken", s)
		}
		if q.q != nil && q.q.Size() > MaxFirst || !bytes.Equal(before, datagram) {
			t.Fatal("a bound is broken, or the datagram was written to")
		}
	})
}

// FuzzParseHead looks for accepted heads that two servers could read differently.
func FuzzParseHead(f *testing.F) {
	f.Add([]byte("POST http://a.example:80/x?y HTTP/1.1\r\nHost: A.example\r\nContent-Length: 5\r\n\r\nhello"))
	f.Add([]byte("CONNECT a.example:443 HTTP/1.0\r\nTransfer_Encoding: chunked\r\n\r\n"))
	f.Add([]byte("GET / HTTP/1.1\nHost: a.example\n\nGET"))
	f.Add([]byte("\r\n\r\nGET / HTTP/1.1\r\nHost: a.example\r\n\r\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		r, n, err := ParseHead(p)
		if err != nil || n == 0 {
			if n != 0 {
				t.Fatalf("an error, and %d bytes", n)
			}
			return
		}
		head, end := p[emptyLines(p):n], "\r\n"
		if bytes.IndexByte(head, '\r') < 0 {
			if end = "\n"; !r.Body.Done() {
				t.Fatalf("content behind a head without a CR: %q", head)
			}
		}
		if bytes.Index(head, []byte(end+end)) != len(head)-2*len(end) {
			t.Fatalf("a head that does not end in its first empty line: %q", head)
		}
		if end == "\n" {
			head = bytes.ReplaceAll(head, []byte("\n"), []byte("\r\n"))
		}
		if bytes.Count(head, []byte("\n")) != bytes.Count(head, []byte("\r\n")) || bytes.Count(head, []byte("\r")) != bytes.Count(head, []byte("\r\n")) || bytes.IndexByte(head, 0) >= 0 {
			t.Fatalf("bare CR, LF or NUL in %q", head)
		}
		if again, m, err := ParseHead(p[:n]); err != nil || m != n || again != r {
			t.Fatalf("what follows the head changes it: %+v, %+v", r, again)
		}
	})
}

// FuzzBody compares one Scan of a body with a Scan byte by byte, and with a copy of the state after
// fewer bytes were consumed.
func FuzzBody(f *testing.F) {
	f.Add([]byte("5\r\nhello\r\n0\r\n\r\nGET"), int64(0), 3)
	f.Add([]byte("hello"), int64(3), 1)
	f.Fuzz(func(t *testing.T, p []byte, length int64, cut int) {
		b := Body{state: chunkSize}
		if length > 0 {
			b = Body{state: bodyFixed, left: length}
		}
		whole, slow := b, b
		n, err := whole.Scan(p)
		if n > len(p) || n < len(p) && err == nil && !whole.Done() {
			t.Fatalf("%d of %d bytes, done %v", n, len(p), whole.Done())
		}
		m := 0
		var slowErr error
		for m < len(p) && !slow.Done() && slowErr == nil {
			var k int
			k, slowErr = slow.Scan(p[m : m+1])
			m += k
		}
		if (err == nil) != (slowErr == nil) || err == nil && (m != n || slow != whole) {
			t.Fatalf("at once: %d, %v, %+v; byte by byte: %d, %v, %+v", n, err, whole, m, slowErr, slow)
		}
		if err != nil || cut < 0 || cut > n {
			return
		}
		parts := b
		if k, err := parts.Scan(p[:cut]); k != cut || err != nil {
			t.Fatalf("%d of %d, %v", k, cut, err)
		}
		if k, err := parts.Scan(p[cut:]); k != n-cut || err != nil || parts != whole {
			t.Fatalf("in two parts: %d, %v", k, err)
		}
	})
}

// FuzzResponses holds arbitrary server bytes to one rule: how they are cut changes nothing.
func FuzzResponses(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), "GET")
	f.Add([]byte("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), "POST")
	f.Add([]byte("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n0002 ;x=\"y\"\nok\n0\nA: b\n\n"), "GET")
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\n\r\n"), "GET")
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"), "GET")
	f.Fuzz(func(t *testing.T, p []byte, method string) {
		var whole, slow Responses
		whole.Expect(&Request{Method: method, Upgrade: ",websocket,,h2c,"})
		slow.Expect(&Request{Method: method, Upgrade: ",websocket,,h2c,"})
		rest, left := whole.Feed(p), len(p)
		for ; left > 0 && !slow.HTTP2(); left-- {
			slow.Feed(p[len(p)-left:][:1])
		}
		if whole.Idle() != slow.Idle() || whole.Tunnel() != slow.Tunnel() || whole.HTTP2() != slow.HTTP2() || whole.Begun() != slow.Begun() || whole.HTTP2() && len(rest) != left {
			t.Fatalf("at once idle %v, tunnel %v, HTTP/2 %v before %d bytes; byte by byte %v, %v, %v, %d", whole.Idle(), whole.Tunnel(), whole.HTTP2(), len(rest), slow.Idle(), slow.Tunnel(), slow.HTTP2(), left)
		}
	})
}
