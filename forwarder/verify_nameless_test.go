package forwarder

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/gatetest"
	"sluice.dev/sluice/internal/testutil"
)

// byNoName lets pass flows that say no name.
var byNoName = strings.Replace(byName, `{domain: "*.a.example"}]`, `{domain: "*.a.example"}], missingName: allow`, 1)

// TestNoNameIsNoWrongName passes data that was read whole, is well formed and has no name, and
// nothing that may still say one.
func TestNoNameIsNoWrongName(t *testing.T) {
	if !namespaced(t) {
		return
	}
	nameless := gatetest.ClientHello(t, "203.0.113.10")
	wrong := gatetest.ClientHello(t, "b.example")
	long := append([]byte{22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc}, make([]byte, 17<<10)...)
	for _, row := range []struct {
		what    string
		say     []byte
		through bool
	}{
		{"a hello without a name", nameless, true},
		{"in records of one byte", gatetest.Records(nameless, 1), true},
		{"a request without Host", []byte("GET /x HTTP/1.0\r\n\r\n"), true},
		{"a request with its own address for Host", []byte("GET /x HTTP/1.1\r\nHost: 203.0.113.10:80\r\n\r\n"), true},
		{"a stream without an authority", []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x03\x01\x05\x00\x00\x00\x01\x82\x84\x86"), true},
		{"the right name", gatetest.ClientHello(t, "a.example"), true},

		{"a wrong name", wrong, false},
		{"a hello whose length is wrong", append(bytes.Clone(wrong[:8]), append([]byte{wrong[8] - 1}, wrong[9:]...)...), false},
		{"a hello that is too long", long, false},
		{"a hello behind a warning", append([]byte{21, 3, 1, 0, 2, 1, 100}, wrong...), false},
		{"a hello behind an empty record", append([]byte{22, 3, 1, 0, 0}, wrong...), false},
		{"a hello behind the change of ciphers", append([]byte{20, 3, 1, 0, 1, 1}, wrong...), false},
		{"a hello behind plain bytes", append([]byte("STARTTLS\r\n"), wrong...), false},
		{"a hello behind the PROXY protocol", append([]byte("PROXY TCP4 192.0.2.1 192.0.2.2 1 443\r\n"), wrong...), false},
		{"a request with another address for Host", []byte("GET /x HTTP/1.1\r\nHost: 203.0.113.11\r\n\r\n"), false},
		{"a request with another address for its target", []byte("GET http://203.0.113.11/x HTTP/1.1\r\nHost: 203.0.113.11\r\n\r\n"), false},
		{"a request with an address in numbers", []byte("GET /x HTTP/1.1\r\nHost: 127.1\r\n\r\n"), false},
		{"a request with a wrong name behind an empty line", []byte("\r\nGET /x HTTP/1.1\r\nHost: b.example\r\n\r\n"), false},
		{"a request with a wrong name and a tab", []byte("GET\t/x HTTP/1.1\r\nHost: b.example\r\n\r\n"), false},
		{"opaque bytes", []byte("\x00\x01\x02\x03hello"), false},
		{"half a hello", wrong[:50], false},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newNamed(t, byNoName, nil)
			s := serveEcho(t, addrA.String()+":0")
			c := g.mustDial(s.at)
			if row.what == "half a hello" {
				_, _ = c.Write(row.say)
				_ = c.CloseWrite()
			}
			got, err := sendAndRead(c, row.say, 1<<20)
			if through := err == nil && bytes.Equal(got, row.say); through != row.through {
				t.Errorf("let through: %v, %v; want %v; counters %v", through, err, row.through, g.f.Stats())
			}
			c.Close()
			if _, n := s.heard(t); !row.through && n != 0 {
				t.Errorf("the server heard %d bytes", n)
			}
		})
	}
}

// TestSilenceIsNoName has a client say a name only after the gate has stopped waiting.
func TestSilenceIsNoName(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var clock runningClock
	g := newNamed(t, byNoName, func(c *Config) { c.Now = clock.now })
	s := serveEcho(t, addrA.String()+":0")
	c := g.mustDial(s.at)
	testutil.Eventually(t, "it is waited for", func() bool {
		g.f.tcp.Checks.Mu.Lock()
		defer g.f.tcp.Checks.Mu.Unlock()
		return g.f.tcp.Checks.Flows.Len() == 1
	})
	clock.advance(firstbytes.CheckTimeout + time.Second)
	if _, err := sendAndRead(c, gatetest.ClientHello(t, "b.example"), 1<<20); err == nil {
		t.Error("a wrong name passes behind silence")
	}
	if _, n := s.heard(t); n != 0 {
		t.Errorf("the server heard %d bytes", n)
	}
}

// TestAWrongNameBehindARequestWithoutOne judges the requests of a connection whose first one said
// no name.
func TestAWrongNameBehindARequestWithoutOne(t *testing.T) {
	if !namespaced(t) {
		return
	}
	for _, first := range []string{"GET /1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "GET /1 HTTP/1.1\r\nHost: 203.0.113.10\r\n\r\n"} {
		g := newNamed(t, byNoName, nil)
		hosts := make(chan string, 8)
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			hosts <- r.Host
			w.Header().Set("Content-Length", "2")
			_, _ = w.Write([]byte("ok"))
		})}
		l, err := net.Listen("tcp", addrA.String()+":0")
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = srv.Serve(l) }()
		t.Cleanup(func() { srv.Close() })
		c := g.mustDial(netip.MustParseAddrPort(l.Addr().String()))
		_ = c.SetDeadline(time.Now().Add(8 * time.Second))
		_, _ = c.Write([]byte(first + "GET /2 HTTP/1.1\r\nHost: b.example\r\n\r\n"))
		r := bufio.NewReader(c)
		for i, want := range []int{200, 403} {
			res, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("answer %d: %v", i, err)
			}
			if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != want {
				t.Errorf("answer %d: %s, %v; want %d", i, res.Status, err, want)
			}
		}
		if <-hosts == "b.example" || len(hosts) > 0 {
			t.Errorf("the server saw a wrong name behind %q", first)
		}
	}
}

// TestARequestThatNobodyJudgedEndsWithItsRules loads rules that judge each request of a connection,
// where the previous rules judged none.
func TestARequestThatNobodyJudgedEndsWithItsRules(t *testing.T) {
	if !namespaced(t) {
		return
	}
	audit := strings.Replace(strings.ReplaceAll(byName, "a.example", "z.example"), "  defaultAction", "  mode: audit\n  defaultAction", 1)
	g := newNamed(t, audit, nil)
	s := serveEcho(t, addrA.String()+":0")
	c := g.mustDial(s.at)
	if _, err := sendAndRead(c, []byte("GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"), 1<<20); err != nil {
		t.Fatal(err)
	}
	g.f.SetRules(compile(t, byName))
	if _, err := sendAndRead(c, []byte("GET /x HTTP/1.1\r\nHost: b.example\r\n\r\n"), 1<<20); !isReset(err) {
		t.Errorf("another request: %v, want a reset", err)
	}
}

// TestNamesAreComparedAsTheyAreSaid has hellos with names that a mapping would turn into the
// allowed one.
func TestNamesAreComparedAsTheyAreSaid(t *testing.T) {
	if !namespaced(t) {
		return
	}
	for _, name := range []string{"ａ.example", "a。example", "a．example", "\u00ada.example", "a.ｅxample", "a.example."} {
		for _, text := range []string{byName, byNoName} {
			g := newNamed(t, text, nil)
			s := serveEcho(t, addrA.String()+":0")
			c := g.mustDial(s.at)
			if _, err := sendAndRead(c, gatetest.Spelled(gatetest.ClientHello(t, strings.Repeat("x", len(name))), name), 1<<20); !isReset(err) {
				t.Errorf("%q: %v, want a reset", name, err)
			}
			if _, n := s.heard(t); n != 0 {
				t.Errorf("of %q the server heard %d bytes", name, n)
			}
		}
	}
}

// TestAnUpgradeThatNobodyAskedFor has a server answer an ordinary request with 101, or with what
// would accept a tunnel.
func TestAnUpgradeThatNobodyAskedFor(t *testing.T) {
	if !namespaced(t) {
		return
	}
	for _, answer := range []string{"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "HTTP/1.1 200 Connection established\r\n\r\n"} {
		t.Run(answer[9:12], func(t *testing.T) {
			g := newNamed(t, byRequest, nil)
			got := make(chan string, 1)
			serve(t, addrA.String()+":8080", func(c *net.TCPConn) {
				r := bufio.NewReader(c)
				if _, err := http.ReadRequest(r); err != nil {
					return
				}
				_, _ = c.Write([]byte(answer))
				rest, _ := io.ReadAll(r)
				got <- string(rest)
			})
			c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
			_ = c.SetDeadline(time.Now().Add(8 * time.Second))
			_, _ = c.Write([]byte("GET /open/1 HTTP/1.1\r\nHost: a.example:8080\r\n\r\n"))
			if _, err := io.ReadFull(c, make([]byte, len(answer))); err != nil {
				t.Fatal(err)
			}
			const second = "GET /secret HTTP/1.1\r\nHost: b.example\r\n\r\n"
			_, _ = c.Write([]byte(second))
			testutil.Eventually(t, "the second request is held, or the connection has ended", func() bool {
				return g.held() == len(second) || len(got) > 0
			})
			// The end of the flow shows everything that did pass.
			g.f.SetRules(compile(t, strings.Replace(byRequest, "a.example", "z.example", 1)))
			if rest := <-got; rest != "" {
				t.Errorf("behind %q the server read %q", answer[:12], rest)
			}
		})
	}
}

// held returns how much of what the guest's flows sent is queued.
func (g *guest) held() (n int) {
	g.f.tcp.Mu.Lock()
	defer g.f.tcp.Mu.Unlock()
	for _, fl := range g.f.tcp.Flows {
		fl.Mu.Lock()
		if fl.Ep != nil {
			queued, _ := fl.Ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
			n += queued
		}
		fl.Mu.Unlock()
	}
	return n
}

// TestFieldsThatMakeAnotherRequest refuses them where requests are judged.
func TestFieldsThatMakeAnotherRequest(t *testing.T) {
	if !namespaced(t) {
		return
	}
	for _, field := range []string{"X-Original-URL: /secret", "X_Rewrite_URL: /secret", "x-http-method-override: DELETE", "X-HTTP-Method: DELETE", "X-Method-Override: DELETE", "X-Forwarded-Host: b.example", "Forwarded: host=b.example"} {
		t.Run(field, func(t *testing.T) {
			g := newNamed(t, byRequest, nil)
			s := serveEcho(t, addrA.String()+":8080")
			c := g.mustDial(s.at)
			_ = c.SetDeadline(time.Now().Add(8 * time.Second))
			_, _ = c.Write([]byte("GET /open/1 HTTP/1.1\r\nHost: a.example:8080\r\n" + field + "\r\n\r\n"))
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || res.StatusCode != 403 {
				t.Errorf("%+v, %v", res, err)
				return
			}
			if text, _ := io.ReadAll(res.Body); !strings.Contains(string(text), "X-Original-URL") || !strings.Contains(string(text), `rule "egress[0] api"`) {
				t.Errorf("the refusal says %q", text)
			}
			c.Close()
			if _, n := s.heard(t); n != 0 {
				t.Errorf("the server heard %d bytes", n)
			}
		})
	}
}
