package dns

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// Servers such as unbound compress names in record data to pointers to the question, which is in
// our mixed case.
func TestOurLettersDoNotComeBack(t *testing.T) {
	up := respond(func(q, a *dns.Msg) {
		asked := q.Question[0].Name // in the case that we mixed
		parent := asked[strings.IndexByte(asked, '.')+1:]
		add := func(s string) { a.Answer = append(a.Answer, rr(asked+" 60 "+s)) }
		switch q.Question[0].Qtype {
		case dns.TypeMX:
			add("MX 10 Mail." + asked)
			add("MX 20 Mx." + parent)
			add("MX 30 Mail.Other.example.")
		case dns.TypeSRV:
			add("SRV 1 2 3 Node0." + parent)
		case dns.TypeNS:
			add("NS " + asked)
		case dns.TypePTR:
			add("PTR Host." + parent)
		case dns.TypeHTTPS:
			add("HTTPS 1 " + asked + ` alpn="h2"`)
		case dns.TypeSOA:
			add("SOA Ns." + asked + " Admin." + parent + " 1 2 3 4 5")
		default:
			a.Ns = append(a.Ns, rr(parent+" 60 SOA ns."+parent+" admin."+asked+" 1 2 3 4 5"))
		}
	})
	// A name so long that mixing certainly changes it.
	const zone = "a-zone-of-many-letters.test."
	asked := "db." + zone
	g := newGate(t, strings.Replace(gatedPolicy, "*.files.test", "**.test", 1)+"  dns: {types: [A, MX, SRV, NS, PTR, HTTPS, SOA]}\n", up)
	for _, row := range []struct {
		qtype uint16
		want  []string
	}{
		{dns.TypeMX, []string{"10 Mail.db." + zone, "20 Mx." + zone, "30 Mail.Other.example."}},
		{dns.TypeSRV, []string{"1 2 3 Node0." + zone}},
		{dns.TypeNS, []string{asked}},
		{dns.TypePTR, []string{"Host." + zone}},
		{dns.TypeHTTPS, []string{"1 " + asked + ` alpn="h2"`}},
		{dns.TypeSOA, []string{"Ns." + asked + " Admin." + zone + " 1 2 3 4 5"}},
		{dns.TypeA, []string{"ns." + zone + " admin." + asked + " 1 2 3 4 5"}}, // of the authority section
	} {
		for _, how := range []string{"from upstream", "from the cache"} {
			m := unpack(t, packet(g.Resolver, ask(t, asked, row.qtype)))
			var got []string
			for _, r := range append(m.Answer, m.Ns...) {
				got = append(got, strings.TrimPrefix(r.String(), r.Header().String()))
			}
			if strings.Join(got, "; ") != strings.Join(row.want, "; ") {
				t.Errorf("%s %s: got %q, want %q", dns.TypeToString[row.qtype], how, got, row.want)
			}
		}
	}
}

// A home router that folds case and has no TCP.
func TestAServerThatFoldsLettersAndHasNoTCPIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen []string
		folds := true
		up := func(q []byte) [][]byte {
			m := unpack(t, q)
			seen = append(seen, m.Question[0].Name)
			b := says("an pypi.test. 1 A 198.51.100.1")(q)[0]
			if q, _ := readQuestion(b); folds {
				copy(b[headerLen:], q.name)
			}
			return [][]byte{b}
		}
		var log bytes.Buffer
		g := newGate(t, gatedPolicy, nil, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
		g.net.servers[server(1)] = &fakeServer{udp: up} // TCP is silent
		tell := func() {
			t.Helper()
			g.forget()
			if m := unpack(t, packet(g.Resolver, ask(t, "pypi.test", dns.TypeA))); len(m.Answer) != 1 {
				t.Fatalf("got %v", m)
			}
		}
		mixed := func(s string) bool { return s != strings.ToLower(s) }
		for !folds || len(seen) < 2 { // until the mixed letters included some to fold
			seen = nil
			g.set.Store(newServerSet(upstreams(1)))
			tell()
		}
		if !mixed(seen[0]) || mixed(seen[1]) || len(seen) != 2 {
			t.Errorf("it was asked %q", seen)
		}
		if n := strings.Count(log.String(), "small letters"); n == 0 {
			t.Errorf("nothing is said of it: %s", log.String())
		}
		log.Reset()
		seen, g.net.dials = nil, nil
		for range 20 {
			tell()
		}
		if mixed(strings.Join(seen, "")) || strings.Contains(strings.Join(g.net.dialled(), " "), "tcp") || log.Len() > 0 {
			t.Errorf("once it is known: asked %q, dialled %q, said %q", seen, g.net.dialled(), log.String())
		}
		time.Sleep(foldedFor)
		folds, seen = false, nil
		for range 20 {
			tell()
		}
		if !mixed(strings.Join(seen, "")) {
			t.Errorf("an hour later letters are not mixed: %q", seen)
		}
	})
}

// An answer from such a server to another question, or while its TCP works, is not taken.
func TestSmallLettersAreNoWayRoundTCP(t *testing.T) {
	forged := func(q []byte) [][]byte {
		b := answerWith(forgedAddr)(q)[0]
		q2, _ := readQuestion(b)
		copy(b[headerLen:], q2.name)
		return [][]byte{b}
	}
	g := newGate(t, gatedPolicy, nil)
	g.net.servers[server(1)] = &fakeServer{udp: forged, tcp: answerWith(trueAddr)}
	for range 100 {
		g.forget()
		packet(g.Resolver, ask(t, "files-in-many-letters.deep.test", dns.TypeA))
		if g.granted("files-in-many-letters.deep.test", forgedAddr) {
			t.Fatal("a forged address is granted")
		}
	}
}

// Old servers without EDNS: they say so, or drop queries that they do not understand.
func TestAServerWithoutEDNSIsAskedWithout(t *testing.T) {
	for _, how := range []string{"FORMERR", "NOTIMP", "dropped"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				up := func(q []byte) [][]byte {
					if unpack(t, q).IsEdns0() == nil {
						return says("an pypi.test. 60 A 198.51.100.1")(q)
					}
					code := dns.StringToRcode[how]
					if code == 0 {
						return nil
					}
					return respond(func(_, a *dns.Msg) { a.Rcode = code })(q)
				}
				g := newGate(t, gatedPolicy, up)
				if m := unpack(t, packet(g.Resolver, ask(t, "pypi.test", dns.TypeA))); len(m.Answer) != 1 {
					t.Errorf("got %v", m)
				}
			})
		})
	}
}

// A name with two families, one of them closed: C libraries (musl) and drivers give up the name
// altogether if either answer is an error.
func TestATypeThatIsLeftOutLeavesTheName(t *testing.T) {
	up := respond(func(q, a *dns.Msg) {
		switch q.Question[0].Qtype {
		case dns.TypeA:
			a.Answer = []dns.RR{rr("pypi.test. 60 A 198.51.100.1")}
		case dns.TypeAAAA:
			a.Answer = []dns.RR{rr("pypi.test. 60 AAAA fd00::1")}
		case dns.TypeHTTPS:
			a.Answer = []dns.RR{rr("pypi.test. 60 HTTPS 0 cdn.test.")}
		}
	})
	g := newGate(t, gatedPolicy, up)
	for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeTXT, dns.TypeMX, dns.TypeANY, 65280} {
		m := unpack(t, packet(g.Resolver, ask(t, "pypi.test", qtype)))
		if m.Rcode != dns.RcodeSuccess || (len(m.Answer) > 0) != (qtype == dns.TypeA) {
			t.Errorf("%s: got %v", dns.TypeToString[qtype], m)
		}
	}
}
