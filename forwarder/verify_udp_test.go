package forwarder

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/quic"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
)

// certificate returns the certificate of a server of that name, which no client has to trust.
func certificate(t testing.TB, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// quicServer echoes every stream, at an address of the namespace.
func quicServer(t *testing.T, at string, change func(*quic.Config)) *quic.Endpoint {
	t.Helper()
	cfg := &quic.Config{TLSConfig: &tls.Config{
		Certificates: []tls.Certificate{certificate(t, "a.example")}, MinVersion: tls.VersionTLS13, NextProtos: []string{"echo"},
	}}
	if change != nil {
		change(cfg)
	}
	e, err := quic.Listen("udp", at, cfg)
	if err != nil {
		t.Fatal(err)
	}
	serveQUIC(t, e)
	return e
}

// serveQUIC echoes every stream of an endpoint, which ends with the test.
func serveQUIC(t *testing.T, e *quic.Endpoint) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := e.Accept(ctx)
			if err != nil {
				return
			}
			wg.Go(func() {
				for {
					s, err := c.AcceptStream(ctx)
					if err != nil {
						return
					}
					_, _ = io.Copy(s, s)
					s.Close()
				}
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		closed, stop := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer stop()
		_ = e.Close(closed)
		wg.Wait()
	})
}

// quicEcho connects from the guest, as name, and has a few bytes echoed.
func (g *guest) quicEcho(ctx context.Context, to netip.AddrPort, name string, protocols []string) error {
	e, closeAll := g.quicEndpoint()
	defer closeAll()
	return quicEcho(ctx, e, to, name, protocols)
}

func (g *guest) quicEndpoint() (*quic.Endpoint, func()) {
	g.t.Helper()
	pc, err := gonet.DialUDP(g.stack, nil, nil, ipv4.ProtocolNumber)
	if err != nil {
		g.t.Fatal(err)
	}
	e, err := quic.NewEndpoint(pc, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	return e, func() {
		closed, stop := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer stop()
		_ = e.Close(closed)
	}
}

func quicEcho(ctx context.Context, e *quic.Endpoint, to netip.AddrPort, name string, protocols []string) error {
	c, err := e.Dial(ctx, "udp", to.String(), &quic.Config{TLSConfig: &tls.Config{
		ServerName: name, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: append(protocols, "echo"),
	}})
	if err != nil {
		return err
	}
	s, err := c.NewStream(ctx)
	if err != nil {
		return err
	}
	return echoed(s, s.CloseWrite)
}

// echoed has a few bytes echoed on a stream, whose sending side end closes.
func echoed(s io.ReadWriter, end func()) error {
	if _, err := s.Write([]byte("hello")); err != nil {
		return err
	}
	end()
	got, err := io.ReadAll(s)
	if err == nil && string(got) != "hello" {
		err = fmt.Errorf("%q came back", got)
	}
	return err
}

func TestQUICByName(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var long []string // makes a ClientHello of several datagrams
	for i := range 40 {
		long = append(long, fmt.Sprintf("%0100d", i))
	}
	for _, row := range []struct {
		what, policy, name string
		protocols          []string
		retry              bool
		reason             policy.Reason
		through            bool
	}{
		{"the granted name", byName, "a.example", nil, false, "", true},
		{"in several datagrams", byName, "a.example", long, false, "", true},
		{"to a server that wants to know the address first", byName, "a.example", long, true, "", true},
		{"another name", byName, "b.example", nil, false, policy.ReasonMismatch, false},
		{"another name in several datagrams", byName, "b.example", long, false, policy.ReasonMismatch, false},
		{"no name", byName, "", nil, false, policy.ReasonNoName, false},
		{"a rule that wants TCP", quicRefused, "a.example", nil, false, policy.ReasonQUIC, false},
	} {
		t.Run(row.what, func(t *testing.T) {
			var mu sync.Mutex
			var refusals []admit.Refusal
			g := newNamed(t, row.policy, func(c *Config) {
				c.Refused = func(r admit.Refusal) { mu.Lock(); refusals = append(refusals, r); mu.Unlock() }
			})
			e := quicServer(t, addrA.String()+":0", func(c *quic.Config) { c.RequireAddressValidation = row.retry })
			timeout := 5 * time.Second
			if !row.through {
				timeout = 300 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(context.Background(), timeout)
			defer cancel()
			err := g.quicEcho(ctx, e.LocalAddr(), row.name, row.protocols)
			if row.through {
				if err != nil {
					t.Fatalf("refused: %v; counters %v", err, g.f.Stats())
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if err == nil || len(refusals) == 0 || refusals[0].Verdict.Reason() != row.reason {
				t.Errorf("%v, refusals %+v, want reason %q", err, refusals, row.reason)
			}
			if n := g.f.dialer.Sockets.Load(); n != 0 || g.table.Len() != 0 {
				t.Errorf("%d sockets, %d flows", n, g.table.Len())
			}
		})
	}
}

// TestEachQUICConnectionOfATupleIsJudged dials twice from one socket.
func TestEachQUICConnectionOfATupleIsJudged(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var mu sync.Mutex
	var refusals []admit.Refusal
	g := newNamed(t, byName, func(c *Config) {
		c.Refused = func(r admit.Refusal) { mu.Lock(); refusals = append(refusals, r); mu.Unlock() }
	})
	s := quicServer(t, addrA.String()+":0", nil)
	e, closeAll := g.quicEndpoint()
	defer closeAll()
	for _, row := range []struct {
		name    string
		through bool
	}{{"a.example", true}, {"b.example", false}, {"www.a.example", true}} {
		timeout := 5 * time.Second
		if !row.through {
			timeout = 300 * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		if err := quicEcho(ctx, e, s.LocalAddr(), row.name, nil); (err == nil) != row.through {
			t.Errorf("as %s: %v", row.name, err)
		}
		cancel()
	}
	mu.Lock()
	defer mu.Unlock()
	if len(refusals) == 0 || refusals[0].Seen.Name != "b.example" || refusals[0].Verdict.Reason() != policy.ReasonMismatch {
		t.Errorf("refusals %+v", refusals)
	}
	if n := g.table.Len(); n != 1 {
		t.Errorf("%d flows, want 1", n)
	}
}

const quicRefused = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: names}
spec:
  defaultAction: reject
  egress:
  - {name: a, action: allow, to: [{domain: a.example}], quic: refuse}
`

func TestDatagramsThatSayNoNameAreRefused(t *testing.T) {
	if !namespaced(t) {
		return
	}
	s := udpServer(t, addrA.String()+":0")
	w := newWire(t, byName, func(c *Config) {
		c.Names = policy.NewNames(policy.NamesConfig{})
		if err := c.Names.Grant("a.example", []netip.Addr{addrA}, time.Hour, time.Now()); err != nil {
			t.Fatal(err)
		}
	})
	w.send(udpPacket(netip.AddrPortFrom(guest4, 4000), netip.AddrPortFrom(addrA, portOf(s)), []byte("hello")))
	w.wantError("a datagram without a name", 3, 3, gateway4)
	if w.table.Len() != 0 || w.f.dialer.Sockets.Load() != 0 {
		t.Error("it left a flow or a socket")
	}
}

// TestHalfHellosAreDropped sends Initial packets that are never complete.
func TestHalfHellosAreDropped(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var clock runningClock
	g := newNamed(t, byName, func(c *Config) { c.Now = clock.now })
	for range 3 {
		first := firstDatagram(t)
		pc, err := gonet.DialUDP(g.stack, nil, nil, ipv4.ProtocolNumber)
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		for range 2 { // half remains half if it is sent twice
			if _, err := pc.WriteTo(first, &net.UDPAddr{IP: addrA.AsSlice(), Port: 443}); err != nil {
				t.Fatal(err)
			}
		}
	}
	held := func() int {
		gate := g.f.dgram.UDP.QUIC
		gate.Mu.Lock()
		defer gate.Mu.Unlock()
		n := 0
		for _, qt := range gate.Tuples {
			if len(qt.Held) > 0 {
				n++
			}
		}
		return n
	}
	testutil.Eventually(t, "they are held", func() bool { return held() == 3 })
	clock.advance(firstbytes.CheckTimeout + time.Second)
	testutil.Eventually(t, "they are given up", func() bool { return held() == 0 })
	if n := g.f.Stats()["udp_first_bytes_timeout"]; n != 3 {
		t.Errorf("udp_first_bytes_timeout is %d", n)
	}
}

// firstDatagram returns the first of several datagrams that carry a ClientHello.
func firstDatagram(t *testing.T) []byte {
	t.Helper()
	s := udpServer(t, "127.0.0.1:0")
	e, err := quic.Listen("udp", "127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		var long []string
		for i := range 40 {
			long = append(long, fmt.Sprintf("%0100d", i))
		}
		_, _ = e.Dial(ctx, "udp", s.LocalAddr().String(), &quic.Config{TLSConfig: &tls.Config{
			ServerName: "a.example", MinVersion: tls.VersionTLS13, NextProtos: long,
		}})
	}()
	b, _ := read(t, s)
	cancel()
	<-done
	_ = e.Close(ctx)
	return b
}
