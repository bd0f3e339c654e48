package forwarder

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	quicgo "github.com/quic-go/quic-go"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/datagram"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
)

// quicGoEcho connects as an ordinary quic-go client does, and has a few bytes echoed.
func quicGoEcho(ctx context.Context, pc net.PacketConn, to netip.AddrPort, name string, version quicgo.Version, protocols []string) error {
	tr := &quicgo.Transport{Conn: pc}
	defer tr.Close()
	conf := &tls.Config{ServerName: name, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: append(protocols, "echo")}
	c, err := tr.Dial(ctx, net.UDPAddrFromAddrPort(to), conf, &quicgo.Config{Versions: []quicgo.Version{version}})
	if err != nil {
		return err
	}
	defer c.CloseWithError(0, "")
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		return err
	}
	return echoed(s, func() { _ = s.Close() })
}

func TestOrdinaryQUICClientsNoticeNothing(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var long []string // makes a ClientHello of several datagrams
	for i := range 40 {
		long = append(long, fmt.Sprintf("%0100d", i))
	}
	for _, row := range []struct {
		what      string
		version   quicgo.Version
		protocols []string
		retry     bool
	}{
		{"of version 1", quicgo.Version1, nil, false},
		{"of version 2", quicgo.Version2, nil, false},
		{"of version 1, by a large hello", quicgo.Version1, long, false},
		{"of version 2, by a large hello, after a Retry", quicgo.Version2, long, true},
		{"of version 1, after a Retry", quicgo.Version1, nil, true},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newNamed(t, byName, nil)
			s := startNamed(t, func(t *testing.T, s *named) {
				tr := &quicgo.Transport{Conn: s.lossy, VerifySourceAddress: func(net.Addr) bool { return row.retry }}
				serveQUICGo(t, tr, recordingTLS(t, s.hear))
			})
			pc, err := gonet.DialUDP(g.stack, nil, nil, ipv4.ProtocolNumber)
			testutil.Must(t, err)
			defer pc.Close()
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if err := quicGoEcho(ctx, pc, s.at, "a.example", row.version, row.protocols); err != nil {
				t.Errorf("%v; counters %v", err, g.f.Stats())
			}
			for _, name := range []string{"udp_first_bytes_malformed", "udp_quic_full", "udp_quic_foreign", "udp_refused"} {
				if n := g.f.Stats()[name]; n != 0 {
					t.Errorf("%s is %d", name, n)
				}
			}
		})
	}
}

// TestAReloadAsksAboutEveryNameOfATuple has two connections of one socket, each with its own name.
func TestAReloadAsksAboutEveryNameOfATuple(t *testing.T) {
	if !namespaced(t) {
		return
	}
	for _, row := range []struct {
		what, rule string
		stays      bool
	}{
		{"both names stay allowed", `to: [{domain: "**.a.example"}, {domain: a.example}]`, true},
		{"the first name is refused", `to: [{domain: "*.a.example"}]`, false},
		{"the second name is refused", "to: [{domain: a.example}]", false},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newNamed(t, byName, nil)
			s := quicServer(t, addrA.String()+":0", nil)
			e, closeAll := g.quicEndpoint()
			defer closeAll()
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			for _, name := range []string{"a.example", "www.a.example"} {
				testutil.Must(t, quicEcho(ctx, e, s.LocalAddr(), name, nil))
			}
			flows := g.table.List()
			if len(flows) != 1 || !slices.Contains(flows[0].Names, "a.example") || !slices.Contains(flows[0].Names, "www.a.example") {
				t.Fatalf("flows %+v, want one of both names", flows)
			}
			if about := flows[0].About.(admit.About); about.Seen.Name != "www.a.example" {
				t.Errorf("the flow is said to say %q", about.Seen.Name)
			}
			g.f.SetRules(compile(t, strings.Replace(byName, `to: [{domain: a.example}, {domain: "*.a.example"}]`, row.rule, 1)))
			if n := g.table.Len(); (n == 1) != row.stays {
				t.Errorf("%d flows after the reload", n)
			}
			if row.stays {
				testutil.Must(t, quicEcho(ctx, e, s.LocalAddr(), "a.example", nil))
				return
			}
			// No other name may continue what its connections were once allowed.
			short, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			for _, name := range []string{"a.example", "www.a.example"} {
				if err := quicEcho(short, e, s.LocalAddr(), name, nil); err == nil {
					t.Errorf("the tuple goes on as %s", name)
				}
			}
		})
	}
}

// TestQUICWaitsForItsHello sends what must not reach a server before its connection is judged.
func TestQUICWaitsForItsHello(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var clock runningClock
	g := newNamed(t, byName, func(c *Config) { c.Now = clock.now })
	s := startNamed(t, func(*testing.T, *named) {}) // only this test reads from it
	pc, err := gonet.DialUDP(g.stack, nil, nil, ipv4.ProtocolNumber)
	testutil.Must(t, err)
	defer pc.Close()
	send := func(packets ...[]byte) {
		for _, p := range packets {
			_, err := pc.WriteTo(p, net.UDPAddrFromAddrPort(s.at))
			testutil.Must(t, err)
		}
	}
	b := make([]byte, 1500)
	arrives := func(what string, want ...[]byte) {
		t.Helper()
		for _, w := range want {
			testutil.Must(t, s.SetReadDeadline(time.Now().Add(5*time.Second)))
			n, _, err := s.ReadFrom(b)
			if err != nil || string(b[:n]) != string(w) {
				t.Fatalf("%s: %d bytes, %v, want %d", what, n, err, len(w))
			}
		}
	}
	initial := func(id []byte, number uint32, frames []byte) []byte {
		return crafted{id: id, number: number, frames: frames, size: 1200}.seal()
	}
	early := func(id []byte) []byte {
		return slices.Concat(longHead(0xd0, quic1, id, nil), []byte{0x40, 40}, make([]byte, 40))
	}
	hello, evil := craftHello(t, "a.example"), craftHello(t, "b.example")
	one, two := halves(hello)
	a, second, refused := craftID(), craftID(), craftID()

	first := [][]byte{initial(a, 0, craftCrypto(0, one)), early(a), initial(a, 1, craftCrypto(len(one), two))}
	send([]byte{0x40, 1, 2, 3}, early(a)) // of no connection yet
	send(first...)
	arrives("a hello in halves, with early data between", first...)

	probe := []byte{0x40, 9}
	next := [][]byte{initial(second, 0, craftCrypto(0, one)), early(second)}
	send(next...)
	send(early(craftID()), initial(refused, 0, craftCrypto(0, evil)), early(refused), probe)
	arrives("nothing of a half, an unknown and a refused connection", probe)
	last := initial(second, 1, craftCrypto(len(one), two))
	send(last)
	arrives("the half when it is whole", append(next, last)...)

	// Part of a second hello waits for the rest, which must say the same name.
	again := initial(a, 2, craftCrypto(len(hello), one))
	send(again, probe)
	arrives("nothing of a half of a second hello", probe)
	rest := initial(a, 3, craftCrypto(len(hello)+len(one), two))
	send(rest)
	arrives("the second hello", again, rest)
	send(initial(second, 4, craftCrypto(len(hello), evil)), initial(second, 5, []byte{1}), probe)
	arrives("nothing of a connection whose second hello says another name", probe)

	// Data beyond what may be held is refused; what is held stays.
	third := craftID()
	half := initial(third, 0, craftCrypto(0, one))
	send(half)
	for i := range datagram.MaxHeldPackets {
		send(initial(third, uint32(i+1), []byte{1}))
	}
	done := initial(third, 40, craftCrypto(len(one), two))
	send(done)
	arrives("the first of what was held", half)
	if n := g.f.Stats()["udp_quic_full"]; n != 1 {
		t.Errorf("udp_quic_full is %d", n)
	}
}

// TestQUICConnectionsAreBounded fills a tuple with connections. The old ones stay.
func TestQUICConnectionsAreBounded(t *testing.T) {
	clock := newTestClock()
	names := policy.NewNames(policy.NamesConfig{})
	testutil.Must(t, names.Grant("a.example", []netip.Addr{addrA}, time.Hour, clock.now()))
	w := newWire(t, byName, func(c *Config) { c.Names, c.Now = names, clock.now })
	g := datagram.NewQUICGate(w.f.gate, &w.f.stats, &w.f.timer)
	s := &script{t: t, gate: g, flow: new(datagram.Flow), bench: &bench{}}
	hello, evil := craftHello(t, "a.example"), craftHello(t, "b.example")
	try := func(id []byte, number uint32, hello []byte) bool {
		s.datagram = crafted{id: id, number: number, frames: craftCrypto(0, hello), size: 1200}.seal()
		s.send(0, true)
		return strings.Contains(s.log[len(s.log)-1], "passes true")
	}
	refused := craftID()
	if try(refused, 0, evil) {
		t.Fatal("a refused name passed")
	}
	first := craftID()
	for i := range datagram.MaxTupleConns - 1 {
		id := first
		if i > 0 {
			id = craftID()
		}
		if !try(id, 0, hello) {
			t.Fatalf("connection %d was refused", i)
		}
	}
	if try(craftID(), 0, hello) {
		t.Error("one more than there may be passed")
	}
	if try(refused, 1, hello) {
		t.Error("a refused connection was forgotten")
	}
	if try(first, 1, evil) || try(first, 2, hello) {
		t.Error("the first connection said another name and passed")
	}
	clock.advance(datagram.QUICQuiet)
	if !try(craftID(), 0, hello) {
		t.Error("connections that are quiet for long made no room")
	}
	g.Mu.Lock()
	defer g.Mu.Unlock()
	qt := s.tuples[0]
	if len(qt.Conns) != 1 || g.Conns != 1 || len(qt.Ids) != 1 || len(g.Owners) != 1 || g.Bytes != len(hello) {
		t.Errorf("%d connections, %d in all, %d and %d IDs, %d bytes", len(qt.Conns), g.Conns, len(qt.Ids), len(g.Owners), g.Bytes)
	}
	qt.Flow = nil
	g.Rest(qt)
	clock.advance(datagram.QUICLinger + time.Second)
	g.Sweep(clock.now())
	if len(g.Tuples) != 0 || g.Conns != 0 || g.Bytes != 0 || len(g.Owners) != 0 || g.Idle.Len() != 0 {
		t.Errorf("%d tuples, %d connections, %d bytes, %d IDs, %d at rest after the time was over", len(g.Tuples), g.Conns, g.Bytes, len(g.Owners), g.Idle.Len())
	}
}
