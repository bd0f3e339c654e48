package sniff

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
)

// hello returns the first bytes of Go's TLS client.
func hello(t testing.TB, name string, change func(*tls.Config)) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer server.Close()
	cfg := &tls.Config{ServerName: name, InsecureSkipVerify: true}
	if change != nil {
		change(cfg)
	}
	go func() {
		_ = tls.Client(client, cfg).HandshakeContext(context.Background())
		client.Close()
	}()
	head := make([]byte, 5)
	if _, err := io.ReadFull(server, head); err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(server, rest); err != nil {
		t.Fatal(err)
	}
	return append(head, rest...)
}

// records cuts a ClientHello into records of n bytes each.
func records(b []byte, n int) []byte {
	msg := b[5:]
	var out []byte
	for len(msg) > 0 {
		k := min(n, len(msg))
		out = append(out, 22, 3, 1, byte(k>>8), byte(k))
		out = append(out, msg[:k]...)
		msg = msg[k:]
	}
	return out
}

// withExtension adds an extension to a ClientHello in one record.
func withExtension(b []byte, typ uint16, data []byte) []byte {
	b = append([]byte(nil), b...)
	at := 5 + 4 + 2 + 32
	at += 1 + int(b[at])
	at += 2 + int(binary.BigEndian.Uint16(b[at:]))
	at += 1 + int(b[at])
	ext := binary.BigEndian.AppendUint16(nil, typ)
	ext = binary.BigEndian.AppendUint16(ext, uint16(len(data)))
	ext = append(ext, data...)
	grow := func(i int) { binary.BigEndian.PutUint16(b[i:], binary.BigEndian.Uint16(b[i:])+uint16(len(ext))) }
	grow(at)
	grow(3)
	grow(7)
	return append(b, ext...)
}

// feed gives Stream more and more of p, as much as it asks for, and returns how often it was
// called. It fails the test if Stream asks for bytes that it has.
func feed(t testing.TB, p []byte) (Seen, int, error) {
	t.Helper()
	calls := 0
	for n := 0; ; {
		calls++
		s, need, err := Stream(p[:n])
		switch {
		case err != nil || need == 0:
			return s, calls, err
		case s.Kind != None:
			t.Fatalf("kind %v is known, and %d bytes are asked for", s.Kind, need)
		case need <= n:
			t.Fatalf("of %d bytes, %d are asked for", n, need)
		case need > len(p):
			return s, calls, io.ErrUnexpectedEOF
		}
		n = need
	}
}

func TestTheFirstBytesOfAStream(t *testing.T) {
	sni := hello(t, "example.com", nil)
	list := []byte{0, 14, 0, 0, 11}
	list = append(list, "example.com"...)
	two := append([]byte{0, 12, 0, 0, 3}, "a.b"...)
	two = append(append(two, 0, 0, 3), "c.d"...)
	for _, row := range []struct {
		name string
		in   []byte
		want Seen
		err  error
	}{
		{"a ClientHello names its server", sni, Seen{Kind: TLS, Name: "example.com"}, nil},
		{"in records of one byte each", records(sni, 1), Seen{Kind: TLS, Name: "example.com"}, nil},
		{"in records of 100 bytes each", records(sni, 100), Seen{Kind: TLS, Name: "example.com"}, nil},
		{"of TLS 1.2", hello(t, "example.com", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), Seen{Kind: TLS, Name: "example.com"}, nil},
		{"to an address, without a name", hello(t, "192.0.2.1", nil), Seen{Kind: TLS}, nil},
		{"with an encrypted one inside", withExtension(sni, extEncryptedHelo, []byte{0}), Seen{Kind: TLS, Name: "example.com", ECH: true}, nil},
		{"with two server_name extensions", withExtension(sni, extServerName, list), Seen{Kind: TLS, Name: "example.com"}, ErrMalformed},
		{"with two names in one extension", withExtension(hello(t, "192.0.2.1", nil), extServerName, two), Seen{Kind: TLS}, ErrMalformed},
		{"with a name in full-width letters", hello(t, "ｅxample.com", nil), Seen{Kind: TLS}, ErrMalformed},
		{"with an ideographic full stop for a dot", hello(t, "example。com", nil), Seen{Kind: TLS}, ErrMalformed},
		{"with a dot at the name's end", withExtension(hello(t, "192.0.2.1", nil), extServerName, append([]byte{0, 15, 0, 0, 12}, "example.com."...)), Seen{Kind: TLS}, ErrMalformed},
		{"with a blank in the name", withExtension(hello(t, "192.0.2.1", nil), extServerName, append([]byte{0, 14, 0, 0, 11}, "example com"...)), Seen{Kind: TLS}, ErrMalformed},
		{"with bytes of another message behind it", append(append([]byte(nil), sni[:3]...), append(binary.BigEndian.AppendUint16(nil, uint16(len(sni)-5+1)), append(append([]byte(nil), sni[5:]...), 0)...)...), Seen{Kind: TLS}, ErrMalformed},
		{"of a length that nobody sends", []byte{22, 3, 1, 0, 4, 1, 1, 0, 0}, Seen{Kind: TLS}, ErrTooLong},
		{"that ends in an alert", append(records(sni, 100)[:105], append([]byte{21, 3, 1, 0, 2, 1, 0}, sni...)...), Seen{Kind: TLS}, ErrMalformed},
		{"in records too small to hold it in 16 KiB", append(records(make([]byte, 5+4), 4)[:5], append([]byte{1, 0, 0x3f, 0xf0}, records(make([]byte, 5+8000), 1)...)...), Seen{Kind: TLS}, ErrTooLong},
		{"a record that is no handshake", []byte{22, 3, 1, 0, 1, 2}, Seen{Kind: Opaque}, nil},
		{"ssh speaks", []byte("SSH-2.0-OpenSSH_9.9\r\n"), Seen{Kind: Opaque}, nil},
		{"binary bytes", []byte{0, 1, 2}, Seen{Kind: Opaque}, nil},
		{"a request", []byte("GET /a?b=c HTTP/1.1\r\nHost: example.com:8080\r\n\r\n"), Seen{Kind: HTTP, Name: "example.com", Method: "GET", Path: "/a"}, nil},
		{"a request without a name", []byte("GET / HTTP/1.0\r\n\r\n"), Seen{Kind: HTTP, Method: "GET", Path: "/"}, nil},
		{"a request in lines that end in LF", []byte("GET / HTTP/1.0\nHost: example.com\n\n"), Seen{Kind: HTTP, Name: "example.com", Method: "GET", Path: "/"}, nil},
		{"a request behind an empty line", []byte("\r\nGET / HTTP/1.0\r\nHost: example.com\r\n\r\n"), Seen{Kind: HTTP, Name: "example.com", Method: "GET", Path: "/"}, nil},
		{"an empty line and no request", []byte("\r\nHELO\r\n"), Seen{Kind: Opaque}, nil},
		{"a head without end", append([]byte("GET / HTTP/1.1\r\nX: "), bytes.Repeat([]byte("x"), MaxHead)...), Seen{Kind: HTTP, Method: "GET"}, ErrTooLong},
		{"a method without end", bytes.Repeat([]byte("A"), 100), Seen{Kind: Opaque}, nil},
		{"prior knowledge", h2(nil, headers(":method", "GET", ":scheme", "http", ":authority", "example.com:80", ":path", "/x?y")), Seen{Kind: HTTP2, Name: "example.com", Method: "GET", Path: "/x", Stream: 1}, nil},
		{"with Host for the authority", h2(nil, headers(":method", "GET", ":scheme", "http", ":path", "/", "host", "example.com")), Seen{Kind: HTTP2, Name: "example.com", Method: "GET", Path: "/", Stream: 1}, nil},
		{"whose Host is another", h2(nil, headers(":method", "GET", ":scheme", "http", ":authority", "a.example", "host", "b.example", ":path", "/")), Seen{Kind: HTTP2}, ErrMalformed},
		{"with two authorities", h2(nil, headers(":method", "GET", ":scheme", "http", ":authority", "a.example", ":authority", "b.example", ":path", "/")), Seen{Kind: HTTP2}, ErrMalformed},
		{"whose first frame is no SETTINGS", append([]byte(preface), frame(6, 0, 0, make([]byte, 8))...), Seen{Kind: HTTP2}, ErrMalformed},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, _, err := feed(t, row.in)
			if got != row.want && row.err == nil || got.Kind != row.want.Kind || !errors.Is(err, row.err) {
				t.Errorf("got %+v, %v; want %+v, %v", got, err, row.want, row.err)
			}
			if row.err == nil {
				if again, err := bytewise(t, row.in); again != row.want || err != nil {
					t.Errorf("byte by byte: %+v, %v", again, err)
				}
			}
		})
	}
}

// bytewise gives Stream one byte more each time, whatever it asks for.
func bytewise(t testing.TB, p []byte) (Seen, error) {
	t.Helper()
	for n := range p {
		if s, need, err := Stream(p[:n+1]); need == 0 || err != nil {
			return s, err
		}
	}
	return Seen{}, io.ErrUnexpectedEOF
}

func TestAHelloInSegmentsIsReadOnlyAsOftenAsItHasRecords(t *testing.T) {
	sni := hello(t, "example.com", nil)
	if _, calls, _ := feed(t, sni); calls > 5 {
		t.Errorf("%d looks at a ClientHello in one record", calls)
	}
}

func TestNoPrefixOfAHelloIsTakenForAnythingElse(t *testing.T) {
	sni := hello(t, "example.com", nil)
	for n := range sni {
		if s, need, err := Stream(sni[:n]); s.Kind != None || need <= n || err != nil {
			t.Fatalf("%d bytes: %+v, need %d, %v", n, s, need, err)
		}
	}
}

func frame(typ, flags byte, id uint32, payload []byte) []byte {
	b := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), typ, flags}
	return append(binary.BigEndian.AppendUint32(b, id), payload...)
}

func headers(kv ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(kv); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	return b.Bytes()
}

// h2 returns the start of a connection whose header block comes in a HEADERS frame, with padding
// and priority, and CONTINUATIONs of three bytes.
func h2(between, block []byte) []byte {
	b := append([]byte(preface), frame(frameSettings, 0, 0, nil)...)
	b = append(b, frame(8, 0, 0, []byte{0, 0, 1, 0})...)
	b = append(b, between...)
	first := append(append([]byte{2, 0, 0, 0, 0, 9}, block[:1]...), 0, 0)
	b = append(b, frame(frameHeaders, flagPadded|flagHasPriority, 1, first)...)
	for block = block[1:]; len(block) > 3; block = block[3:] {
		b = append(b, frame(frameContinue, 0, 1, block[:3])...)
	}
	return append(b, frame(frameContinue, flagEndHeaders, 1, block)...)
}

func TestRequestHeads(t *testing.T) {
	const ok = "\r\nHost: a.example\r\n\r\n"
	for _, row := range []struct{ what, head, method, name, path string }{
		{"in origin form", "POST /x%41/../y?q" + " HTTP/1.1" + ok, "POST", "a.example", "/x%41/../y"},
		{"in absolute form", "GET http://A.example/p HTTP/1.1" + ok, "GET", "A.example", "/p"},
		{"in absolute form without a path", "GET http://a.example HTTP/1.1" + ok, "GET", "a.example", "/"},
		{"of the server", "OPTIONS * HTTP/1.1" + ok, "OPTIONS", "a.example", "*"},
		{"for a tunnel", "CONNECT b.example:443 HTTP/1.1" + ok, "CONNECT", "b.example", ""},
		{"to an address", "GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", "GET", "2001:db8::1", "/"},
		{"with a method in small letters", "propfind / HTTP/1.1" + ok, "propfind", "a.example", "/"},
		{"with a target in UTF-8", "GET /caf\u00e9?\u00fc HTTP/1.1" + ok, "GET", "a.example", "/caf\u00e9"},
		{"with as long a head as servers take", "GET / HTTP/1.1\r\nX: " + strings.Repeat("x", MaxHead-50) + ok, "GET", "a.example", "/"},
		{"of HTTP/1.0", "GET / HTTP/1.0\r\n\r\n", "GET", "", "/"},
		{"in lines that end in LF", "GET / HTTP/1.1\nHost: a.example\n\n", "GET", "a.example", "/"},
		{"behind empty lines", "\r\n\r\nGET / HTTP/1.1" + ok, "GET", "a.example", "/"},
	} {
		r, n, err := ParseHead([]byte(row.head + "rest"))
		if err != nil || n != len(row.head) || r.Method != row.method || r.Name != row.name || r.Path != row.path {
			t.Errorf("%s: %+v, %d, %v", row.what, r, n, err)
		}
	}
	for what, head := range map[string]string{
		"bare LF and content":               "POST / HTTP/1.1\nHost: a\nContent-Length: 3\n\n",
		"bare LF and chunks":                "POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n",
		"CRLF behind bare LF":               "GET / HTTP/1.1\nHost: a\r\n\r\n",
		"a bare LF first":                   "\nGET / HTTP/1.1" + ok,
		"bare LF behind a field":            "GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
		"a CR within":                       "GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n",
		"a NUL":                             "GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
		"a folded line":                     "GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n",
		"a blank before the colon":          "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
		"two Hosts":                         "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
		"two Hosts, one in disguise":        "GET / HTTP/1.1\r\nHost: a\r\nhOST_: b\r\ncontent_length: 3\r\n\r\n",
		"no Host":                           "GET / HTTP/1.1\r\n\r\n",
		"a target of another host":          "GET http://b.example/ HTTP/1.1" + ok,
		"a target of another scheme":        "GET https://a.example/ HTTP/1.1" + ok,
		"a user in the authority":           "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
		"a path in the authority":           "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
		"a list of hosts":                   "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
		"a relative target":                 "GET x HTTP/1.1" + ok,
		"a tab in the request line":         "GET\t/ HTTP/1.1" + ok,
		"two blanks in it":                  "GET  / HTTP/1.1" + ok,
		"a fragment":                        "GET /#x HTTP/1.1" + ok,
		"a tunnel in small letters":         "connect / HTTP/1.1" + ok,
		"version 2":                         "GET / HTTP/2.0" + ok,
		"version 1.2":                       "GET / HTTP/1.2" + ok,
		"length and coding":                 "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
		"two lengths":                       "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
		"a list of lengths":                 "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\n",
		"a signed length":                   "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\n",
		"a huge length":                     "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999999999999999\r\n\r\n",
		"another coding":                    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
		"a coding in disguise":              "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
		"a coding twice":                    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
		"a coding in HTTP/1.0":              "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
		"an underscore for a dash":          "POST / HTTP/1.1\r\nHost: a\r\nTransfer_Encoding: chunked\r\n\r\n",
		"more fields than anybody sends":    "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: y\r\n", maxFields) + "\r\n",
		"a dot for a dash":                  "POST / HTTP/1.1\r\nHost: a\r\nTransfer.Encoding: chunked\r\n\r\n",
		"a host in full-width letters":      "GET / HTTP/1.1\r\nHost: ａ.example\r\n\r\n",
		"a tunnel to a path":                "CONNECT /x HTTP/1.1" + ok,
		"a name that is longer than a name": "GET / HTTP/1.1\r\nHost: " + strings.Repeat("a", 256) + "\r\n\r\n",
	} {
		if r, n, err := ParseHead([]byte(head)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s is let through: %+v, %d, %v", what, r, n, err)
		}
	}
}

func TestBodiesEndWhereTheyEnd(t *testing.T) {
	const head = "POST / HTTP/1.1\r\nHost: a\r\n"
	for _, row := range []struct{ what, field, body string }{
		{"nothing", "", ""},
		{"no bytes", "Content-Length: 0\r\n", ""},
		{"a length", "Content-Length: 5\r\n", "hello"},
		{"chunks", "Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n1F\r\n" + strings.Repeat("x", 31) + "\r\n0\r\n\r\n"},
		{"chunks and a trailer", "Transfer-Encoding: Chunked\r\n", "1\r\n\n\r\n00\r\nX-Sum: 1\r\nY: 2\r\n\r\n"},
	} {
		r, _, err := ParseHead([]byte(head + row.field + "\r\n"))
		if err != nil {
			t.Fatalf("%s: %v", row.what, err)
		}
		for _, step := range []int{1, 7, 1 << 10} {
			b, all := r.Body, []byte(row.body+"GET / HTTP/1.1")
			read := 0
			for !b.Done() {
				part := all[read:min(len(all), read+step)]
				n, err := b.Scan(part)
				if err != nil || n == 0 {
					t.Fatalf("%s, %d at a time: %d, %v", row.what, step, n, err)
				}
				read += n
			}
			if read != len(row.body) {
				t.Errorf("%s, %d at a time: ends after %d of %d bytes", row.what, step, read, len(row.body))
			}
		}
	}
	for what, body := range map[string]string{
		"an extension":           "5;x=y\r\nhello\r\n0\r\n\r\n",
		"a bare LF":              "5\nhello\r\n0\r\n\r\n",
		"a size with a sign":     "+5\r\nhello\r\n0\r\n\r\n",
		"a size that overflows":  "10000000000000005\r\nhello",
		"no size":                "\r\nhello",
		"a chunk that is longer": "5\r\nhello!\r\n0\r\n\r\n",
		"a trailer without end":  "0\r\nX: " + strings.Repeat("y", maxTrailer),
	} {
		b := Body{state: chunkSize}
		if _, err := b.Scan([]byte(body)); !errors.Is(err, ErrMalformed) {
			t.Errorf("chunks with %s are let through: %v", what, err)
		}
	}
}

func TestAnswersEndWhereTheyEnd(t *testing.T) {
	for _, row := range []struct {
		what, method, answer string
		idle                 bool
	}{
		{"with a length", "GET", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", true},
		{"with a length, cut short", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", false},
		{"in chunks", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", true},
		{"in chunks, without the last", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", false},
		{"to HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", true},
		{"without content", "GET", "HTTP/1.1 204 No Content\r\n\r\n", true},
		{"not modified", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", true},
		{"continue first", "POST", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", true},
		{"continue only", "POST", "HTTP/1.1 100 Continue\r\n\r\n", false},
		{"until it closes", "GET", "HTTP/1.0 200 OK\r\n\r\nok", false},
		{"with a long field", "GET", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("y", 5000) + "\r\nContent-Length: 2\r\n\r\nok", true},
		{"with two lengths", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", false},
		{"with bare LFs", "GET", "HTTP/1.1 200 OK\nContent-Length: 2\n\nok", true},
		{"with the same length twice", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok", true},
		{"with a list of the same length", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok", true},
		{"in chunks with extensions", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b;c=\"d\"\r\nok\r\n0;e\r\n\r\n", true},
		{"in chunks with padded sizes", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n00000000000000000002  \r\nok\r\n0   \r\n\r\n", true},
		{"in chunks with bare LFs and a trailer", "GET", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\nX: y\n\n", true},
		{"in chunks with a trailer of its own words", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nContent-Length 7\r\n\r\n", true},
		{"in chunks of another coding", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", true},
		{"in chunks and with a length", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", true},
		{"to a method that may be HEAD", "head", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", false},
		{"in another language", "GET", "ICY 200 OK\r\nContent-Length: 2\r\n\r\nok", false},
		{"with another protocol that nobody asked for", "GET", "HTTP/1.1 101 Switching Protocols\r\n\r\n", false},
		{"with a tunnel that nobody asked for", "GET", "HTTP/1.1 200 Connection established\r\n\r\n", false},
		{"with another protocol instead of a tunnel", "CONNECT", "HTTP/1.1 101 Switching Protocols\r\n\r\n", false},
		{"with a refusal of a tunnel", "CONNECT", "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", true},
		{"with a head without end", "GET", "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", maxAnswerHead/5), false},
	} {
		for _, step := range []int{1, 5, 1 << 20} {
			var r Responses
			r.Expect(&Request{Method: row.method})
			for p := []byte(row.answer); len(p) > 0; p = p[min(step, len(p)):] {
				r.Feed(p[:min(step, len(p))])
			}
			if r.Idle() != row.idle {
				t.Errorf("an answer %s, %d bytes at a time: idle %v, want %v", row.what, step, r.Idle(), row.idle)
			}
			if r.Tunnel() {
				t.Errorf("an answer %s is taken for a tunnel", row.what)
			}
		}
	}
	var r Responses
	r.Feed([]byte("HTTP/1.1 200 OK\r\n\r\n"))
	if r.Tunnel() || !r.Idle() {
		t.Error("an answer to no request is taken for one")
	}
	r.Expect(&Request{Method: "CONNECT"})
	if r.Feed([]byte("HTTP/1.1 200 OK\r\n\r\n")); !r.Tunnel() {
		t.Error("CONNECT that was accepted is no tunnel")
	}
}

// TestOnlyAProtocolThatWasOfferedIsATunnel has servers switch to other protocols.
func TestOnlyAProtocolThatWasOfferedIsATunnel(t *testing.T) {
	for _, row := range []struct {
		what, fields, taken string
		tunnel, http2       bool
	}{
		{"the one that was offered", "Connection: Upgrade\r\nUpgrade: websocket\r\n", "Upgrade: WebSocket\r\n", true, false},
		{"one of those that were", "Connection: keep-alive, upgrade\r\nUpgrade: chat/2, websocket\r\n", "Upgrade: websocket\r\n", true, false},
		{"another", "Connection: Upgrade\r\nUpgrade: websocket\r\n", "Upgrade: chat\r\n", false, false},
		{"two", "Connection: Upgrade\r\nUpgrade: websocket, chat\r\n", "Upgrade: websocket\r\nUpgrade: chat\r\n", false, false},
		{"a list", "Connection: Upgrade\r\nUpgrade: websocket, chat\r\n", "Upgrade: websocket, chat\r\n", false, false},
		{"none", "Connection: Upgrade\r\nUpgrade: websocket\r\n", "", false, false},
		{"one that nobody offered", "", "Upgrade: websocket\r\n", false, false},
		{"one that is no offer without its option", "Upgrade: websocket\r\n", "Upgrade: websocket\r\n", false, false},
		{"HTTP/2, in which other hosts can be named", "Connection: Upgrade\r\nUpgrade: h2c\r\n", "Upgrade: h2c\r\n", false, true},
		{"HTTP/2 by another name", "Connection: Upgrade\r\nUpgrade: h2\r\n", "Upgrade: h2\r\n", false, false},
		{"HTTP/2 that nobody offered", "Connection: Upgrade\r\nUpgrade: websocket\r\n", "Upgrade: h2c\r\n", false, false},
		{"HTTP/2 and another", "Connection: Upgrade\r\nUpgrade: h2c, websocket\r\n", "Upgrade: h2c\r\nUpgrade: websocket\r\n", false, false},
		{"TLS, in which they can too", "Connection: Upgrade\r\nUpgrade: TLS/1.2\r\n", "Upgrade: TLS/1.2\r\n", false, false},
	} {
		req, _, err := ParseHead([]byte("GET / HTTP/1.1\r\nHost: a.example\r\n" + row.fields + "\r\n"))
		if err != nil {
			t.Fatal(err)
		}
		var r Responses
		r.Expect(&req)
		if r.Feed([]byte("HTTP/1.1 101 Switching Protocols\r\n" + row.taken + "\r\n")); r.Tunnel() != row.tunnel || r.HTTP2() != row.http2 || r.Lost() == (row.tunnel || row.http2) {
			t.Errorf("%s: tunnel %v, HTTP/2 %v, lost %v", row.what, r.Tunnel(), r.HTTP2(), r.Lost())
		}
		r.Expect(&req)
		if r.Feed([]byte("HTTP/1.1 200 OK\r\n" + row.taken + "Content-Length: 0\r\n\r\n")); r.Tunnel() || !r.Idle() {
			t.Errorf("%s: an answer that takes no offer up is not understood", row.what)
		}
	}
}

func TestFieldsThatOverrideARequest(t *testing.T) {
	for name, override := range map[string]bool{
		"X-Original-URL": true, "x-rewrite-url": true, "X_Original_URL": true, "X-HTTP-Method-Override": true, "X.Http.Method_Override": true, "X-HTTP-Method": true,
		"X-Method-Override": true, "X-Forwarded-Host": true, "X-Forwarded-Prefix": true, "X-Forwarded-URI": true, "X-Forwarded-Server": true, "Forwarded": true, "X-Host": true,
		"X-Original-Host": true, "X-HTTP-Host-Override": true, "_method": true, "X-Envoy-Original-Path": true, "X-Original-Method": true,
		"X-Forwarded-For": false, "X-Forwarded-Proto": false, "X-Requested-With": false, "X-Real-IP": false, "Accept": false, "Origin": false, "Referer": false, "X-Request-ID": false,
	} {
		r, n, err := ParseHead([]byte("GET /open HTTP/1.1\r\nHost: a.example\r\n" + name + ": /secret\r\n\r\n"))
		if err != nil || n == 0 || r.Override != override {
			t.Errorf("%s: override %v, %v; want %v", name, r.Override, err, override)
		}
		lower := strings.ToLower(name)
		for what, fields := range map[string][]string{"literal": {lower, "/secret"}, "and again, from the table": {lower, "/a", lower, "/secret"}} {
			s, _, err := feed(t, h2(nil, headers(append([]string{":method", "GET", ":scheme", "http", ":authority", "a.example", ":path", "/open"}, fields...)...)))
			if err != nil || s.Override != override {
				t.Errorf("%s by HTTP/2, %s: %+v, %v; want %v", name, what, s, err, override)
			}
		}
		b := Body{state: chunkSize}
		if _, err := b.Scan([]byte("0\r\n" + name + ": /secret\r\n\r\n")); (err != nil) != override {
			t.Errorf("%s in a trailer: %v", name, err)
		}
	}
	for _, name := range []string{"Host", "hOST", "Content-Length", "content_length", "Transfer-Encoding", "Upgrade", "Connection", strings.Repeat("x", maxTrailerName+1), "no colon"} {
		b := Body{state: chunkSize}
		if _, err := b.Scan([]byte("0\r\n" + name + ": x\r\n\r\n")); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s in a trailer: %v", name, err)
		}
	}
}
