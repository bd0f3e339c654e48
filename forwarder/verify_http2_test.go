package forwarder

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/gatetest"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
)

// h2Server serves HTTP/2 with prior knowledge at an address of the namespace, and records the
// requests.
type h2Server struct {
	mu   sync.Mutex
	seen []string
}

func (s *h2Server) saw() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(slices.Sorted(slices.Values(s.seen)), ", ")
}

func serveH2(t *testing.T, at string, handle http.HandlerFunc) *h2Server {
	t.Helper()
	s := new(h2Server)
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		note := fmt.Sprintf("%s %s %s", r.Method, r.Host, r.URL.Path)
		if handle != nil {
			s.mu.Lock()
			s.seen = append(s.seen, note)
			s.mu.Unlock()
			handle(w, r)
			return
		}
		body, err := io.ReadAll(r.Body)
		if err == nil {
			s.mu.Lock()
			s.seen = append(s.seen, strings.TrimSpace(note+" "+string(body)))
			s.mu.Unlock()
			_, _ = w.Write([]byte("ok"))
		}
	})}
	srv.Protocols.SetUnencryptedHTTP2(true)
	srv.Protocols.SetHTTP1(true)
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }() // until the test closes it
	t.Cleanup(func() { _ = srv.Close() })
	return s
}

// answersOf reads to the end, and returns the answers as "STREAM:STATUS" in the streams' order,
// with the texts.
func answersOf(c net.Conn) (answers, texts string, err error) {
	fr := http2.NewFramer(io.Discard, c)
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	status := map[uint32]string{}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			var all []string
			for _, id := range slices.Sorted(func(yield func(uint32) bool) {
				for id := range status {
					if !yield(id) {
						return
					}
				}
			}) {
				all = append(all, fmt.Sprintf("%d:%s", id, status[id]))
			}
			return strings.Join(all, " "), texts, err
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			status[f.StreamID] = f.PseudoValue("status")
			for _, field := range f.RegularFields() {
				texts += field.Name + ": " + field.Value + "\n"
			}
		case *http2.DataFrame:
			texts += string(f.Data())
		case *http2.RSTStreamFrame:
			status[f.StreamID] += "reset"
		case *http2.GoAwayFrame:
			texts += fmt.Sprintf("goaway %d %v\n", f.LastStreamID, f.ErrCode)
		}
	}
}

func TestStreamsAreJudgedOneByOne(t *testing.T) {
	if !namespaced(t) {
		return
	}
	const a, long = "a.example:8080", "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	get := func() *gatetest.Spoken { return gatetest.NewSpoken().Request(1, "GET", "/open/1", a) }
	post := func(more ...string) *gatetest.Spoken {
		return gatetest.NewSpoken().Request(1, "POST", "/open/p", a, append([]string{"open"}, more...)...)
	}
	trailers := func(s *gatetest.Spoken, stream uint32, kv ...string) *gatetest.Spoken {
		return s.Raw(http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, stream, string(s.Fields(kv...)))
	}
	const one, posted = "GET a.example:8080 /open/1", "POST a.example:8080 /open/p hello"
	// The server's answers to what was allowed before may or may not arrive in time.
	for _, row := range []struct {
		what    string
		say     *gatetest.Spoken
		served  string // the requests that the server may have seen; "?" before one that it need not have seen
		refused string // the stream that is answered 403; "" if none is, "ended" if an error ends the connection
	}{
		{"two that are allowed", get().Request(3, "GET", "/open/2", a), one + ", GET a.example:8080 /open/2", ""},
		{"the first not", gatetest.NewSpoken().Request(1, "DELETE", "/open/1", a), "", "1:403"},
		{"the first not, of HEAD", gatetest.NewSpoken().Request(1, "HEAD", "/x", a), "", "1:403"},
		{"the first to another name", gatetest.NewSpoken().Request(1, "GET", "/open/1", "b.example"), "", "1:403"},
		{"the second not", get().Request(3, "GET", "/secret", a).Request(5, "GET", "/open/2", a), "?" + one, "3:403"},
		{"the second to another name", get().Request(3, "GET", "/open/1", "b.example"), "?" + one, "3:403"},
		{"the second to another name by Host", get().Request(3, "GET", "/open/1", "", "host", "b.example"), "?" + one, "3:403"},
		{"authority by Host", gatetest.NewSpoken().Request(1, "GET", "/open/1", "", "host", a), one, ""},
		{"no authority", gatetest.NewSpoken().Request(1, "GET", "/open/1", ""), "", "1:403"},
		{"authority and Host that differ", gatetest.NewSpoken().Request(1, "GET", "/open/1", a, "host", "b.example"), "", "ended"},
		{"dots", gatetest.NewSpoken().Request(1, "GET", "/open/../secret", a), "", "1:403"},
		{"an absolute path", gatetest.NewSpoken().Request(1, "GET", "http://b.example/open/1", a), "", "ended"},
		{"content and a length", post("content-length", "5").Data(1, false, "he").Data(1, true, "llo").Request(3, "GET", "/open/1", a), one + ", " + posted, ""},
		{"content that says it is another request", post().Data(1, true, "\x00\x00\x00\x01\x05\x00\x00\x00\x03"), "POST a.example:8080 /open/p \x00\x00\x00\x01\x05\x00\x00\x00\x03", ""},
		{"more content than its length", post("content-length", "2").Data(1, true, "hello"), "", "ended"},
		{"less content than its length", post("content-length", "7").Data(1, true, "hello"), "", "ended"},
		{"a length and no content", gatetest.NewSpoken().Request(1, "POST", "/open/p", a, "content-length", "7"), "", "ended"},
		{"two lengths", post("content-length", "5", "content-length", "5").Data(1, true, "hello"), "", "ended"},
		{"a coding of HTTP/1", post("transfer-encoding", "chunked").Data(1, true, "hello"), "", "ended"},
		{"a line end in a value", gatetest.NewSpoken().Request(1, "GET", "/open/1", a, "x", "y\r\nhost: b.example"), "", "ended"},
		{"trailers", trailers(post("x", "y").Data(1, false, "hello"), 1, "x", "z").Request(3, "GET", "/open/1", a), one + ", " + posted, ""},
		{"trailers with a path", trailers(post().Data(1, false, "hello"), 1, ":path", "/secret"), "", "ended"},
		{"a stream begun twice", get().Request(1, "GET", "/open/2", a), "?" + one, "ended"},
		{"a lower stream", gatetest.NewSpoken().Request(3, "GET", "/open/1", a).Request(1, "GET", "/open/2", a), "?" + one, "ended"},
		{"a stream of the server's", gatetest.NewSpoken().Request(2, "GET", "/open/1", a), "", "ended"},
		{"CONNECT with a path", gatetest.NewSpoken().Request(1, "CONNECT", "/open/1", a), "", "ended"},
		{"another protocol", gatetest.NewSpoken().Request(1, "CONNECT", "/open/1", a, ":protocol", "websocket"), "", "1:403"},
		{"an upgrade of HTTP/1", gatetest.NewSpoken().Request(1, "GET", "/open/1", a, "upgrade", "h2c"), "", "ended"},
		{"a method in small letters", gatetest.NewSpoken().Request(1, "get", "/open/1", a), "", "1:403"},
		{"two paths", gatetest.NewSpoken().Request(1, "GET", "/open/1", a, ":path", "/secret"), "", "ended"},
		{"a field in capitals", gatetest.NewSpoken().Request(1, "GET", "/open/1", a, "Host", "b.example"), "", "ended"},
		{"an underscored length", gatetest.NewSpoken().Request(1, "GET", "/open/1", a, "content_length", "5"), "", "ended"},
		{"a block in many frames", gatetest.NewSpoken().Raw(http2.FrameHeaders, 1, 1, "\x82\x86").Raw(http2.FrameContinuation, 0, 1, "\x44\x07/open/1").
			Raw(http2.FrameContinuation, 0, 1, "").Raw(http2.FrameContinuation, 4, 1, "\x41\x0e"+a), one, ""},
		{"padding and priority", gatetest.NewSpoken().Raw(http2.FrameHeaders, 1|4|8|32, 1, "\x03\x00\x00\x00\x00\x10\x82\x86\x44\x07/open/1\x41\x0e"+a+"\x00\x00\x00"), one, ""},
		{"more padding than there is", gatetest.NewSpoken().Raw(http2.FrameHeaders, 1|4|8, 1, "\x7f\x82\x86"), "", "ended"},
		{"padded content", post("content-length", "5").Raw(http2.FrameData, 8, 1, "\x04hel\x00\x00\x00\x00").Raw(http2.FrameData, 1|8, 1, "\x00lo"), posted, ""},
		{"a frame between a block's", gatetest.NewSpoken().Raw(http2.FrameHeaders, 1, 1, "\x82\x86").Raw(http2.FramePing, 0, 0, "12345678"), "", "ended"},
		{"another stream's CONTINUATION", gatetest.NewSpoken().Raw(http2.FrameHeaders, 1, 1, "\x82\x86").Raw(http2.FrameContinuation, 4, 3, "\x84"), "", "ended"},
		{"CONTINUATION of nothing", get().Raw(http2.FrameContinuation, 4, 1, "\x84"), "?" + one, "ended"},
		{"content of no stream", get().Data(5, true, "hello"), "?" + one, "ended"},
		{"PUSH_PROMISE", get().Raw(http2.FramePushPromise, 4, 1, "\x00\x00\x00\x02\x82"), "?" + one, "ended"},
		{"a window of five bytes", get().Raw(http2.FrameWindowUpdate, 0, 0, "\x00\x00\x00\x01\x00"), "?" + one, "ended"},
		{"unknown frames", gatetest.NewSpoken().Raw(0x4d, 0xff, 7, long).Request(1, "GET", "/open/1", a), one, ""},
		{"a field that fills many segments", gatetest.NewSpoken().Request(1, "GET", "/open/1", a, "x", strings.Repeat(long, 10)).Request(3, "GET", "/open/2", a, "x", strings.Repeat(long+"x", 10)), one + ", GET a.example:8080 /open/2", ""},
		{"a table larger than any", gatetest.NewSpoken().Raw(http2.FrameHeaders, 1|4, 1, "\x3f\xe2\xff\x03\x82\x86\x44\x07/open/1\x41\x0e"+a), "", "ended"},
	} {
		for _, piece := range []int{1 << 20, 1} {
			t.Run(row.what+", "+map[int]string{1: "byte by byte", 1 << 20: "at once"}[piece], func(t *testing.T) {
				srv := serveH2(t, addrA.String()+":8080", nil)
				g := newNamed(t, byRequest, nil)
				c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
				_ = c.SetDeadline(time.Now().Add(8 * time.Second))
				say := bytes.Clone(row.say.Bytes())
				go func() {
					for p := say; len(p) > 0; p = p[min(piece, len(p)):] {
						if _, err := c.Write(p[:min(piece, len(p))]); err != nil {
							return
						}
					}
				}()
				if row.refused == "" {
					testutil.Eventually(t, "all are served", func() bool { return srv.saw() == row.served })
					return
				}
				answers, texts, err := answersOf(c)
				if row.refused == "ended" {
					if !errors.Is(err, io.EOF) || !strings.Contains(texts, "goaway") || strings.Contains(texts, "NO_ERROR") {
						t.Errorf("%s, %q, %v, want an error and the end; counters %v", answers, texts, err, g.f.Stats())
					}
				} else {
					want := []string{`goaway ` + row.refused[:1], `rule "egress[0] api"`}
					if strings.Contains(row.what, "HEAD") {
						want = want[:1]
					}
					for _, text := range want {
						if !strings.Contains(texts, text) {
							t.Errorf("the refusal says %q, not %q", texts, text)
						}
					}
					if !errors.Is(err, io.EOF) || !strings.HasSuffix(answers, row.refused) {
						t.Errorf("%q, %v, want %q and the end; counters %v", answers, err, row.refused, g.f.Stats())
					}
				}
				c.Close()
				must, may := row.served, ""
				if strings.HasPrefix(must, "?") {
					must, may = "", must[1:]
				}
				if got := srv.saw(); got != must && got != may {
					t.Errorf("the server saw %q, want %q", got, cmp.Or(may, must))
				}
			})
		}
	}
}

// TestARefusalComesBetweenTwoFrames refuses a request while an answer is under way.
func TestARefusalComesBetweenTwoFrames(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byRequest, nil)
	half, rest := make(chan bool), make(chan bool)
	serve(t, addrA.String()+":8080", func(c *net.TCPConn) {
		_, _ = c.Write([]byte(sniff.EmptySettings + "\x00\x00\x05\x01\x00\x00\x00\x00\x01\x88\x0f"))
		<-half
		<-rest
		// The rest of the frame, the end of the block, and what must not follow.
		_, _ = c.Write([]byte("\x0d\x01\x31\x00\x00\x00\x09\x04\x00\x00\x00\x01" + strings.Repeat("\x00\x00\x02\x00\x00\x00\x00\x00\x01no", 100)))
		_, _ = io.Copy(io.Discard, c)
	})
	c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
	_ = c.SetDeadline(time.Now().Add(8 * time.Second))
	say := gatetest.NewSpoken().Request(1, "GET", "/open/1", "a.example")
	_, _ = c.Write(say.Bytes())
	half <- true
	got := make([]byte, 20)
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	say.Reset()
	_, _ = c.Write(say.Request(3, "GET", "/secret", "a.example").Bytes())
	testutil.Eventually(t, "it is refused", func() bool { return g.f.Stats()["tcp_refused_request"] == 1 })
	rest <- true
	answers, texts, err := answersOf(readBefore{c, bytes.NewReader(got)})
	if answers != "1:200 3:403" || !strings.Contains(texts, "goaway 3") || strings.Contains(texts, "no\n") || strings.Contains(texts, "nono") || !errors.Is(err, io.EOF) {
		t.Errorf("%s, %q, %v", answers, texts, err)
	}
}

// readBefore is a connection of which something was already read.
type readBefore struct {
	net.Conn
	first *bytes.Reader
}

func (r readBefore) Read(p []byte) (int, error) {
	if r.first.Len() > 0 {
		return r.first.Read(p)
	}
	return r.Conn.Read(p)
}

// TestARefusalThatCannotBeToldIsAReset has a server stop within a frame.
func TestARefusalThatCannotBeToldIsAReset(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var clock runningClock
	g := newNamed(t, byRequest, func(c *Config) { c.Now = clock.now })
	serve(t, addrA.String()+":8080", func(c *net.TCPConn) {
		_, _ = c.Write([]byte(sniff.EmptySettings + "\x00\x00\x05"))
		_, _ = io.Copy(io.Discard, c)
	})
	c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
	_ = c.SetDeadline(time.Now().Add(8 * time.Second))
	say := gatetest.NewSpoken().Request(1, "GET", "/open/1", "a.example")
	_, _ = c.Write(say.Bytes())
	if _, err := io.ReadFull(c, make([]byte, 12)); err != nil {
		t.Fatal(err)
	}
	say.Reset()
	_, _ = c.Write(say.Request(3, "GET", "/secret", "a.example").Bytes())
	testutil.Eventually(t, "it is refused", func() bool { return g.f.Stats()["tcp_refused_request"] == 1 })
	clock.advance(firstbytes.RefusalTimeout + time.Second)
	if _, err := c.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("%v, want a reset", err)
	}
}

// TestRequestsUnderWayEndWithTheirRule reloads rules that refuse one of a connection's requests,
// while it is being answered and after that.
func TestRequestsUnderWayEndWithTheirRule(t *testing.T) {
	if !namespaced(t) {
		return
	}
	tighter := strings.Replace(byRequest, `"/open/*"`, `/open/1`, 1)
	for _, row := range []struct {
		what, path string
		finished   bool
		reset      bool
	}{
		{"a request that stays allowed", "/open/1", false, false},
		{"one that does not", "/open/slow", false, true},
		{"one that does not, but was answered", "/open/slow", true, false},
	} {
		for _, protocol := range []string{"HTTP/2", "HTTP/1"} {
			t.Run(row.what+" by "+protocol, func(t *testing.T) {
				g := newNamed(t, byRequest, nil)
				finish := make(chan bool)
				srv := serveH2(t, addrA.String()+":8080", func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Length", "2")
					_, _ = w.Write([]byte("o"))
					_ = http.NewResponseController(w).Flush()
					if r.URL.Path == row.path {
						select {
						case <-finish:
						case <-r.Context().Done():
							return
						}
					}
					_, _ = w.Write([]byte("k"))
				})
				tr := &http.Transport{Protocols: new(http.Protocols), DialContext: g.dialContext}
				tr.Protocols.SetHTTP1(protocol == "HTTP/1")
				tr.Protocols.SetUnencryptedHTTP2(protocol == "HTTP/2")
				defer tr.CloseIdleConnections()
				client := &http.Client{Transport: tr, Timeout: 8 * time.Second}
				get := func(path string) (*http.Response, error) { return client.Get("http://a.example:8080" + path) }
				if row.path != "/open/1" {
					if res, err := get("/open/1"); err != nil {
						t.Fatal(err)
					} else if _, err := io.Copy(io.Discard, res.Body); err != nil {
						t.Fatal(err)
					}
				}
				res, err := get(row.path)
				if err != nil {
					t.Fatal(err)
				}
				if row.finished {
					finish <- true
					if _, err := io.Copy(io.Discard, res.Body); err != nil {
						t.Fatal(err)
					}
				}
				g.f.SetRules(compile(t, tighter))
				if !row.finished && !row.reset {
					finish <- true
				}
				if !row.finished {
					body, err := io.ReadAll(res.Body)
					if (err != nil) != row.reset {
						t.Errorf("%q, %v", body, err)
					}
				}
				testutil.Eventually(t, "the flow is there, or not", func() bool { return (g.table.Len() == 0) == row.reset })
				if saw := srv.saw(); strings.Count(saw, row.path) != 1 {
					t.Errorf("the server saw %q", saw)
				}
			})
		}
	}
}

// TestStreamsInAuditMode passes, and reports, what the rules would refuse.
func TestStreamsInAuditMode(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, strings.Replace(byRequest, "  defaultAction", "  mode: audit\n  defaultAction", 1), nil)
	srv := serveH2(t, addrA.String()+":8080", nil)
	c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
	_, _ = c.Write(gatetest.NewSpoken().Request(1, "GET", "/open/1", "a.example").Request(3, "GET", "/secret", "a.example").Bytes())
	testutil.Eventually(t, "both are served", func() bool {
		return srv.saw() == "GET a.example /open/1, GET a.example /secret"
	})
	all := g.table.List()
	if len(all) != 1 || all[0].About.(admit.About).Seen.Kind != policy.SeenHTTP2 {
		t.Errorf("%+v", all)
	}
}
