package forwarder

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice.dev/sluice/forwarder/internal/gatetest"
	"sluice.dev/sluice/internal/testutil"
)

// recorded is a connection that keeps its received bytes.
type recorded struct {
	net.Conn
	mu  *sync.Mutex
	all *bytes.Buffer
}

func (r recorded) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all.Write(p[:n])
	return n, err
}

// tlsServer echoes what it decrypts, and keeps what it received.
type tlsServer struct {
	*server
	mu   sync.Mutex
	all  bytes.Buffer
	over sync.WaitGroup
}

func serveTLS(t *testing.T, cfg *tls.Config) *tlsServer {
	t.Helper()
	cfg = cfg.Clone()
	cfg.Certificates = []tls.Certificate{gatetest.SelfSigned(t)}
	s := new(tlsServer)
	s.server = serve(t, addrA.String()+":0", func(c *net.TCPConn) {
		s.over.Add(1)
		defer s.over.Done()
		far := tls.Server(recorded{c, &s.mu, &s.all}, cfg)
		_, _ = io.Copy(far, far)
		_ = far.CloseWrite()
	})
	return s
}

// received returns what came until the server's side of all connections ended.
func (s *tlsServer) received() []byte {
	s.over.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.all.Bytes())
}

// rewriting is a connection that replaces its client's n-th handshake record.
type rewriting struct {
	net.Conn
	at     int
	record func(hello []byte) []byte
	n      int
	first  []byte // the original
}

func (r *rewriting) Write(p []byte) (int, error) {
	var out []byte
	for rest := p; len(rest) >= 5; {
		size := min(len(rest), 5+int(rest[3])<<8+int(rest[4]))
		one := rest[:size]
		if rest = rest[size:]; one[0] == 22 {
			if r.n++; r.n == 1 {
				r.first = bytes.Clone(one)
			}
			if r.n == r.at {
				one = r.record(bytes.Clone(one))
			}
		}
		out = append(out, one...)
	}
	if _, err := r.Conn.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

// retries makes a server ask clients for another hello if their first has no key of P-256.
func retries(c *tls.Config) *tls.Config {
	c.CurvePreferences = []tls.CurveID{tls.CurveP256}
	return c
}

var retried = &tls.Config{ServerName: "a.example", InsecureSkipVerify: true, CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256}}

// records13 cuts a requested hello into records of one byte.
func records13(hello []byte) []byte {
	return bytes.ReplaceAll(gatetest.Records(hello, 1), []byte{22, 3, 1, 0, 1}, []byte{22, 3, 3, 0, 1})
}

func toB(hello []byte) []byte {
	return bytes.ReplaceAll(hello, []byte("a.example"), []byte("b.example"))
}

// TestAnotherHelloMustSayTheSameName has servers ask for a second hello.
func TestAnotherHelloMustSayTheSameName(t *testing.T) {
	if !namespaced(t) {
		return
	}
	const named = "\x00\x0e\x00\x0c\x00\x00\x09a.example"
	same := func(h []byte) []byte { return h }
	// What the server may get of the handshake: all of it, hellos with the first name, or the first
	// hello.
	const (
		everything = iota
		noOther
		onlyFirst
	)
	for _, row := range []struct {
		what   string
		second func([]byte) []byte
		got    int
	}{
		{"the same name", same, everything},
		{"the same name, in records of one byte", records13, everything},
		{"another name", toB, onlyFirst},
		{"another name, in records of one byte", func(h []byte) []byte { return records13(toB(h)) }, onlyFirst},
		{"no name", func(h []byte) []byte { return bytes.Replace(h, []byte("\x00\x00"+named), []byte("\x5a\x5a"+named), 1) }, onlyFirst},
		{"another name behind early data", func(h []byte) []byte { return append([]byte("\x17\x03\x03\x00\x03abc"), toB(h)...) }, onlyFirst},
		{"another name behind a warning", func(h []byte) []byte { return append([]byte{21, 3, 3, 0, 2, 1, 90}, toB(h)...) }, onlyFirst},
		{"another name behind a key exchange", func(h []byte) []byte { return append([]byte{22, 3, 3, 0, 5, 16, 0, 0, 1, 0}, toB(h)...) }, onlyFirst},
		{"another name behind the first half of the same", func(h []byte) []byte { return append(records13(h)[:60], toB(h)...) }, onlyFirst},
		{"the same name and another behind it", func(h []byte) []byte { return append(bytes.Clone(h), toB(h)...) }, noOther},
	} {
		for _, early := range []bool{false, true} {
			t.Run(row.what+map[bool]string{false: "", true: ", before it was asked for"}[early], func(t *testing.T) {
				g := newNamed(t, byName, nil)
				s := serveTLS(t, retries(new(tls.Config)))
				conn := &rewriting{Conn: g.mustDial(s.at), at: 2, record: row.second}
				if early { // the first hello brings the second along
					conn.at, conn.record = 1, func(h []byte) []byte { return append(bytes.Clone(h), row.second(h)...) }
				}
				_ = conn.SetDeadline(time.Now().Add(8 * time.Second))
				_, err := sendAndReadTLS(tls.Client(conn, retried), []byte("hello"))
				conn.Close()
				// The server has to refuse two hellos at once.
				if want := row.got == everything && !early; (err == nil) != want {
					t.Errorf("the handshake ends with %v; counters %v", err, g.f.Stats())
				}
				got := gatetest.HandshakeOf(s.received())
				if bytes.Contains(got, []byte("b.example")) || row.got == onlyFirst && !bytes.Equal(got, gatetest.HandshakeOf(conn.first)) {
					t.Errorf("the server got %q", got)
				}
				counted := g.f.Stats()["tcp_refused_hello"] + g.f.Stats()["tcp_first_bytes_malformed"]
				if counted != 1 && row.got == onlyFirst && !early || counted != 0 && row.got == everything {
					t.Errorf("it is counted %d times", counted)
				}
			})
		}
	}
}

func sendAndReadTLS(c *tls.Conn, b []byte) ([]byte, error) {
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	got := make([]byte, len(b))
	_, err := io.ReadFull(c, got)
	return got, err
}

// TestHandshakesOfEveryKindGoThrough moves bulk data after each.
func TestHandshakesOfEveryKindGoThrough(t *testing.T) {
	if !namespaced(t) {
		return
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	cert := gatetest.SelfSigned(t)
	for _, row := range []struct {
		what           string
		client, server func(*tls.Config)
	}{
		{"TLS 1.3", func(*tls.Config) {}, func(*tls.Config) {}},
		{"TLS 1.3, asked again", func(c *tls.Config) { c.CurvePreferences = retried.CurvePreferences }, func(c *tls.Config) { retries(c) }},
		{"TLS 1.3 with a client's certificate", func(c *tls.Config) { c.Certificates = []tls.Certificate{cert} }, func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }},
		{"TLS 1.2", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, func(*tls.Config) {}},
		{"TLS 1.2 of the server's", func(*tls.Config) {}, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }},
		{"TLS 1.2 with a client's certificate", func(c *tls.Config) { c.Certificates, c.MaxVersion = []tls.Certificate{cert}, tls.VersionTLS12 }, func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }},
		{"TLS 1.0", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS10 }, func(c *tls.Config) { c.MinVersion = tls.VersionTLS10 }},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newNamed(t, byName, nil)
			far, near := new(tls.Config), &tls.Config{ServerName: "a.example", InsecureSkipVerify: true, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
			row.server(far)
			row.client(near)
			s := serveTLS(t, far)
			for _, again := range []bool{false, true} {
				conn := g.mustDial(s.at)
				_ = conn.SetDeadline(time.Now().Add(8 * time.Second))
				c := tls.Client(conn, near)
				go func() { _, _ = c.Write(data) }()
				got := make([]byte, len(data))
				if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("resuming %v: %v; counters %v", again, err, g.f.Stats())
				}
				if _, ok := near.ClientSessionCache.Get("a.example"); ok && c.ConnectionState().DidResume != again {
					t.Errorf("resuming %v: resumed %v", again, !again)
				}
				c.Close()
			}
		})
	}
}

// TestNothingFollowsAHelloToWhatSpeaksNoTLS has a server answer in plain bytes, like one that takes
// the hello for a line and the next one for STARTTLS.
func TestNothingFollowsAHelloToWhatSpeaksNoTLS(t *testing.T) {
	if !namespaced(t) {
		return
	}
	const alert = "\x15\x03\x01\x00\x02\x02\x46"
	for say, want := range map[string]string{
		alert:                   alert,
		"STARTTLS\r\n":          "",
		"\x17\x03\x03\x00\x01x": "",
		alert + "STARTTLS\r\n":  alert,
		string(gatetest.ClientHello(t, "a.example")): "",
	} {
		t.Run(strings.ToValidUTF8(say[:min(len(say), 12)], "."), func(t *testing.T) {
			g := newNamed(t, byName, nil)
			hello := gatetest.ClientHello(t, "a.example")
			got := make(chan string, 1)
			s := serve(t, addrA.String()+":0", func(c *net.TCPConn) {
				if _, err := io.ReadFull(c, make([]byte, len(hello))); err != nil {
					return
				}
				_, _ = c.Write([]byte("500 what?\r\n"))
				rest, _ := io.ReadAll(c)
				got <- string(rest)
			})
			c := g.mustDial(s.at)
			_ = c.SetDeadline(time.Now().Add(8 * time.Second))
			_, _ = c.Write(hello)
			answer := make([]byte, 11)
			if _, err := io.ReadFull(c, answer); err != nil || string(answer) != "500 what?\r\n" {
				t.Fatalf("%q, %v", answer, err)
			}
			_, _ = c.Write([]byte(say))
			_ = c.CloseWrite()
			if rest := <-got; rest != want && rest != "" {
				t.Errorf("the server read %q, want %q", rest, want)
			}
			if want != say {
				if _, err := c.Read(make([]byte, 1)); !isReset(err) {
					t.Errorf("%v, want a reset", err)
				}
			}
		})
	}
}

// TestAHelloThatWaitsKeepsNothingElseWaiting sends a second hello to a server that never answers,
// and ends the flow with its client.
func TestAHelloThatWaitsKeepsNothingElseWaiting(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byName, nil)
	hello := gatetest.ClientHello(t, "a.example")
	s := serve(t, addrA.String()+":0", func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	c := g.mustDial(s.at)
	_, _ = c.Write(append(bytes.Clone(hello), hello...))
	testutil.Eventually(t, "the second one is held", func() bool { return g.held() == len(hello) })
	abortGuest(t, g)
	testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
}
