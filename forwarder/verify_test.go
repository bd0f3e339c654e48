package forwarder

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/gatetest"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// Rules by domain reach public addresses only, so these tests give some to the loopback
// of a network namespace of their own:
//
//	guest stack ══ pipe ══ Forwarder ─► lo: 203.0.113.10 (a.example, www.a.example), 203.0.113.11 (b.example),
//	                                        2001:db8::10 (a.example)
var (
	addrA  = netip.MustParseAddr("203.0.113.10")
	addrB  = netip.MustParseAddr("203.0.113.11")
	addrA6 = netip.MustParseAddr("2001:db8::10")
)

const inNamespace = "SLUICE_TEST_IN_NAMESPACE"

// namespaced runs its calling test again in a process whose network namespace has the addresses. It
// reports whether this is that process.
func namespaced(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inNamespace) == t.Name() {
		ip(t, "link", "set", "lo", "up")
		for _, a := range []netip.Addr{addrA, addrB, addrA6} {
			ip(t, "addr", "add", a.String(), "dev", "lo")
		}
		return true
	}
	cmd := exec.Command("unshare", "-n", os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v", "-test.timeout", "55s")
	cmd.Env = append(os.Environ(), inNamespace+"="+t.Name())
	out, err := cmd.CombinedOutput()
	if bytes.Contains(out, []byte("unshare failed")) {
		t.Skipf("SKIP: needs the right to make a network namespace: %s", out)
	}
	if err != nil {
		t.Errorf("in a namespace: %v\n%s", err, out)
	}
	return false
}

const byName = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: names}
spec:
  defaultAction: reject
  egress:
  - {name: a, action: allow, to: [{domain: a.example}, {domain: "*.a.example"}]}
`

// newNamed returns a guest that knows the names' addresses.
func newNamed(t *testing.T, text string, change func(*Config)) *guest {
	t.Helper()
	names := policy.NewNames(policy.NamesConfig{})
	now := time.Now()
	for name, addrs := range map[string][]netip.Addr{"a.example": {addrA, addrA6}, "www.a.example": {addrA}, "b.example": {addrB}} {
		if err := names.Grant(name, addrs, time.Hour, now); err != nil {
			t.Fatal(err)
		}
	}
	return newGuest(t, text, func(c *Config) {
		c.Names = names
		if change != nil {
			change(c)
		}
	})
}

// runningClock is the machine's clock, which can be advanced.
type runningClock struct{ ahead atomic.Int64 }

func (c *runningClock) now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

func (c *runningClock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// server serves connections at an address of the namespace.
type server struct {
	at    netip.AddrPort
	began atomic.Int64 // connections
	over  atomic.Int64
	said  atomic.Int64 // bytes, from the clients of finished echoes
}

func serve(t *testing.T, at string, handle func(*net.TCPConn)) *server {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{at: netip.MustParseAddrPort(l.Addr().String())}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.began.Add(1)
			wg.Go(func() { defer s.over.Add(1); defer c.Close(); handle(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() { l.Close() })
	return s
}

// serveEcho serves echoes, and records what it hears.
func serveEcho(t *testing.T, at string) *server {
	t.Helper()
	first := make(chan *server, 1)
	s := serve(t, at, func(c *net.TCPConn) {
		n, _ := io.Copy(c, c)
		s := <-first
		first <- s
		s.said.Add(n)
	})
	first <- s
	return s
}

// heard waits for all connections made so far to end, and returns how many there were and how many
// bytes their clients sent.
func (s *server) heard(t *testing.T) (connections, bytes int64) {
	t.Helper()
	last, err := net.Dial("tcp", s.at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer last.Close()
	_ = last.SetDeadline(time.Now().Add(8 * time.Second))
	if _, err := last.Write([]byte{0}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(last, make([]byte, 1)); err != nil { // those before it were accepted before it
		t.Fatal(err)
	}
	last.Close()
	testutil.Eventually(t, "the server's connections have ended", func() bool { return s.over.Load() == s.began.Load() })
	return s.began.Load() - 1, s.said.Load() - 1
}

// sendAndRead sends bytes in pieces, and returns what comes back, up to the number sent.
func sendAndRead(c *gonet.TCPConn, b []byte, piece int) ([]byte, error) {
	_ = c.SetDeadline(time.Now().Add(8 * time.Second))
	sent := make(chan error, 1)
	go func() {
		for p := b; len(p) > 0; p = p[min(piece, len(p)):] {
			if _, err := c.Write(p[:min(piece, len(p))]); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	got := make([]byte, len(b))
	n, err := io.ReadFull(c, got)
	if e := <-sent; err == nil {
		err = e
	}
	return got[:n], err
}

func TestFirstBytes(t *testing.T) {
	if !namespaced(t) {
		return
	}
	const get = "GET /x HTTP/1.1\r\nHost: "
	for _, row := range []struct {
		what    string
		to      netip.Addr
		say     []byte
		piece   int
		through bool
		reason  policy.Reason
	}{
		{"the granted name in a ClientHello", addrA, gatetest.ClientHello(t, "a.example"), 1 << 20, true, ""},
		{"over IPv6", addrA6, gatetest.ClientHello(t, "a.example"), 1 << 20, true, ""},
		{"in capital letters", addrA, gatetest.ClientHello(t, "WWW.A.Example"), 1 << 20, true, ""},
		{"in segments of one byte", addrA, gatetest.ClientHello(t, "a.example"), 1, true, ""},
		{"in records of one byte", addrA, gatetest.Records(gatetest.ClientHello(t, "a.example"), 1), 700, true, ""},
		{"another name that is granted for another address", addrA, gatetest.ClientHello(t, "b.example"), 1 << 20, false, policy.ReasonMismatch},
		{"a name of the rule that is granted for another address", addrA6, gatetest.ClientHello(t, "www.a.example"), 1 << 20, false, policy.ReasonMismatch},
		{"a look-alike", addrA, gatetest.ClientHello(t, "evila.example"), 1 << 20, false, policy.ReasonMismatch},
		{"a look-alike behind it", addrA, gatetest.ClientHello(t, "a.example.evil.io"), 1 << 20, false, policy.ReasonMismatch},
		{"no name", addrA, gatetest.ClientHello(t, "203.0.113.10"), 1 << 20, false, policy.ReasonNoName},
		{"something else", addrA, []byte("\x00\x01\x02\x03hello"), 1 << 20, false, policy.ReasonNoName},
		{"a ClientHello without end", addrA, append([]byte{22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc}, make([]byte, 17<<10)...), 1 << 20, false, policy.ReasonTooLong},
		{"a name to an address that is not granted under an allowed one", addrB, gatetest.ClientHello(t, "a.example"), 1 << 20, false, ""},
		{"the name in a request", addrA, []byte(get + "a.example\r\n\r\n"), 1 << 20, true, ""},
		{"the name in a request, byte by byte", addrA, []byte(get + "a.example\r\n\r\n"), 1, true, ""},
		{"the name in a request with prior knowledge", addrA, []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" +
			"\x00\x00\x0e\x01\x05\x00\x00\x00\x01\x82\x84\x86\x01\x09a.example"), 1 << 20, true, ""},
	} {
		t.Run(row.what, func(t *testing.T) {
			var mu sync.Mutex
			var refusals []admit.Refusal
			g := newNamed(t, byName, func(c *Config) {
				c.Refused = func(r admit.Refusal) { mu.Lock(); refusals = append(refusals, r); mu.Unlock() }
			})
			s := serveEcho(t, netip.AddrPortFrom(row.to, 0).String())
			c, err := g.dial(s.at)
			if err == nil {
				defer c.Close()
				var got []byte
				got, err = sendAndRead(c, row.say, row.piece)
				if err == nil && !bytes.Equal(got, row.say) {
					t.Errorf("%d bytes came back, and not those that were sent", len(got))
				}
			}
			if row.through {
				if err != nil {
					t.Fatalf("refused: %v; counters %v", err, g.f.Stats())
				}
				if fl := g.table.List(); len(fl) != 1 || len(fl[0].Names) != 1 || !strings.HasSuffix(fl[0].Names[0], "a.example") || fl[0].Rule != "egress[0] a" {
					t.Errorf("the flow is %+v", fl)
				}
				return
			}
			if !isReset(err) {
				t.Errorf("got %v, want a reset", err)
			}
			testutil.Eventually(t, "the refusal is recorded", func() bool { mu.Lock(); defer mu.Unlock(); return len(refusals) == 1 })
			if v := refusals[0].Verdict; v.Reason() != row.reason {
				t.Errorf("the reason is %q by %q, want %q", v.Reason(), v.Tried(), row.reason)
			}
			testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
			if _, n := s.heard(t); n != 0 {
				t.Errorf("the server heard %d bytes", n)
			}
		})
	}
}

func TestWhoSaysNothingIsRefusedInTheEnd(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var clock runningClock
	g := newNamed(t, byName, func(c *Config) { c.Now = clock.now })
	s := serveEcho(t, addrA.String()+":0")
	silent, half := g.mustDial(s.at), g.mustDial(s.at)
	if _, err := half.Write(gatetest.ClientHello(t, "a.example")[:100]); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "both wait", func() bool {
		g.f.tcp.Checks.Mu.Lock()
		defer g.f.tcp.Checks.Mu.Unlock()
		return g.f.tcp.Checks.Flows.Len() == 2
	})
	clock.advance(firstbytes.CheckTimeout + time.Second)
	for what, c := range map[string]*gonet.TCPConn{"silent": silent, "halfway": half} {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("%s: %v, want a reset", what, err)
		}
	}
	if n := g.f.Stats()["tcp_first_bytes_timeout"]; n != 2 {
		t.Errorf("tcp_first_bytes_timeout is %d", n)
	}
	if _, n := s.heard(t); n != 0 {
		t.Errorf("the server heard %d bytes", n)
	}
}

func TestWhoClosesWithoutAWordLeavesNothing(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byName, nil)
	s := serveEcho(t, addrA.String()+":0")
	for _, how := range []func(*gonet.TCPConn){
		func(c *gonet.TCPConn) { c.Close() },
		func(c *gonet.TCPConn) { _ = c.CloseWrite() },
		func(c *gonet.TCPConn) { _, _ = c.Write([]byte{22, 3}); _ = c.CloseWrite() },
		func(*gonet.TCPConn) { abortGuest(t, g) },
	} {
		how(g.mustDial(s.at))
		testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
	}
	if _, n := s.heard(t); n != 0 {
		t.Errorf("the server heard %d bytes", n)
	}
}

func TestTooManyWhoWaitPushOutTheOldest(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byName, nil)
	s := serveEcho(t, addrA.String()+":0")
	first := g.mustDial(s.at)
	for range firstbytes.MaxChecks {
		c, err := g.dial(s.at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	_ = first.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := first.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("the oldest: %v, want a reset", err)
	}
	if n := g.f.Stats()["tcp_first_bytes_evicted"]; n != 1 {
		t.Errorf("tcp_first_bytes_evicted is %d", n)
	}
}

// TestTheFarSideAnswersFirst makes the sandbox's handshake depend on the far side's.
func TestTheFarSideAnswersFirst(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byName, nil)
	if c, err := g.dial(netip.AddrPortFrom(addrA, 1)); !isReset(err) {
		t.Errorf("a closed port: %v, %v; want a refusal", c, err)
	}
	if n := g.f.Stats()["tcp_dial_refused"]; n != 1 {
		t.Errorf("tcp_dial_refused is %d", n)
	}
	s := serveEcho(t, addrA.String()+":0")
	c := g.mustDial(s.at)
	testutil.Eventually(t, "the far side's handshake is complete", func() bool { return s.began.Load() == 1 })
	if fl := g.table.List(); len(fl) != 1 || fl[0].State != nat.SynRecv {
		t.Errorf("before the first bytes the flow is %+v", fl)
	}
	c.Close()
	if n, said := s.heard(t); n != 1 || said != 0 {
		t.Errorf("of a client that says nothing the server heard %d bytes on %d connections", said, n)
	}
}

// TestTheFarSideMayEndFirst has a server reset a connection before the client has spoken.
func TestTheFarSideMayEndFirst(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byName, nil)
	connected := make(chan struct{})
	s := serve(t, addrA.String()+":0", func(c *net.TCPConn) { <-connected; _ = c.SetLinger(0) })
	c := g.mustDial(s.at)
	close(connected)
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("got %v, want a reset", err)
	}
	testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
}

// TestWhatAServerSaysFirstWaits has a server speak before the client has said which server it
// wants.
func TestWhatAServerSaysFirstWaits(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byName, nil)
	greeted := make(chan struct{}, 2)
	s := serve(t, addrA.String()+":0", func(c *net.TCPConn) {
		_, _ = c.Write([]byte("hello"))
		greeted <- struct{}{}
		_, _ = io.Copy(io.Discard, c)
	})
	for _, row := range []struct{ name, hears string }{{"b.example", ""}, {"a.example", "hello"}} {
		c := g.mustDial(s.at)
		<-greeted
		if _, err := c.Write(gatetest.ClientHello(t, row.name)); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		got := make([]byte, 5)
		if n, _ := io.ReadFull(c, got); string(got[:n]) != row.hears {
			t.Errorf("who wants %s hears %q, want %q", row.name, got[:n], row.hears)
		}
	}
}

func TestAReloadCutsVerifiedFlowsThatLoseTheirRuleOnly(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var clock runningClock
	g := newNamed(t, byName, func(c *Config) { c.Now = clock.now })
	s := serveEcho(t, addrA.String()+":0")
	a, www, waits := g.mustDial(s.at), g.mustDial(s.at), g.mustDial(s.at)
	for c, name := range map[*gonet.TCPConn]string{a: "a.example", www: "www.a.example"} {
		if _, err := sendAndRead(c, gatetest.ClientHello(t, name), 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	clock.advance(2 * time.Hour) // the grants are over, but the flows live
	g.f.SetRules(compile(t, strings.Replace(byName, `, {domain: "*.a.example"}`, "", 1)))
	if _, err := sendAndRead(a, []byte("\x15\x03\x03\x00\x02\x01\x00"), 100); err != nil {
		t.Errorf("the flow that is still allowed: %v", err)
	}
	for what, c := range map[string]*gonet.TCPConn{"whose rule is gone": www, "that has not spoken, and whose grant is over": waits} {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("the flow %s: %v, want a reset", what, err)
		}
	}
}

// A connected client goes on using the address that it knows: for more connections, and for one
// more when the last is lost.
func TestAnAddressIsGrantedWhileAFlowByItIsOpen(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var clock runningClock
	g := newNamed(t, byName, func(c *Config) { c.Now = clock.now })
	s := serve(t, addrA.String()+":0", echo)
	speak := func(name string) (*gonet.TCPConn, error) {
		c, err := g.dial(s.at)
		if err == nil {
			_, err = sendAndRead(c, gatetest.ClientHello(t, name), 1<<20)
		}
		return c, err
	}
	first, err := speak("a.example")
	if err != nil {
		t.Fatal(err)
	}
	clock.advance(2 * time.Hour) // it was granted for an hour
	if _, err := speak("www.a.example"); err == nil {
		t.Error("a name by which no flow is open is still granted")
	}
	second, err := speak("a.example")
	if err != nil {
		t.Fatalf("a second flow, while one is open: %v", err)
	}
	first.Close()
	second.Close()
	testutil.Eventually(t, "the flows end", func() bool { return g.table.Len() == 0 })
	third, err := speak("a.example")
	if err != nil {
		t.Fatalf("right after the flows: %v", err)
	}
	third.Close()
	testutil.Eventually(t, "the flow ends", func() bool { return g.table.Len() == 0 })
	clock.advance(policy.DefaultTTLFloor)
	if _, err := speak("a.example"); err == nil {
		t.Error("long after the last flow the name is still granted")
	}
}
