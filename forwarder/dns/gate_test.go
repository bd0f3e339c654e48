package dns

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

// gatedPolicy lets a few names be asked, one of them private.
const gatedPolicy = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: gated}
spec:
  defaultAction: reject
  egress:
  - {name: exact, action: allow, to: [{domain: pypi.test}, {domain: dns.google}]}
  - {name: wild, action: allow, to: [{domain: "*.files.test"}, {domain: "**.deep.test"}, {domain: "**.com"}]}
  - {name: inner, action: allow, to: [{domain: inner.test}], privateAddresses: allow}
  - {name: hidden, action: allow, to: [{domain: hidden.test}], ech: allow}
`

func compile(t testing.TB, text string) *policy.Rules {
	t.Helper()
	p, err := policy.Parse("policy.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.Compile(p, policy.Environment{})
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

// gate is a resolver under gatedPolicy whose one upstream is up.
type gate struct {
	*Resolver
	names  *policy.Names
	net    *fakeNet
	mu     sync.Mutex
	events []Event
}

func newGate(t testing.TB, text string, up func([]byte) [][]byte, edit ...func(*Config)) *gate {
	t.Helper()
	g := &gate{names: policy.NewNames(policy.NamesConfig{})}
	g.net = &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {udp: up, tcp: up}}}
	rules := compile(t, text)
	cfg := Config{
		Dialer: g.net, Upstreams: upstreams(1), Names: g.names,
		Rules: func() *policy.Rules { return rules },
		Tell:  func(e Event) { g.mu.Lock(); defer g.mu.Unlock(); g.events = append(g.events, e) },
	}
	for _, e := range edit {
		e(&cfg)
	}
	g.Resolver = newResolver(t, cfg)
	return g
}

// forget makes the gate treat the next question like the first.
func (g *gate) forget() {
	g.cache.flush()
	g.tunnels.mu.Lock()
	defer g.tunnels.mu.Unlock()
	g.tunnels.patterns, g.tunnels.asked = nil, 0
}

func (g *gate) granted(name, addr string) bool {
	return g.names.Holds(name, netip.MustParseAddr(addr), time.Now())
}

// says makes an upstream that answers every question with the given records.
func says(records ...string) func([]byte) [][]byte {
	return respond(func(q, a *dns.Msg) {
		for _, r := range records {
			switch section, r, _ := strings.Cut(r, " "); section {
			case "an":
				a.Answer = append(a.Answer, rr(r))
			case "ns":
				a.Ns = append(a.Ns, rr(r))
			case "ex":
				a.Extra = append(a.Extra, rr(r))
			}
		}
	})
}

func TestNamesAreJudgedBeforeAnythingIsAsked(t *testing.T) {
	rows := []struct {
		about, name string
		qtype       uint16
		rcode       int
		rule        string
	}{
		{"a listed name is asked", "pypi.test", dns.TypeA, dns.RcodeSuccess, ""},
		{"in whatever letters", "PyPI.TeSt", dns.TypeA, dns.RcodeSuccess, ""},
		{"a name that only ends like it is not", "evilpypi.test", dns.TypeA, dns.RcodeNameError, "default"},
		{"nor one that only begins like it", "pypi.test.evil.io", dns.TypeA, dns.RcodeNameError, "default"},
		{"nor a name below it", "www.pypi.test", dns.TypeA, dns.RcodeNameError, "default"},
		{"a dot within a label is not a dot", `pypi\.test`, dns.TypeA, dns.RcodeRefused, ruleBadName},
		{"nor is an escaped one before it", `evil\.pypi.test`, dns.TypeA, dns.RcodeRefused, ruleBadName},
		{"a zero byte ends nothing", `pypi.test\000.evil.io`, dns.TypeA, dns.RcodeRefused, ruleBadName},
		{"raw UTF-8 is no name", "pypı.test", dns.TypeA, dns.RcodeRefused, ruleBadName},
		{"the root is no name", ".", dns.TypeNS, dns.RcodeRefused, ruleBadName},
		{"* stands for one label", "a.files.test", dns.TypeA, dns.RcodeSuccess, ""},
		{"not for none", "files.test", dns.TypeA, dns.RcodeNameError, "default"},
		{"not for two", "a.b.files.test", dns.TypeA, dns.RcodeNameError, "default"},
		{"** stands for several", "a.b.deep.test", dns.TypeAAAA, dns.RcodeSuccess, ""},
		{"an address turned round is a name like any other", "4.3.2.1.in-addr.arpa", dns.TypePTR, dns.RcodeNameError, "default"},
		{"TXT is not asked unless the policy lists it", "pypi.test", dns.TypeTXT, dns.RcodeSuccess, ruleType},
		{"nor NULL", "pypi.test", dns.TypeNULL, dns.RcodeSuccess, ruleType},
		{"nor ANY", "pypi.test", dns.TypeANY, dns.RcodeSuccess, ruleType},
		{"nor an unknown type", "pypi.test", 65280, dns.RcodeSuccess, ruleType},
		{"HTTPS is", "pypi.test", dns.TypeHTTPS, dns.RcodeSuccess, ""},
		{"a wildcard does not mean a resolver behind encryption", "cloudflare-dns.com", dns.TypeA, dns.RcodeNameError, ruleEncrypted},
		{"nor one below it", "mozilla.cloudflare-dns.com", dns.TypeA, dns.RcodeNameError, ruleEncrypted},
		{"a rule that spells it out does", "dns.google", dns.TypeA, dns.RcodeSuccess, ""},
		{"localhost needs no rule", "localhost", dns.TypeA, dns.RcodeSuccess, ""},
	}
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			g := newGate(t, gatedPolicy, says())
			a := unpack(t, packet(g.Resolver, ask(t, row.name, row.qtype, edns(1232, true))))
			if a.Rcode != row.rcode {
				t.Errorf("got %v, want %s", a, dns.RcodeToString[row.rcode])
			}
			asked := len(g.net.dialled())
			if row.rule == "" {
				if row.name != "localhost" && asked != 1 {
					t.Errorf("%d queries went upstream", asked)
				}
				return
			}
			if asked != 0 {
				t.Errorf("a refused name went upstream: %v", g.net.dialled())
			}
			if len(g.events) != 1 || g.events[0].Forwarded || g.events[0].Rule != row.rule {
				t.Errorf("told %+v, want rule %s", g.events, row.rule)
			}
			ede, _ := a.IsEdns0().Option[0].(*dns.EDNS0_EDE)
			if ede == nil || ede.InfoCode != dns.ExtendedErrorCodeProhibited || ede.ExtraText != row.rule {
				t.Errorf("the answer says %v, not why", ede)
			}
		})
	}
}

func TestBeforeThereAreRulesNothingIsAsked(t *testing.T) {
	g := newGate(t, gatedPolicy, says(), func(c *Config) { c.Rules = func() *policy.Rules { return nil } })
	a := unpack(t, packet(g.Resolver, ask(t, "pypi.test", dns.TypeA)))
	if a.Rcode != dns.RcodeRefused || len(g.net.dialled()) != 0 || len(g.events) != 1 || g.events[0].Rule != "no-policy" {
		t.Errorf("got %v, dialled %v, told %+v", a, g.net.dialled(), g.events)
	}
}

func TestAuditLetsThroughAndSaysSo(t *testing.T) {
	g := newGate(t, gatedPolicy+"  mode: audit\n", says("an other.test. 60 A 198.51.100.1"))
	for _, row := range []struct {
		name  string
		qtype uint16
		rule  string
	}{
		{"other.test", dns.TypeA, "default"},
		{"pypi.test", dns.TypeTXT, ruleType},
		{strings.Repeat("x", 63) + ".files.test", dns.TypeA, string(tunnelTooLong)},
	} {
		a := unpack(t, packet(g.Resolver, ask(t, row.name, row.qtype)))
		e := g.events[len(g.events)-1]
		if a.Rcode != dns.RcodeSuccess || !e.Forwarded || !e.Audited || e.Rule != row.rule {
			t.Errorf("%s: got %v, told %+v", row.name, a, e)
		}
	}
	if !g.granted("other.test", "198.51.100.1") {
		t.Error("what was let through is not granted")
	}
}

func TestTheRefusalIsThePolicys(t *testing.T) {
	for _, row := range []struct {
		refusal string
		rcode   int
	}{{"nxdomain", dns.RcodeNameError}, {"refused", dns.RcodeRefused}, {"drop", -1}} {
		g := newGate(t, gatedPolicy+"  dns: {refusal: "+row.refusal+"}\n", says())
		b := packet(g.Resolver, ask(t, "other.test", dns.TypeA))
		switch {
		case row.rcode < 0 && b != nil:
			t.Errorf("%s: answered %x", row.refusal, b)
		case row.rcode >= 0 && unpack(t, b).Rcode != row.rcode:
			t.Errorf("%s: got %v", row.refusal, unpack(t, b))
		}
	}
}

// Only the name and the type go upstream: anything else that a client can put into a question would
// be a way out.
func TestAQuestionIsAskedInOurOwnWords(t *testing.T) {
	var seen *dns.Msg
	g := newGate(t, gatedPolicy, func(q []byte) [][]byte { seen = unpack(t, q); return says()(q) })
	q := ask(t, "pYpI.test", dns.TypeA, edns(4096, true), func(m *dns.Msg) {
		m.CheckingDisabled, m.AuthenticatedData, m.Zero = true, true, true
		m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_COOKIE{Cookie: "0102030405060708"}, &dns.EDNS0_PADDING{Padding: []byte("secret")})
	})
	a := unpack(t, packet(g.Resolver, q))
	if seen.CheckingDisabled || seen.AuthenticatedData || seen.Zero || !seen.RecursionDesired || len(seen.IsEdns0().Option) != 0 || seen.IsEdns0().Do() {
		t.Errorf("upstream saw %v", seen)
	}
	if a.Question[0].Name != "pYpI.test." {
		t.Errorf("the client's spelling came back as %s", a.Question[0].Name)
	}
	spellings := make(map[string]bool)
	for range 20 {
		g.forget()
		packet(g.Resolver, q)
		spellings[seen.Question[0].Name] = true
	}
	if len(spellings) < 5 {
		t.Errorf("letters are not mixed: %v", spellings)
	}
}

// An upstream's records, and those that remain.
func TestAnswersAreSifted(t *testing.T) {
	rows := []struct {
		about, name string
		qtype       uint16
		records     []string
		want        []string // the answer section, without class
		rcode       int
		granted     []string
		not         []string
	}{
		{"an address is granted", "pypi.test", dns.TypeA, []string{"an pypi.test. 60 A 198.51.100.1"},
			[]string{"pypi.test. 60 A 198.51.100.1"}, 0, []string{"198.51.100.1"}, nil},
		{"aliases are followed under the name asked for, in whatever order", "pypi.test", dns.TypeA,
			[]string{"an edge.cdn.test. 30 A 198.51.100.2", "an PYPI.test. 60 CNAME cdn.test.", "an cdn.test. 90 CNAME Edge.cdn.test."},
			[]string{"pypi.test. 30 CNAME cdn.test.", "cdn.test. 30 CNAME edge.cdn.test.", "edge.cdn.test. 30 A 198.51.100.2"}, 0, []string{"198.51.100.2"}, nil},
		{"records that nobody asked for are left out", "pypi.test", dns.TypeA,
			[]string{"an pypi.test. 60 A 198.51.100.1", "an other.test. 60 A 198.51.100.9", "an pypi.test. 60 AAAA 2001:db8::9", "an pypi.test. 60 TXT x",
				"ns pypi.test. 60 NS ns.evil.test.", "ex ns.evil.test. 60 A 198.51.100.9", "ex pypi.test. 60 A 198.51.100.9"},
			[]string{"pypi.test. 60 A 198.51.100.1"}, 0, []string{"198.51.100.1"}, []string{"198.51.100.9", "2001:db8::9"}},
		{"an alias beside the chain leads nowhere", "pypi.test", dns.TypeA,
			[]string{"an other.test. 60 CNAME evil.test.", "an evil.test. 60 A 198.51.100.9"}, nil, 0, nil, []string{"198.51.100.9"}},
		{"an address of an alias's owner is not at the chain's end", "pypi.test", dns.TypeA,
			[]string{"an pypi.test. 60 CNAME cdn.test.", "an pypi.test. 60 A 198.51.100.9", "an cdn.test. 60 A 198.51.100.2"},
			[]string{"pypi.test. 60 CNAME cdn.test.", "cdn.test. 60 A 198.51.100.2"}, 0, []string{"198.51.100.2"}, []string{"198.51.100.9"}},
		{"another class is not asked for", "pypi.test", dns.TypeA, []string{"an pypi.test. 60 CH A 198.51.100.9"}, nil, 0, nil, []string{"198.51.100.9"}},
		{"of mixed answers the good ones are left", "pypi.test", dns.TypeA,
			[]string{"an pypi.test. 60 A 127.0.0.1", "an pypi.test. 60 A 198.51.100.1", "an pypi.test. 60 A 169.254.169.254", "an pypi.test. 60 A 0.0.0.0", "an pypi.test. 60 A 10.0.0.1", "an pypi.test. 60 A 224.0.0.1"},
			[]string{"pypi.test. 60 A 198.51.100.1"}, 0, []string{"198.51.100.1"}, []string{"127.0.0.1", "169.254.169.254", "10.0.0.1"}},
		{"an answer of closed addresses is none, and the name still one", "pypi.test", dns.TypeA, []string{"an pypi.test. 60 A 127.0.0.1"}, nil, dns.RcodeSuccess, nil, []string{"127.0.0.1"}},
		{"IPv4 in IPv6 is judged by what it holds", "pypi.test", dns.TypeAAAA,
			[]string{"an pypi.test. 60 AAAA ::ffff:127.0.0.1", "an pypi.test. 60 AAAA 64:ff9b::a9fe:a9fe", "an pypi.test. 60 AAAA 2002:7f00:1::1", "an pypi.test. 60 AAAA ::1", "an pypi.test. 60 AAAA fe80::1", "an pypi.test. 60 AAAA 2001:db8::1"},
			[]string{"pypi.test. 60 AAAA 2001:db8::1"}, 0, []string{"2001:db8::1"}, []string{"127.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::1", "::1"}},
		{"private addresses are for a name whose rule says so", "inner.test", dns.TypeA, []string{"an inner.test. 60 A 10.0.0.1"},
			[]string{"inner.test. 60 A 10.0.0.1"}, 0, []string{"10.0.0.1"}, nil},
		{"a TTL of a day is cut to an hour", "pypi.test", dns.TypeA, []string{"an pypi.test. 86400 A 198.51.100.1"}, []string{"pypi.test. 3600 A 198.51.100.1"}, 0, []string{"198.51.100.1"}, nil},
		{"a TTL beyond the top bit is zero", "pypi.test", dns.TypeA, []string{"an pypi.test. 4000000000 A 198.51.100.1"}, []string{"pypi.test. 0 A 198.51.100.1"}, 0, []string{"198.51.100.1"}, nil},
		{"aliases in a loop are no answer", "pypi.test", dns.TypeA, []string{"an pypi.test. 60 CNAME a.test.", "an a.test. 60 CNAME pypi.test."}, nil, dns.RcodeServerFailure, nil, nil},
		{"an alias of itself neither", "pypi.test", dns.TypeA, []string{"an pypi.test. 60 CNAME pypi.test."}, nil, dns.RcodeServerFailure, nil, nil},
		{"the alias itself may be asked for", "pypi.test", dns.TypeCNAME, []string{"an pypi.test. 60 CNAME a.test.", "an a.test. 60 CNAME b.test."}, []string{"pypi.test. 60 CNAME a.test."}, 0, nil, nil},
		{"service bindings lose addresses, keys and DoH paths", "pypi.test", dns.TypeHTTPS,
			[]string{`an pypi.test. 60 HTTPS 1 . alpn="h2,h3" port="8443" ipv4hint="198.51.100.9" ech="AAAA" ipv6hint="2001:db8::9" dohpath="/dns-query{?dns}"`},
			[]string{`pypi.test. 60 HTTPS 1 . alpn="h2,h3" port="8443"`}, 0, nil, []string{"198.51.100.9", "2001:db8::9"}},
		{"keys are passed on by a rule that says so", "hidden.test", dns.TypeHTTPS, []string{`an hidden.test. 60 HTTPS 1 . alpn="h2" ech="AAAA"`},
			[]string{`hidden.test. 60 HTTPS 1 . alpn="h2" ech="AAAA"`}, 0, nil, nil},
		{"a binding for another host goes, which would be asked for and said there under two names", "pypi.test", dns.TypeHTTPS,
			[]string{`an pypi.test. 60 HTTPS 1 cdn.test. alpn="h3"`, `an pypi.test. 60 HTTPS 2 PyPI.test. alpn="h2"`},
			[]string{`pypi.test. 60 HTTPS 2 PyPI.test. alpn="h2"`}, 0, nil, nil},
		{"one of the name itself by an alias goes likewise", "pypi.test", dns.TypeHTTPS, []string{`an pypi.test. 60 HTTPS 0 cdn.test.`}, nil, 0, nil, nil},
		{"one for the alias that the name has stays", "pypi.test", dns.TypeHTTPS,
			[]string{"an pypi.test. 60 CNAME cdn.test.", `an cdn.test. 60 HTTPS 1 . alpn="h2"`, `an cdn.test. 60 HTTPS 2 CDN.test. alpn="h2"`, `an cdn.test. 60 HTTPS 3 other.test. alpn="h2"`},
			[]string{"pypi.test. 60 CNAME cdn.test.", `cdn.test. 60 HTTPS 1 . alpn="h2"`, `cdn.test. 60 HTTPS 2 CDN.test. alpn="h2"`}, 0, nil, nil},
		{"a binding that must not be used without them goes", "pypi.test", dns.TypeHTTPS,
			[]string{`an pypi.test. 60 HTTPS 1 . mandatory="ech" alpn="h2" ech="AAAA"`, `an pypi.test. 60 HTTPS 2 . alpn="h2"`},
			[]string{`pypi.test. 60 HTTPS 2 . alpn="h2"`}, 0, nil, nil},
	}
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			g := newGate(t, gatedPolicy, says(row.records...))
			a := unpack(t, packet(g.Resolver, ask(t, row.name, row.qtype)))
			var got []string
			for _, r := range a.Answer {
				got = append(got, strings.Join(strings.Fields(strings.Replace(r.String(), "\tIN\t", "\t", 1)), " "))
			}
			if a.Rcode != row.rcode || !slices.Equal(got, row.want) || len(a.Ns)+len(a.Extra) != 0 {
				t.Errorf("got %v\nwant %q", a, row.want)
			}
			for _, addr := range row.granted {
				if !g.granted(row.name, addr) {
					t.Errorf("%s is not granted", addr)
				}
			}
			for _, addr := range row.not {
				if g.granted(row.name, addr) {
					t.Errorf("%s is granted", addr)
				}
			}
		})
	}
}

func TestTheSOAOfANegativeAnswerIsKept(t *testing.T) {
	up := respond(func(q, a *dns.Msg) {
		a.Rcode = dns.RcodeNameError
		a.Ns = []dns.RR{rr("evil.io. 60 SOA a. b. 1 2 3 4 5"), rr("test. 60 SOA a. b. 1 2 3 4 5"), rr("test. 60 NS evil.io.")}
	})
	g := newGate(t, gatedPolicy, up)
	a := unpack(t, packet(g.Resolver, ask(t, "pypi.test", dns.TypeA)))
	if a.Rcode != dns.RcodeNameError || len(a.Ns) != 1 || a.Ns[0].Header().Name != "test." {
		t.Errorf("got %v", a)
	}
}

// The contact john.doe@example.com, the name of a service instance, and services with many hosts.
func TestAnswersWithDotsInLabelsAndOfManyRecordsAreTold(t *testing.T) {
	const soa = `test. 60 SOA ns.test. john\.doe.test. 1 2 3 4 5`
	up := respond(func(q, a *dns.Msg) {
		asked := q.Question[0].Name
		switch q.Question[0].Qtype {
		case dns.TypePTR:
			a.Answer = append(a.Answer, rr(asked+` 60 PTR Printer\ 2\.0.`+asked))
		case dns.TypeSRV:
			for i := range 420 {
				a.Answer = append(a.Answer, rr(fmt.Sprintf("%s 60 SRV 1 2 %d node-%d.test.", asked, i, i)))
			}
		case dns.TypeSOA:
			a.Answer = append(a.Answer, rr(soa))
		case dns.TypeTXT:
			a.Rcode = dns.RcodeNameError
			fallthrough
		default:
			a.Ns = append(a.Ns, rr(soa))
		}
	})
	g := newGate(t, gatedPolicy+"  dns: {types: [AAAA, TXT, SOA, PTR, SRV]}\n", up)
	for _, row := range []struct {
		about string
		qtype uint16
		code  int
		n     int
		first string // the first record's data
	}{
		{"a name has no such record", dns.TypeAAAA, dns.RcodeSuccess, 1, `ns.test. john\.doe.test. 1 2 3 4 5`},
		{"there is no such name", dns.TypeTXT, dns.RcodeNameError, 1, `ns.test. john\.doe.test. 1 2 3 4 5`},
		{"a service has a dot in its name", dns.TypePTR, dns.RcodeSuccess, 1, `Printer\ 2\.0.pypi.test.`},
		{"a service has many hosts", dns.TypeSRV, dns.RcodeSuccess, 420, "1 2 0 node-0.test."},
	} {
		m := unpack(t, packet(g.Resolver, ask(t, "pypi.test", row.qtype, edns(65000, false))))
		all := append(m.Answer, m.Ns...)
		if m.Rcode != row.code || m.Truncated || len(all) != row.n {
			t.Errorf("%s: code %d, cut %v, %d records", row.about, m.Rcode, m.Truncated, len(all))
			continue
		}
		if got := strings.TrimPrefix(all[0].String(), all[0].Header().String()); got != row.first {
			t.Errorf("%s: got %s, want %s", row.about, got, row.first)
		}
		if m.Ns != nil && m.Ns[0].Header().Ttl != 5 {
			t.Errorf("%s: holds for %d s, want the zone's 5", row.about, m.Ns[0].Header().Ttl)
		}
	}
}

func TestGrantsAreThereBeforeTheAnswerIs(t *testing.T) {
	g := newGate(t, gatedPolicy, says("an pypi.test. 0 A 198.51.100.1"))
	done := make(chan bool, 1)
	g.ServePacket(context.Background(), ask(t, "pypi.test", dns.TypeA), client, func([]byte, policy.Outcome) { done <- g.granted("pypi.test", "198.51.100.1") })
	if !<-done {
		t.Error("the client saw an address before it was granted")
	}
}

func TestOneQuestionIsAskedOnceForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hold := make(chan struct{})
		g := newGate(t, gatedPolicy+"  limits: {dnsQueriesPerSecond: 1000}\n", func(q []byte) [][]byte {
			<-hold
			return says("an pypi.test. 60 A 198.51.100.1")(q)
		})
		ids := make(map[uint16]bool)
		var mu sync.Mutex
		for i := range 500 {
			q := ask(t, "pypi.test", dns.TypeA)
			q[0], q[1] = byte(i>>8), byte(i)
			g.ServePacket(context.Background(), q, client, func(b []byte, _ policy.Outcome) {
				mu.Lock()
				defer mu.Unlock()
				ids[be16(b, 0)] = len(unpack(t, b).Answer) == 1
			})
		}
		synctest.Wait()
		close(hold)
		g.work.Wait()
		if n := len(g.net.dialled()); n != 1 || len(ids) != 500 {
			t.Errorf("asked %d times, %d clients were answered", n, len(ids))
		}
		for id, good := range ids {
			if !good {
				t.Errorf("client %d was not told the address", id)
			}
		}
	})
}

func TestAnswersComeInBounds(t *testing.T) {
	up := respond(func(q, a *dns.Msg) {
		record, n := "pypi.test. 60 A 198.51.100.1", maxAnswerRecords+1
		if q.Question[0].Qtype == dns.TypeTXT {
			record, n = "pypi.test. 60 TXT "+strings.Repeat("x", 200), maxAnswerData/200+1
		}
		for range n {
			a.Answer = append(a.Answer, rr(record))
		}
	})
	for _, qtype := range []uint16{dns.TypeA, dns.TypeTXT} {
		g := newGate(t, gatedPolicy+"  dns: {types: [A, TXT]}\n", up)
		q := ask(t, "pypi.test", qtype, edns(65000, false))
		a := unpack(t, packet(g.Resolver, q))
		if n := len(a.Answer); n == 0 || n > maxAnswerRecords || a.Len() > 2*maxAnswerData || !a.Truncated {
			t.Errorf("%s: %d records, %d bytes, cut %v", dns.TypeToString[qtype], n, a.Len(), a.Truncated)
		}
	}
}

func TestQuestionsComeInBounds(t *testing.T) {
	g := newGate(t, gatedPolicy+"  limits: {dnsQueriesPerSecond: 10}\n", says())
	for i := range 30 {
		packet(g.Resolver, ask(t, fmt.Sprintf("n%d.deep.test", i), dns.TypeA))
	}
	if n := len(g.net.dialled()); n < 10 || n > 12 || g.Stats().OverRate < 18 {
		t.Errorf("%d of 30 went upstream, %d counted", n, g.Stats().OverRate)
	}
}
