package dns

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

// A hundred thousand forged answers race true ones: none is believed, and none keeps a true one
// out. The forgers know everything but one thing.

const (
	forgedAddr = "203.0.113.66"
	trueAddr   = "198.51.100.1"
)

func answerWith(addr string) func([]byte) [][]byte {
	return respond(func(q, a *dns.Msg) { a.Answer = []dns.RR{rr(q.Question[0].Name + " 60 A " + addr)} })
}

// wantTrue asks for pypi.test and expects the true answer, and no other address granted.
func (g *gate) wantTrue(t *testing.T) {
	t.Helper()
	g.forget()
	a := unpack(t, packet(g.Resolver, ask(t, "pypi.test", dns.TypeA)))
	if len(a.Answer) != 1 || a.Answer[0].(*dns.A).A.String() != trueAddr {
		t.Fatalf("got %v", a)
	}
	if g.granted("pypi.test", forgedAddr) {
		t.Fatal("a forged address is granted")
	}
}

// From the upstream's own address and port, to the right port: a forger on the path who does not
// see the question, or sees only another.
func TestForgedAnswersFromTheUpstreamsAddress(t *testing.T) {
	const each, rounds = 60, 1000
	forgeries := []func(b []byte, i int){
		func(b []byte, i int) { put16(b, 0, be16(b, 0)+1+uint16(i)) },                             // any ID but the right one
		func(b []byte, i int) { b[headerLen+1+i%4] = 'a' + (lower(b[headerLen+1+i%4])-'a'+1)%26 }, // another name
		func(b []byte, i int) { b[headerLen+len("\x04pypi\x04test\x00")+1] = typeAAAA },           // another type
		func(b []byte, i int) { b[headerLen+len("\x04pypi\x04test\x00")+3] = 3 },                  // another class
		func(b []byte, i int) { b[2] &^= 0x80 },                                                   // not a response
		func(b []byte, i int) { b[2] |= 0x08 },                                                    // another kind of message
		func(b []byte, i int) { put16(b, 4, 2) },                                                  // two questions
	}
	up := func(q []byte) [][]byte {
		var out [][]byte
		for i := range each {
			b := bytes.Clone(answerWith(forgedAddr)(q)[0])
			forgeries[i%len(forgeries)](b, i)
			out = append(out, b)
		}
		return append(out, answerWith(trueAddr)(q)...)
	}
	g := newGate(t, gatedPolicy+"  limits: {dnsQueriesPerSecond: 1000000}\n", up)
	for range rounds {
		g.wantTrue(t)
	}
	if n := g.Stats().UpstreamIgnored; n != each*rounds {
		t.Errorf("%d forged answers were ignored, not %d", n, each*rounds)
	}
}

// Everything is right except the case of the name's letters: the question is asked again where
// nobody can forge.
func TestForgedAnswersInOtherLetters(t *testing.T) {
	g := newGate(t, gatedPolicy+"  limits: {dnsQueriesPerSecond: 1000000}\n", nil, func(c *Config) {
		c.Dialer = &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {
			udp: func(q []byte) [][]byte {
				forged := answerWith(forgedAddr)(q)[0]
				forged[headerLen+1] ^= 0x20
				return [][]byte{forged}
			},
			tcp: answerWith(trueAddr),
		}}}
	})
	for range 1000 {
		g.wantTrue(t)
	}
	if n := g.Stats().UpstreamFolded; n != 1000 {
		t.Errorf("%d of 1000 were told by their letters", n)
	}
}

// From elsewhere, with the right question, ID and port: the kernel keeps them out.
func TestForgedAnswersFromElsewhere(t *testing.T) {
	listen := func(addr string) *net.UDPConn {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	upstream := listen("127.0.0.1:0")
	port := upstream.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	forgers := []*net.UDPConn{listen("127.0.0.1:0"), listen(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 2}), port).String())}
	done := make(chan struct{})
	// Ends with upstream, which the test closes.
	go func() {
		defer close(done)
		buf := make([]byte, maxMessage)
		for {
			n, from, err := upstream.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			forged := answerWith(forgedAddr)(buf[:n])[0]
			for i := range 40_000 {
				forgers[i%len(forgers)].WriteToUDPAddrPort(forged, from)
			}
			upstream.WriteToUDPAddrPort(answerWith(trueAddr)(buf[:n])[0], from)
		}
	}()
	g := newGate(t, gatedPolicy, nil, func(c *Config) {
		c.Dialer = hostDialer{}
		c.Upstreams = Upstreams{Servers: []netip.AddrPort{upstream.LocalAddr().(*net.UDPAddr).AddrPort()}, Timeout: 20 * time.Second}
	})
	g.wantTrue(t)
	if s := g.Stats(); s.UpstreamIgnored != 0 || s.UpstreamTries != 1 {
		t.Errorf("%+v", s)
	}
	upstream.Close()
	<-done
}

// Whatever an upstream answers, the sandbox gets only the chain from the question and its records,
// no closed address, and no address that is not granted.
func FuzzSift(f *testing.F) {
	for _, records := range [][]string{
		{"an pypi.test. 60 A 198.51.100.1"}, {"an pypi.test. 60 CNAME a.test.", "an a.test. 60 AAAA ::ffff:127.0.0.1"},
		{`an pypi.test. 60 HTTPS 1 . mandatory="alpn" alpn="h2" ipv4hint="198.51.100.9"`}, {"ns test. 60 SOA a. b. 1 2 3 4 5"},
	} {
		b := says(records...)(ask(f, "pypi.test", dns.TypeA))[0]
		f.Add(b[headerLen+15:], byte(len(records)), byte(0), dns.TypeA)
	}
	rules := compile(f, gatedPolicy)
	f.Fuzz(func(t *testing.T, tail []byte, answers, authorities byte, qtype uint16) {
		q := ask(t, "pypi.test", qtype)
		q[2] |= 0x80
		q[7], q[9] = answers, authorities
		qy, code := parseQuery(ask(t, "pypi.test", qtype))
		if code != rcodeSuccess {
			return
		}
		qy.asked = q[:qy.q.end]
		s, err := sift(append(q, tail...), qy.q, siftRules{
			admit:  func(a netip.Addr) bool { return rules.Grantable("pypi.test", a) },
			maxTTL: policy.DefaultTTLCap,
		})
		if err != nil {
			return
		}
		out, err := s.message(qy.q)
		if err != nil {
			return // an answer that cannot be written is not passed on
		}
		m := new(dns.Msg)
		if err := m.Unpack(out); err != nil {
			t.Fatalf("unreadable: %v (%x)", err, out)
		}
		owner := "pypi.test."
		for _, r := range m.Answer {
			if !dns.IsFqdn(owner) || r.Header().Name != owner {
				t.Fatalf("a record of %q where %q was due: %v", r.Header().Name, owner, m)
			}
			if c, ok := r.(*dns.CNAME); ok && qtype != dns.TypeCNAME {
				owner = c.Target
			}
			if a, ok := r.(*dns.AAAA); ok && !rules.Grantable("pypi.test", netip.AddrFrom16([16]byte(a.AAAA.To16()))) {
				t.Fatalf("a closed address: %v", m)
			}
		}
		if len(s.addrs) != len(m.Answer)-len(s.aliases) && (qtype == dns.TypeA || qtype == dns.TypeAAAA) {
			t.Fatalf("%d addresses would be granted: %v", len(s.addrs), m)
		}
	})
}
