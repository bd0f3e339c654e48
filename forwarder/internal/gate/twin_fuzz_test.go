package gate

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/gatetest"
)

const byName = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: names}
spec:
  defaultAction: reject
  egress:
  - {name: a, action: allow, to: [{domain: a.example}, {domain: "*.a.example"}]}
`

var byNoName = strings.Replace(byName, `{domain: "*.a.example"}]`, `{domain: "*.a.example"}], missingName: allow`, 1)

// FuzzTwinTLS has crypto/tls read the client bytes that pass, as the server would: no ClientHello
// in them may carry any name but the allowed one. The server's second answer, if it asks for
// another hello, covers the hellos from which a server might still take the name.
func FuzzTwinTLS(f *testing.F) {
	cert := gatetest.SelfSigned(f)
	strict, nameless := newTwinJudge(f, byName, 443), newTwinJudge(f, byNoName, 443)
	a, b, none := gatetest.ClientHello(f, "a.example"), gatetest.ClientHello(f, "b.example"), gatetest.ClientHello(f, "203.0.113.10")
	join := func(all ...[]byte) []byte { return bytes.Join(all, nil) }
	change, data := []byte{20, 3, 3, 0, 1, 1}, []byte{23, 3, 3, 0, 1, 0}
	for _, client := range [][]byte{
		a, b, none, join(a, b), join(a, change, b), join(a, change, a, b), join(none, b), join(none, change, none), gatetest.Records(a, 50), join(a, data, gatetest.Records(b, 1)),
		join([]byte{22, 3, 1, 0, 0}, b), join([]byte{21, 3, 1, 0, 2, 1, 100}, b), gatetest.Spelled(gatetest.ClientHello(f, "xxxxxxxxxx"), "a.example."), gatetest.Spelled(gatetest.ClientHello(f, "xxxxxxxxxxx"), "ａ.example"),
		[]byte("GET / HTTP/1.0\r\n\r\n"), []byte("STARTTLS\r\n"),
	} {
		for _, retry := range []bool{false, true} {
			f.Add(client, []byte{}, retry)
			f.Add(client, []byte{0, 20}, retry)
		}
	}
	f.Fuzz(func(t *testing.T, client, cuts []byte, retry bool) {
		if len(client) > 8<<10 {
			return
		}
		for _, side := range []struct {
			judge *twinJudge
			may   []string
		}{{strict, []string{"a.example"}}, {nameless, []string{"a.example", "", "203.0.113.10"}}} {
			var said []string
			hear := func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
				said = append(said, strings.ToLower(hello.ServerName))
				return nil, nil
			}
			cfg := &tls.Config{Certificates: []tls.Certificate{cert}, GetConfigForClient: hear, SessionTicketsDisabled: true, CurvePreferences: []tls.CurveID{tls.X25519}}
			if retry {
				cfg.CurvePreferences = []tls.CurveID{tls.CurveP384} // for which no client sends a key
			}
			passed := side.judge.run(client, cuts, func(c net.Conn) {
				_ = tls.Server(c, cfg).Handshake()
				_, _ = io.Copy(io.Discard, c)
			})
			cfg.CurvePreferences = nil
			for _, hello := range laterHellos(passed) {
				c := newBlockingConn()
				go c.serve(func(c net.Conn) { _ = tls.Server(c, cfg).Handshake() })
				c.say(hello)
				c.end()
			}
			for _, name := range said {
				if !slices.Contains(side.may, name) {
					t.Fatalf("a server is told %q of %q by %q", name, side.may, client)
				}
			}
		}
	})
}

// laterHellos returns the handshake messages after the first one, whatever other records lie
// between, each in records of its own and with the bytes that follow it.
func laterHellos(p []byte) (all [][]byte) {
	msg := gatetest.HandshakeOf(p)
	for first := true; len(msg) >= 4 && len(all) < 8; first = false {
		if !first {
			all = append(all, inRecords(msg))
		}
		msg = msg[min(len(msg), 4+int(msg[1])<<16+int(msg[2])<<8+int(msg[3])):]
	}
	return all
}

func inRecords(msg []byte) (out []byte) {
	for len(msg) > 0 {
		n := min(len(msg), 1<<14)
		out = append(append(out, 22, 3, 1, byte(n>>8), byte(n)), msg[:n]...)
		msg = msg[n:]
	}
	return out
}

// twinRules are the rules for the twins that read requests.
const twinRules = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: twin}
spec:
  defaultAction: reject
  egress:
  - name: api
    action: allow
    to: [{domain: a.example}]
    ports: [{protocol: TCP, port: 8080}]
    http: [{methods: [GET, HEAD, POST], path: "/open/*"}]
`

// wrongRequest returns what is wrong with a request that a server saw under twinRules.
func wrongRequest(method, host, decoded string, fields http.Header) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	switch {
	case strings.TrimSuffix(strings.ToLower(strings.TrimSuffix(host, ":")), ".") != "a.example":
		return "host " + host
	case method != "GET" && method != "HEAD" && method != "POST":
		return "method " + method
	case !strings.HasPrefix(decoded, "/open/") || !strings.HasPrefix(path.Clean(decoded)+"/", "/open/"):
		return "path " + decoded
	}
	for name := range fields {
		switch strings.ReplaceAll(strings.ToLower(name), "_", "-") {
		case "x-original-url", "x-rewrite-url", "x-http-method-override", "x-http-method", "x-method-override", "x-forwarded-host", "forwarded":
			return "field " + name
		}
	}
	return ""
}

// FuzzTwinHTTP has net/http read the client bytes that pass. The fuzzer chooses the server's
// answers, from those of honest servers and that of one that switches protocols unasked.
func FuzzTwinHTTP(f *testing.F) {
	judge := newTwinJudge(f, twinRules, 8080)
	answers := []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\n\r\n", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
	}
	const get, secret = "GET /open/1 HTTP/1.1\r\nHost: a.example\r\n\r\n", "GET /secret HTTP/1.1\r\nHost: b.example\r\n\r\n"
	const post = "POST /open/2 HTTP/1.1\r\nHost: a.example\r\n"
	offer := get[:len(get)-2] + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
	for _, client := range []string{
		get, get + secret, strings.ReplaceAll(get, "\r", "") + get, strings.ReplaceAll(get+secret, "\r", ""), "\r\n" + get + secret, "\r\n" + secret, get + "\r\n" + secret, post + "Content-Length: 5\r\n\r\nhello" + secret, post + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n" + get,
		post + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + secret, "GET http://a.example/open/x HTTP/1.1\r\nHost: a.example:8080\r\n\r\n", "GET /open/../secret HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"HEAD /open/%2e%2e/secret HTTP/1.0\r\nHost: a.example\r\nConnection: keep-alive\r\n\r\n", post + "X-HTTP-Method-Override: DELETE\r\n\r\n", post + "Transfer-Encoding: chunked\r\n\r\n0\r\nX_Original_URL: /secret\r\n\r\n",
		post + "Expect: 100-continue\r\nContent-Length: 44\r\n\r\n" + secret, "OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n", "CONNECT a.example:1 HTTP/1.1\r\nHost: a.example:1\r\n\r\n" + secret,
		get[:len(get)-2] + "Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + secret,
		offer + gatetest.NewSpoken().Request(3, "GET", "/open/3", "a.example").String(), offer + gatetest.NewSpoken().Request(3, "GET", "/secret", "b.example").String(),
		offer + gatetest.NewSpoken().Request(3, "GET", "/open/3", "a.example").Request(5, "GET", "/open/3", "b.example").String(), offer + secret,
		offer + gatetest.NewSpoken().Data(1, true, secret).String(),
		get[:len(get)-2] + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + secret,
		get[:len(get)-2] + "Upgrade: websocket\r\n\r\n" + secret,
	} {
		f.Add([]byte(client), []byte{}, []byte{0})
		f.Add([]byte(client), []byte{0, 9}, []byte{4, 1, 2, 3, 5})
		f.Add([]byte(client), []byte{}, []byte{6})
		f.Add([]byte(client), []byte{}, []byte{7})
	}
	f.Fuzz(func(t *testing.T, client, cuts, chosen []byte) {
		if len(client) > 4<<10 {
			return
		}
		var wrong string
		judge.run(client, cuts, func(c net.Conn) {
			r := bufio.NewReader(c)
			for i := 0; wrong == ""; i++ {
				req, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				wrong = wrongRequest(req.Method, req.Host, req.URL.Path, req.Header)
				early := i < len(chosen) && chosen[i]&8 != 0
				answer := answers[0]
				if i < len(chosen) {
					answer = answers[int(chosen[i]&7)%len(answers)]
				}
				if early {
					_, _ = io.WriteString(c, answer)
				}
				if _, err := io.Copy(io.Discard, req.Body); err != nil {
					return
				}
				if wrong == "" {
					wrong = wrongRequest(req.Method, req.Host, req.URL.Path, req.Trailer)
				}
				if !early {
					_, _ = io.WriteString(c, answer)
				}
				if strings.Contains(answer, " 101 ") {
					// The server believes in the switch, and the protocol's server after it reads
					// on.
					offered := func(what string) bool {
						return strings.Contains(strings.ToLower(strings.Join(req.Header["Upgrade"], ",")), what) && strings.Contains(strings.ToLower(strings.Join(req.Header["Connection"], ",")), "upgrade")
					}
					switch {
					case answer == answers[6] && offered("websocket"):
					case answer == answers[7] && offered("h2c"):
						preface := make([]byte, len(http2.ClientPreface))
						if n, err := io.ReadFull(r, preface); err != nil || string(preface) != http2.ClientPreface {
							if !strings.HasPrefix(http2.ClientPreface, string(preface[:n])) {
								wrong = "no preface: " + string(preface[:n])
							}
							return
						}
						wrong = readStreams(r, c, 1)
					default:
						wrong = readOn(r)
					}
					return
				}
			}
		})
		if wrong != "" {
			t.Fatalf("a server is told of %s by %q", wrong, client)
		}
	})
}

// readOn reports bytes after an answer that none may follow.
func readOn(r io.Reader) string {
	if b, _ := io.ReadAll(r); len(b) > 0 {
		return "bytes behind the switch: " + string(b)
	}
	return ""
}

// readStreams reads HTTP/2 after the preface, as a server whose last stream was last, until nothing
// more comes or a request is wrong, and returns what is wrong with it.
func readStreams(r io.Reader, w io.Writer, last uint32) (wrong string) {
	frames := http2.NewFramer(w, r)
	frames.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = frames.WriteSettings()
	for wrong == "" {
		fr, err := frames.ReadFrame()
		if stream := (http2.StreamError{}); errors.As(err, &stream) {
			_ = frames.WriteRSTStream(stream.StreamID, stream.Code)
			continue
		}
		if err != nil {
			return ""
		}
		switch fr := fr.(type) {
		case *http2.SettingsFrame:
			if !fr.IsAck() {
				_ = frames.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !fr.IsAck() {
				_ = frames.WritePing(true, fr.Data)
			}
		}
		block, ok := fr.(*http2.MetaHeadersFrame)
		if !ok {
			continue
		}
		fields := http.Header{}
		for _, field := range block.RegularFields() {
			fields.Add(field.Name, field.Value)
		}
		if id := block.StreamID; id <= last { // a stream below it has begun, or never will (RFC 9113, section 5.1.1)
			wrong = wrongRequest("GET", "a.example", "/open/", fields) // its trailer
		} else {
			last = id
			host, target := block.PseudoValue("authority"), block.PseudoValue("path")
			if host == "" {
				host = fields.Get("Host")
			}
			target, _, _ = strings.Cut(target, "?")
			wrong = wrongRequest(block.PseudoValue("method"), host, unescaped(target), fields)
		}
		_, _ = w.Write(firstbytes.Frame2(1, 5, block.StreamID, []byte{0x88}))
	}
	return wrong
}

// FuzzTwinHTTP2 has golang.org/x/net/http2 read the client bytes that pass.
func FuzzTwinHTTP2(f *testing.F) {
	judge := newTwinJudge(f, twinRules, 8080)
	say := func(requests ...[]string) []byte {
		s := gatetest.NewSpoken()
		for i, r := range requests {
			s.Request(uint32(2*i+1), r[0], r[1], r[2], r[3:]...)
		}
		return s.Bytes()
	}
	get, secret := []string{"GET", "/open/1", "a.example"}, []string{"GET", "/secret", "a.example"}
	for _, client := range [][]byte{
		say(get), say(get, get), say(get, secret), say(secret), say(get, []string{"GET", "/open/1", "b.example"}), say([]string{"DELETE", "/open/1", "a.example"}),
		say(append(slices.Clone(get), "x-original-url", "/secret")), say(append(slices.Clone(get), "host", "b.example")), say(append(slices.Clone(get), "x-http-method-override", "DELETE", "cookie", "a=b")),
		append([]byte("\r\n"), say(get)...),
		gatetest.NewSpoken().Raw(http2.FramePing, 0, 0, "12345678").Request(1, "GET", "/open/1", "a.example").Raw(http2.FramePing, 0, 0, "12345678").Raw(http2.FrameSettings, 0, 0, "").Bytes(),
		gatetest.NewSpoken().Raw(http2.FrameSettings, 0, 0, "").Raw(http2.FrameSettings, 1, 0, "").Raw(http2.FramePing, 1, 0, "12345678").Raw(http2.FrameWindowUpdate, 0, 1<<31, "\x00\x00\x00\x01").Request(1, "GET", "/secret", "a.example").Bytes(),
	} {
		f.Add(client, []byte{})
		f.Add(client, []byte{0, 7})
	}
	f.Fuzz(func(t *testing.T, client, cuts []byte) {
		if len(client) > 4<<10 {
			return
		}
		var wrong string
		judge.run(client, cuts, func(c net.Conn) {
			if _, err := io.ReadFull(c, make([]byte, len(http2.ClientPreface))); err != nil {
				return
			}
			wrong = readStreams(c, c, 0)
		})
		if wrong != "" {
			t.Fatalf("a server is told of %s by %q", wrong, client)
		}
		if len(client) < len(http2.ClientPreface) {
			return
		}
		settings, pings := askedFor(client[len(http2.ClientPreface):], 0)
		acks, pongs := askedFor(judge.heard, http2.FlagSettingsAck)
		if acks > settings || pongs > pings {
			t.Fatalf("%d acknowledgements and %d answers to %d SETTINGS and %d PINGs in %q", acks, pongs, settings, pings, client)
		}
	})
}

// askedFor counts SETTINGS and PINGs: those that want an answer or, with ack, the answers.
func askedFor(p []byte, ack http2.Flags) (settings, pings int) {
	frames := http2.NewFramer(nil, bytes.NewReader(p))
	frames.SetMaxReadFrameSize(1<<24 - 1)
	for {
		head, err := frames.ReadFrameHeader()
		if err != nil {
			return settings, pings
		}
		if head.Flags&1 == ack {
			switch head.Type {
			case http2.FrameSettings:
				settings++
			case http2.FramePing:
				pings++
			}
		}
		if _, err := frames.ReadFrameForHeader(head); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return settings, pings
		}
	}
}

// unescaped returns a path as a server decodes it.
func unescaped(target string) string {
	if p, err := url.PathUnescape(target); err == nil {
		return p
	}
	return target
}
