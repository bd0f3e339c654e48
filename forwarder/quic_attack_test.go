package forwarder

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	quicgo "github.com/quic-go/quic-go"
	"golang.org/x/net/quic"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"sluice.dev/sluice/internal/testutil"
)

// lossy is a server's socket that loses some datagrams on the way.
type lossy struct {
	net.PacketConn
	mu   sync.Mutex
	lost map[string]bool
	got  int // datagrams that the server received
}

func (l *lossy) lose(p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost[string(p)] = true
}

func (l *lossy) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := l.PacketConn.ReadFrom(b)
		if err != nil {
			return n, from, err
		}
		l.mu.Lock()
		lost := l.lost[string(b[:n])]
		if !lost {
			l.got++
		}
		l.mu.Unlock()
		if !lost {
			return n, from, nil
		}
	}
}

// named is a real QUIC server that records every name that its TLS received.
type named struct {
	*lossy
	at netip.AddrPort

	namesMu sync.Mutex
	names   []string
}

func (s *named) heard(name string) bool {
	s.namesMu.Lock()
	defer s.namesMu.Unlock()
	return slices.Contains(s.names, name)
}

func (s *named) hear(name string) {
	s.namesMu.Lock()
	defer s.namesMu.Unlock()
	s.names = append(s.names, name)
}

// recordingTLS returns the TLS configuration of a server with both names, which records the name
// that it was asked for.
func recordingTLS(t testing.TB, record func(name string)) *tls.Config {
	conf := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"echo", "h3"}}
	for _, name := range []string{"a.example", "b.example"} {
		conf.Certificates = append(conf.Certificates, certificate(t, name))
	}
	conf.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		record(h.ServerName)
		return nil, nil
	}
	return conf
}

// listenQUICGo starts a quic-go server for both versions.
func listenQUICGo(t testing.TB, tr *quicgo.Transport, conf *tls.Config) *quicgo.Listener {
	t.Helper()
	l, err := tr.Listen(conf, &quicgo.Config{Versions: []quicgo.Version{quicgo.Version1, quicgo.Version2}})
	testutil.Must(t, err)
	return l
}

// quicServers holds the real servers: a function starts each on a socket.
var quicServers = []struct {
	name  string
	start func(t *testing.T, s *named)
}{
	{"quic-go", startQUICGo},
	{"x/net", func(t *testing.T, s *named) {
		e, err := quic.NewEndpoint(s.lossy, &quic.Config{TLSConfig: recordingTLS(t, s.hear)})
		testutil.Must(t, err)
		serveQUIC(t, e)
	}},
}

func startQUICGo(t *testing.T, s *named) {
	serveQUICGo(t, &quicgo.Transport{Conn: s.lossy}, recordingTLS(t, s.hear))
}

// serveQUICGo echoes every stream of a quic-go server for both versions, which ends with the test.
func serveQUICGo(t *testing.T, tr *quicgo.Transport, conf *tls.Config) {
	t.Helper()
	l := listenQUICGo(t, tr, conf)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept(context.Background())
			if err != nil {
				return
			}
			wg.Go(func() {
				for {
					stream, err := c.AcceptStream(context.Background())
					if err != nil {
						return
					}
					_, _ = io.Copy(stream, stream)
					stream.Close()
				}
			})
		}
	})
	t.Cleanup(func() {
		testutil.Must(t, tr.Close())
		wg.Wait()
	})
}

func startNamed(t *testing.T, start func(*testing.T, *named)) *named {
	t.Helper()
	pc, err := net.ListenPacket("udp", addrA.String()+":0")
	testutil.Must(t, err)
	s := &named{lossy: &lossy{PacketConn: pc, lost: make(map[string]bool)}}
	s.at = netip.MustParseAddrPort(pc.LocalAddr().String())
	t.Cleanup(func() { pc.Close() })
	start(t, s)
	return s
}

// attacker is a client that sends datagrams of its own making, from ports of its own.
type attacker struct {
	t     *testing.T
	s     *named
	dial  func(port int) net.PacketConn
	ports map[int]net.PacketConn
}

func (a *attacker) port(n int) net.PacketConn {
	if a.ports[n] == nil {
		a.ports[n] = a.dial(n)
		a.t.Cleanup(func() { a.ports[n].Close() })
	}
	return a.ports[n]
}

func (a *attacker) sendFrom(port int, p []byte) {
	_, err := a.port(port).WriteTo(p, net.UDPAddrFromAddrPort(a.s.at))
	testutil.Must(a.t, err)
}

func (a *attacker) send(packets ...[]byte) {
	for _, p := range packets {
		a.sendFrom(0, p)
	}
}

// lose sends a datagram that is lost on the way.
func (a *attacker) lose(p []byte) {
	a.s.lose(p)
	a.send(p)
}

// chosen waits for the connection ID that the server chose, in an answer to a port.
func (a *attacker) chosen(port int) []byte {
	a.t.Helper()
	b := make([]byte, 1500)
	testutil.Must(a.t, a.port(port).SetReadDeadline(time.Now().Add(5*time.Second)))
	for {
		n, _, err := a.port(port).ReadFrom(b)
		testutil.Must(a.t, err)
		if n > 6 && b[0]&0x80 != 0 {
			id := b[6+int(b[5]):]
			return slices.Clone(id[1 : 1+id[0]])
		}
	}
}

// initial returns an Initial packet in a datagram of its own.
func (a *attacker) initial(id []byte, number uint32, frames ...[]byte) []byte {
	return crafted{id: id, number: number, frames: slices.Concat(frames...), size: 1200}.seal()
}

// quicAttacks are ways to make a server hear b.example beside a.example. Directly, each works
// against the listed servers.
var quicAttacks = []struct {
	what  string
	works []string
	try   func(a *attacker)
}{
	{"plainly", []string{"quic-go", "x/net"}, func(a *attacker) {
		a.send(a.initial(craftID(), 0, craftCrypto(0, craftHello(a.t, "b.example"))))
	}},
	{"by an allowed connection's ID, whose own hello is lost", []string{"quic-go", "x/net"}, func(a *attacker) {
		id := craftID()
		a.lose(a.initial(id, 0, craftCrypto(0, craftHello(a.t, "a.example"))))
		a.send(a.initial(id, 1, craftCrypto(0, craftHello(a.t, "b.example"))))
	}},
	{"in halves, the second said twice", []string{"quic-go", "x/net"}, func(a *attacker) {
		one, two := halves(craftHello(a.t, "b.example"))
		id := craftID()
		a.send(a.initial(craftID(), 0, craftCrypto(0, craftHello(a.t, "a.example"))))
		a.send(a.initial(id, 0, craftCrypto(0, one)), a.initial(id, 1, craftCrypto(len(one), two)), a.initial(id, 2, craftCrypto(len(one), two)))
	}},
	{"in halves, sixteen packets between", []string{"quic-go", "x/net"}, func(a *attacker) {
		one, two := halves(craftHello(a.t, "b.example"))
		id := craftID()
		a.send(a.initial(craftID(), 0, craftCrypto(0, craftHello(a.t, "a.example"))))
		a.send(a.initial(id, 0, craftCrypto(0, one)))
		for i := range 17 {
			a.send(a.initial(id, uint32(1+i), []byte{1}))
		}
		a.send(a.initial(id, 20, craftCrypto(len(one), two)), a.initial(id, 21, craftCrypto(len(one), two)))
	}},
	{"in halves, other connections between", []string{"quic-go", "x/net"}, func(a *attacker) {
		one, two := halves(craftHello(a.t, "b.example"))
		id := craftID()
		a.send(a.initial(craftID(), 0, craftCrypto(0, craftHello(a.t, "a.example"))))
		a.send(a.initial(id, 0, craftCrypto(0, one)))
		for range 20 {
			half, _ := halves(craftHello(a.t, "a.example"))
			a.send(a.initial(craftID(), 0, craftCrypto(0, half)))
		}
		a.send(a.initial(id, 1, craftCrypto(len(one), two)))
	}},
	{"put together of two allowed hellos", []string{"quic-go", "x/net"}, func(a *attacker) {
		id := craftID()
		one, two, at := mixed(a.t)
		a.send(a.initial(id, 0, craftCrypto(0, one[:at])))
		a.lose(a.initial(id, 1, craftCrypto(at, one[at:])))
		a.lose(a.initial(id, 2, craftCrypto(0, two[:at])))
		a.send(a.initial(id, 3, craftCrypto(at, two[at:])))
	}},
	{"put together of two allowed hellos from two ports", []string{"quic-go"}, func(a *attacker) {
		id := craftID()
		one, two, at := mixed(a.t)
		a.send(a.initial(id, 0, craftCrypto(0, one[:at])))
		a.lose(a.initial(id, 1, craftCrypto(at, one[at:])))
		lost := a.initial(id, 2, craftCrypto(0, two[:at]))
		a.s.lose(lost)
		a.sendFrom(1, lost)
		a.sendFrom(1, a.initial(id, 3, craftCrypto(at, two[at:])))
	}},
	{"behind a packet of an allowed connection's", []string{"x/net"}, func(a *attacker) {
		// A server that knows the first packet's connection opens the rest with its keys.
		id := craftID()
		one, two := halves(craftHello(a.t, "b.example"))
		a.lose(a.initial(id, 0, craftCrypto(0, craftHello(a.t, "a.example"))))
		a.send(a.initial(id, 1, craftCrypto(0, one)))
		head := slices.Concat(longHead(0xe0, quic1, id, nil), []byte{0x40, 20}, make([]byte, 20))
		a.send(slices.Concat(head, crafted{id: craftID(), keys: id, number: 2, frames: craftCrypto(len(one), two), size: 1200}.seal()))
	}},
	{"behind a packet for nobody", nil, func(a *attacker) {
		head := slices.Concat(longHead(0xe0, quic1, craftID(), nil), []byte{0x40, 20}, make([]byte, 20))
		a.send(a.initial(craftID(), 0, craftCrypto(0, craftHello(a.t, "a.example"))))
		a.send(slices.Concat(head, a.initial(craftID(), 0, craftCrypto(0, craftHello(a.t, "b.example")))))
	}},
	{"in a packet that opens by an allowed connection's keys too", []string{"quic-go", "x/net"}, func(a *attacker) {
		id := craftID()
		a.send(a.initial(id, 0, craftCrypto(0, craftHello(a.t, "a.example"))))
		a.send(sealTwice(a.t, craftID(), id, craftCrypto(0, craftHello(a.t, "b.example"))))
	}},
	{"by the ID that the server chose for an allowed connection", []string{"quic-go", "x/net"}, func(a *attacker) {
		id := craftID()
		whole := craftHello(a.t, "b.example")
		one, two := whole[:1], whole[1:]
		a.lose(a.initial(id, 0, craftCrypto(0, craftHello(a.t, "a.example"))))
		a.send(a.initial(id, 1, craftCrypto(0, one)))
		server := a.chosen(0)
		a.send(crafted{id: server, keys: id, number: 2, frames: craftCrypto(1, two), size: 1200}.seal())
	}},
	{"as version 2 of an allowed connection", []string{"quic-go"}, func(a *attacker) {
		id := craftID()
		a.lose(a.initial(id, 0, craftCrypto(0, craftHello(a.t, "a.example"))))
		a.send(crafted{version: quic2, id: id, number: 1, frames: craftCrypto(0, craftHello(a.t, "b.example")), size: 1200}.seal())
	}},
	{"after bytes that are no QUIC", []string{"quic-go", "x/net"}, func(a *attacker) {
		a.send([]byte("hello"), a.initial(craftID(), 0, craftCrypto(0, craftHello(a.t, "b.example"))))
	}},
}

func halves(b []byte) (one, two []byte) { return b[:len(b)/2], b[len(b)/2:] }

// mixed returns two hellos that both say a.example. The bytes of one before cut and those of the
// other after it say b.example: the name in one is inside padding in the other.
func mixed(t testing.TB) (one, two []byte, cut int) {
	t.Helper()
	body := craftHello(t, "")[4:]
	at := 34 + 1 + int(body[34])
	at += 2 + int(body[at])<<8 + int(body[at+1])
	at += 1 + int(body[at])
	extension := func(typ int, content []byte) []byte {
		return slices.Concat([]byte{byte(typ >> 8), byte(typ), byte(len(content) >> 8), byte(len(content))}, content)
	}
	name := func(n string) []byte {
		return extension(0, append([]byte{0, byte(len(n) + 3), 0, 0, byte(len(n))}, n...))
	}
	build := func(more ...[]byte) []byte {
		exts := append(slices.Clone(body[at+2:]), slices.Concat(more...)...)
		msg := slices.Concat(body[:at], []byte{byte(len(exts) >> 8), byte(len(exts))}, exts)
		return slices.Concat([]byte{1, 0, byte(len(msg) >> 8), byte(len(msg))}, msg)
	}
	padding := extension(21, make([]byte, 100))
	a, b := name("a.example"), name("b.example")
	one = build(extension(0x7a7a, make([]byte, len(a))), a, padding)
	two = build(a, extension(0x7b7b, slices.Concat(b, padding)))
	return one, two, len(one) - len(a) - len(padding)
}

// TestNoAttackHasAServerHearARefusedName makes each attack directly, to prove that it is one, and
// then from the sandbox.
func TestNoAttackHasAServerHearARefusedName(t *testing.T) {
	if !namespaced(t) {
		return
	}
	for _, server := range quicServers {
		for _, row := range quicAttacks {
			t.Run(server.name+" "+row.what, func(t *testing.T) {
				if slices.Contains(row.works, server.name) {
					s := startNamed(t, server.start)
					row.try(&attacker{t: t, s: s, ports: make(map[int]net.PacketConn), dial: func(int) net.PacketConn {
						pc, err := net.ListenPacket("udp", addrB.String()+":0")
						testutil.Must(t, err)
						return pc
					}})
					testutil.Eventually(t, "the attack works where nothing is in its way", func() bool { return s.heard("b.example") })
				}
				g := newNamed(t, byName, nil)
				s := startNamed(t, server.start)
				row.try(&attacker{t: t, s: s, ports: make(map[int]net.PacketConn), dial: func(int) net.PacketConn {
					pc, err := gonet.DialUDP(g.stack, nil, nil, ipv4.ProtocolNumber)
					testutil.Must(t, err)
					return pc
				}})
				// What is said afterwards arrives afterwards.
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				if err := g.quicEcho(ctx, s.at, "a.example", nil); err != nil {
					t.Errorf("an ordinary client: %v", err)
				}
				if s.heard("b.example") || !s.heard("a.example") {
					t.Errorf("the server heard b.example: %v, a.example: %v", s.heard("b.example"), s.heard("a.example"))
				}
			})
		}
	}
}
