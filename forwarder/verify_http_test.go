package forwarder

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

const byRequest = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: requests}
spec:
  defaultAction: reject
  egress:
  - name: api
    action: allow
    to: [{domain: a.example}]
    ports: [{protocol: TCP, port: 8080}]
    http: [{methods: [GET, HEAD, POST], path: "/open/*"}, {methods: [CONNECT]}]
`

func TestRequestsAreJudgedOneByOne(t *testing.T) {
	if !namespaced(t) {
		return
	}
	const ok = " HTTP/1.1\r\nHost: a.example:8080\r\n"
	for _, row := range []struct {
		what, say string
		served    string   // the requests that the server saw
		answers   []string // beginnings of the answers to the client
		reset     bool
	}{
		{"two that are allowed", "GET /open/1" + ok + "\r\n" + "GET /open/2" + ok + "\r\n", "GET /open/1, GET /open/2", []string{"200", "200"}, false},
		{"the second not, pipelined", "GET /open/1" + ok + "\r\n" + "GET /secret" + ok + "\r\n" + "GET /open/2" + ok + "\r\n", "GET /open/1", []string{"200", "403"}, false},
		{"the first not", "DELETE /open/1" + ok + "\r\n", "", []string{"403"}, false},
		{"a body with a length, and another behind it", "POST /open/p" + ok + "Content-Length: 5\r\n\r\nhelloGET /open/2" + ok + "\r\n", "POST /open/p hello, GET /open/2", []string{"200", "200"}, false},
		{"a body in chunks, and a refused one behind it", "POST /open/p" + ok + "Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\nGET /x" + ok + "\r\n", "POST /open/p hello", []string{"200", "403"}, false},
		{"a request hidden behind a length and a coding", "POST /open/p" + ok + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x" + ok + "\r\n", "", []string{"400"}, false},
		{"a request hidden in a folded line", "GET /open/1" + ok + "X: y\r\n\tGET /x" + ok + "\r\n", "", []string{"400"}, false},
		{"a request hidden by a bare LF", "GET /open/1" + ok + "\nGET /x" + ok + "\r\n", "", []string{"400"}, false},
		{"another host on the same connection", "GET /open/1" + ok + "\r\n" + "GET /open/2 HTTP/1.1\r\nHost: b.example\r\n\r\n", "GET /open/1", []string{"200", "403"}, false},
		{"an upgrade that is not taken up, and another behind it", "GET /open/1" + ok + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n" + "GET /x" + ok + "\r\n", "GET /open/1", []string{"200", "403"}, false},
		{"a target in UTF-8", "GET /open/caf\u00e9" + ok + "\r\n", "GET /open/caf\u00e9", []string{"200"}, false},
		{"a target in bytes that are no UTF-8", "GET /open/\xc0\xae\xc0\xae/secret" + ok + "\r\n", "", []string{"403"}, false},
		{"a method in small letters, which no rule lists", "get /open/1" + ok + "\r\n", "", []string{"403"}, false},
		{"a head of 60 KiB", "GET /open/1" + ok + "X: " + strings.Repeat("x", 60<<10) + "\r\n\r\n", "GET /open/1", []string{"200"}, false},
		{"a head of 70 KiB", "GET /open/1" + ok + "X: " + strings.Repeat("x", 70<<10) + "\r\n\r\n", "", []string{"431"}, false},
		{"a head of 70 KiB behind a request", "GET /open/1" + ok + "\r\nGET /open/2" + ok + "X: " + strings.Repeat("x", 70<<10) + "\r\n\r\n", "GET /open/1", []string{"200", "431"}, false},
		{"HEAD, and one more", "HEAD /open/1" + ok + "\r\n" + "GET /open/2" + ok + "\r\n", "HEAD /open/1, GET /open/2", []string{"200", "200"}, false},
		{"a head of many segments behind another", "GET /open/1" + ok + "\r\n" + "GET /open/2" + ok + "X: " + strings.Repeat("x", 600) + "\r\n\r\n", "GET /open/1, GET /open/2", []string{"200", "200"}, false},
		{"dots", "GET /open/../secret" + ok + "\r\n", "", []string{"403"}, false},
		{"encoded dots", "GET /open/%2e%2e/secret" + ok + "\r\n", "", []string{"403"}, false},
		{"no HTTP at all", "\x00\x01\x02\x03", "", nil, true},
	} {
		for _, piece := range []int{1 << 20, 1} {
			if piece == 1 && len(row.say) > 10<<10 {
				continue // each byte is a segment, and all the bytes so far are examined
			}
			t.Run(row.what+", "+map[int]string{1: "byte by byte", 1 << 20: "at once"}[piece], func(t *testing.T) {
				var mu sync.Mutex
				var seen []string
				srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					body, _ := io.ReadAll(r.Body)
					mu.Lock()
					seen = append(seen, strings.TrimSpace(r.Method+" "+r.RequestURI+" "+string(body)))
					mu.Unlock()
					_, _ = w.Write([]byte("ok"))
				})}
				l, err := net.Listen("tcp", addrA.String()+":8080")
				if err != nil {
					t.Fatal(err)
				}
				go func() { _ = srv.Serve(l) }()
				defer srv.Close()
				g := newNamed(t, byRequest, nil)
				c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
				_ = c.SetDeadline(time.Now().Add(8 * time.Second))
				go func() {
					for p := row.say; p != ""; p = p[min(piece, len(p)):] {
						if _, err := c.Write([]byte(p[:min(piece, len(p))])); err != nil {
							return
						}
					}
				}()
				r := bufio.NewReader(c)
				for i, want := range row.answers {
					method := "GET"
					if strings.HasPrefix(row.say, "HEAD") && i == 0 {
						method = "HEAD"
					}
					res, err := http.ReadResponse(r, &http.Request{Method: method})
					if err != nil {
						t.Fatalf("answer %d: %v; counters %v", i, err, g.f.Stats())
					}
					body, err := io.ReadAll(res.Body)
					if err != nil || !strings.HasPrefix(res.Status, want) {
						t.Fatalf("answer %d: %s, %q, %v", i, res.Status, body, err)
					}
					if want != "200" {
						if want == "403" && (!strings.Contains(string(body), `rule "egress[0] api"`) || !strings.Contains(string(body), `policy "requests"`)) {
							t.Errorf("the refusal says %q", body)
						}
						if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
							t.Errorf("after the refusal: %v, want the end", err)
						}
						c.Close()
					}
				}
				if row.reset {
					if _, err := r.ReadByte(); !isReset(err) {
						t.Errorf("got %v, want a reset", err)
					}
				}
				mu.Lock()
				defer mu.Unlock()
				if got := strings.Join(seen, ", "); got != row.served {
					t.Errorf("the server saw %q, want %q", got, row.served)
				}
			})
		}
	}
}

// TestAConnectionGoesOnOrEndsAfterAnAnswer sends two requests to servers that break the rules.
func TestAConnectionGoesOnOrEndsAfterAnAnswer(t *testing.T) {
	if !namespaced(t) {
		return
	}
	const upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
	for _, row := range []struct {
		what, fields, answer string
		then                 string // what the server hears next, "" if the connection ends
	}{
		{"chunks with extensions", "", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0;c\r\n\r\n", "GET /open/2"},
		{"padded sizes", "", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2   \r\nok\r\n0   \r\n\r\n", "GET /open/2"},
		{"lines that end in LF", "", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n", "GET /open/2"},
		{"a doubled length", "", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok", "GET /open/2"},
		{"a length with a blank before its colon", "", "HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok", "GET /open/2"},
		{"no 100, for content that the client then keeps", "Expect: 100-continue\r\nContent-Length: 5\r\n", "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n", ""},
		{"two lengths", "", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", ""},
		{"no status", "", "ok\r\n\r\n", ""},
		{"an offer that is not taken up", upgrade, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "GET /open/2"},
		{"an offer that is taken up", upgrade, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "GET /open/2"},
		{"a switch that nobody offered", "", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", ""},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newNamed(t, byRequest, nil)
			heard := make(chan string, 1)
			serve(t, addrA.String()+":8080", func(c *net.TCPConn) {
				r := bufio.NewReader(c)
				if _, err := http.ReadRequest(r); err != nil {
					return
				}
				_, _ = io.WriteString(c, row.answer)
				then := make([]byte, len("GET /open/2"))
				n, _ := io.ReadFull(r, then)
				heard <- string(then[:n])
			})
			c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
			_ = c.SetDeadline(time.Now().Add(8 * time.Second))
			_, _ = io.WriteString(c, "GET /open/1 HTTP/1.1\r\nHost: a.example:8080\r\n"+row.fields+"\r\n")
			got := make([]byte, len(row.answer))
			if _, err := io.ReadFull(c, got); err != nil || string(got) != row.answer {
				t.Fatalf("the answer came as %q, %v", got, err)
			}
			_, _ = io.WriteString(c, "GET /open/2 HTTP/1.1\r\nHost: a.example:8080\r\n\r\n")
			if then := <-heard; then != row.then {
				t.Errorf("the server hears %q, want %q", then, row.then)
			}
			if row.then == "" {
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
					t.Errorf("the connection does not end: %v", err)
				}
			}
		})
	}
}

func TestAnAllowedTunnelIsATunnel(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byRequest, nil)
	serve(t, addrA.String()+":8080", func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\n\r\n"))
		_, _ = io.Copy(c, r)
	})
	c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = c.Write([]byte("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\nGET /secret HTTP/1.1\r\n\r\n"))
	r := bufio.NewReader(c)
	if res, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"}); err != nil || res.StatusCode != 200 {
		t.Fatalf("%+v, %v", res, err)
	}
	got := make([]byte, 8)
	if _, err := io.ReadFull(r, got); err != nil || string(got) != "GET /sec" {
		t.Errorf("through the tunnel: %q, %v", got, err)
	}
}

func TestBulkThroughTheGateIsUnchanged(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byRequest, nil)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<18) // 4 MiB
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(body)
	})}
	l, err := net.Listen("tcp", addrA.String()+":8080")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	client := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return g.dial(netip.AddrPortFrom(addrA, 8080))
	}}}
	defer client.CloseIdleConnections()
	for _, length := range []int64{int64(len(data)), -1} {
		req, err := http.NewRequest("POST", "http://a.example:8080/open/echo", io.NopCloser(bytes.NewReader(data)))
		if err != nil {
			t.Fatal(err)
		}
		req.ContentLength = length
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("length %d: %d of %d bytes came back, %v", length, len(got), len(data), err)
		}
	}
}
