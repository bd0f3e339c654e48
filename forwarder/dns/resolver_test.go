package dns

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestLocalNames(t *testing.T) {
	r := newResolver(t, Config{Hosts: map[string][]netip.Addr{
		"Db.Internal": addrs("10.9.8.7", "fd00::7", "10.9.8.7"),
		"alias.":      addrs("10.9.8.7"),
		"empty":       nil,
	}})
	rows := []struct {
		about, name string
		qtype       uint16
		rcode       int
		want        []string
	}{
		{"an added host has its IPv4 address once", "db.internal", dns.TypeA, 0, []string{"10.9.8.7"}},
		{"an added host has its IPv6 address", "db.internal", dns.TypeAAAA, 0, []string{"fd00::7"}},
		{"letters' case does not matter", "dB.iNTERNAL", dns.TypeA, 0, []string{"10.9.8.7"}},
		{"ANY gives all of them", "db.internal", dns.TypeANY, 0, []string{"10.9.8.7", "fd00::7"}},
		{"other types of an added host do not exist", "db.internal", dns.TypeMX, 0, nil},
		{"the other family of an added host does not exist", "alias", dns.TypeAAAA, 0, nil},
		{"a host added without an address exists", "empty", dns.TypeA, 0, nil},
		{"an added IPv4 address has all its names", "7.8.9.10.in-addr.arpa", dns.TypePTR, 0, []string{"db.internal.", "alias."}},
		{"an added IPv6 address has its name", "7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa", dns.TypePTR, 0, []string{"db.internal."}},
		{"localhost is this machine", "localhost", dns.TypeA, 0, []string{"127.0.0.1"}},
		{"localhost is this machine over IPv6", "localhost", dns.TypeAAAA, 0, []string{"::1"}},
		{"names below localhost are too", "a.b.LocalHost", dns.TypeA, 0, []string{"127.0.0.1"}},
		{"127.0.0.1 is localhost", "1.0.0.127.in-addr.arpa", dns.TypePTR, 0, []string{"localhost."}},
		{"invalid does not exist", "x.invalid", dns.TypeA, dns.RcodeNameError, nil},
		{"designated resolvers are not looked for upstream", "_dns.resolver.arpa", dns.TypeSVCB, 0, nil},
		{"a name that only ends like localhost is not", "notlocalhost", dns.TypeA, dns.RcodeServerFailure, nil},
		{"a name below an added host is not", "x.db.internal", dns.TypeA, dns.RcodeServerFailure, nil},
	}
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			for _, with := range []func(*dns.Msg){func(*dns.Msg) {}, edns(4096, true)} {
				q := ask(t, row.name, row.qtype, with)
				a := unpack(t, packet(r, q))
				var got []string
				for _, r := range a.Answer {
					if !strings.EqualFold(r.Header().Name, dns.Fqdn(row.name)) {
						t.Errorf("record owned by %s", r.Header().Name)
					}
					switch r := r.(type) {
					case *dns.A:
						got = append(got, r.A.String())
					case *dns.AAAA:
						got = append(got, r.AAAA.String())
					case *dns.PTR:
						got = append(got, r.Ptr)
					}
				}
				slices.Sort(got)
				want := slices.Sorted(slices.Values(row.want))
				if !slices.Equal(got, want) || a.Rcode != row.rcode {
					t.Errorf("got %v %s, want %v %s", got, dns.RcodeToString[a.Rcode], want, dns.RcodeToString[row.rcode])
				}
				sent := unpack(t, q)
				if a.Id != sent.Id || !a.Response || !a.RecursionAvailable || a.Question[0] != sent.Question[0] {
					t.Errorf("header or question differ: %v", a)
				}
				if o := sent.IsEdns0(); (a.IsEdns0() != nil) != (o != nil) || (o != nil && !a.IsEdns0().Do()) {
					t.Errorf("EDNS differs: asked %v, got %v", o, a.IsEdns0())
				}
			}
		})
	}
}

func TestHostNamesThatCannotBeNames(t *testing.T) {
	for _, h := range []string{"", ".", "a..b", strings.Repeat("x", 64), strings.Repeat("abc.", 64)} {
		if _, err := New(Config{Hosts: map[string][]netip.Addr{h: addrs("10.0.0.1")}}); err == nil {
			t.Errorf("%q was taken", h)
		}
	}
}

func TestManyLocalAddressesAreCutToTheClientsSize(t *testing.T) {
	var many []netip.Addr
	for i := range 200 {
		many = append(many, netip.AddrFrom4([4]byte{10, 1, 0, byte(i)}))
	}
	r := newResolver(t, Config{Hosts: map[string][]netip.Addr{"many": many}})
	for _, row := range []struct {
		size uint16
		n    int
		tc   bool
	}{{0, 30, true}, {512, 29, true}, {100, 29, true}, {1232, 74, true}, {4096, 200, false}} {
		q := ask(t, "many", dns.TypeA)
		if row.size != 0 {
			q = ask(t, "many", dns.TypeA, edns(row.size, false))
		}
		b := packet(r, q)
		a := unpack(t, b)
		if len(b) > max(int(row.size), 512) || len(a.Answer) != row.n || a.Truncated != row.tc {
			t.Errorf("size %d: %d bytes, %d records, TC %v; want %d records, TC %v", row.size, len(b), len(a.Answer), a.Truncated, row.n, row.tc)
		}
	}
}

func TestQueriesNotForwarded(t *testing.T) {
	raw := func(edit func(b []byte) []byte) []byte { return edit(ask(t, "example.com", dns.TypeA)) }
	const silence = -1
	rows := []struct {
		about string
		query []byte
		rcode int
	}{
		{"nothing is no query", nil, silence},
		{"eleven bytes are no query", make([]byte, 11), silence},
		{"a response is not answered", raw(func(b []byte) []byte { b[2] |= 0x80; return b }), silence},
		{"no question is malformed", make([]byte, 12), dns.RcodeFormatError},
		{"two questions are malformed", raw(func(b []byte) []byte { b[5] = 2; return append(b, b[12:]...) }), dns.RcodeFormatError},
		{"a cut question is malformed", raw(func(b []byte) []byte { return b[:20] }), dns.RcodeFormatError},
		{"a compressed question is malformed", raw(func(b []byte) []byte { b[12], b[13] = 0xc0, 12; return b }), dns.RcodeFormatError},
		{"a reserved label type is malformed", raw(func(b []byte) []byte { b[12] = 0x47; return b }), dns.RcodeFormatError},
		{"bytes behind the last record are malformed", raw(func(b []byte) []byte { return append(b, 0) }), dns.RcodeFormatError},
		{"a record that is counted but missing is malformed", raw(func(b []byte) []byte { b[11] = 1; return b }), dns.RcodeFormatError},
		{"two OPT records are malformed", ask(t, "example.com", dns.TypeA, edns(512, false), edns(512, false)), dns.RcodeFormatError},
		{"an answer in a query is malformed", ask(t, "example.com", dns.TypeA, func(m *dns.Msg) { m.Answer = append(m.Answer, rr("example.com. A 192.0.2.1")) }), dns.RcodeFormatError},
		{"OPT is no type to ask for", ask(t, "example.com", dns.TypeOPT), dns.RcodeFormatError},
		{"too long a query is malformed", ask(t, "example.com", dns.TypeA, edns(4096, false), func(m *dns.Msg) {
			m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_PADDING{Padding: make([]byte, maxQuery)})
		}), dns.RcodeFormatError},
		{"UPDATE is not implemented", ask(t, "example.com", dns.TypeSOA, func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), dns.RcodeNotImplemented},
		{"NOTIFY is not implemented", ask(t, "example.com", dns.TypeSOA, func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }), dns.RcodeNotImplemented},
		{"zone transfers are refused", ask(t, "example.com", dns.TypeAXFR), dns.RcodeRefused},
		{"incremental ones too", ask(t, "example.com", dns.TypeIXFR), dns.RcodeRefused},
		{"the CHAOS class is refused", ask(t, "version.bind", dns.TypeTXT, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), dns.RcodeRefused},
	}
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			net := &fakeNet{}
			r := newResolver(t, Config{Dialer: net, Upstreams: upstreams(1)})
			b := packet(r, row.query)
			if row.rcode == silence {
				if b != nil {
					t.Fatalf("answered %x", b)
				}
			} else if a := unpack(t, b); a.Rcode != row.rcode || a.Id != uint16(row.query[0])<<8|uint16(row.query[1]) {
				t.Fatalf("got %v", a)
			}
			if d := net.dialled(); len(d) != 0 {
				t.Errorf("went upstream: %v", d)
			}
		})
	}
}

// Forwarding is complete: the query and the answer arrive byte for byte, except for the ID.
func TestForwardedMessagesAreUntouched(t *testing.T) {
	for _, row := range []struct {
		about string
		query []byte
		reply func(q, a *dns.Msg)
	}{
		{"an address", ask(t, "www.example.com", dns.TypeA), func(q, a *dns.Msg) { a.Answer = []dns.RR{rr("www.example.com. 5 A 192.0.2.7")} }},
		{"an unknown type", ask(t, "x.example", 65432), func(q, a *dns.Msg) { a.Answer = []dns.RR{rr(`x.example. TYPE65432 \# 3 010203`)} }},
		{"DNSSEC with its bits", ask(t, "s.example", dns.TypeA, edns(4096, true), func(m *dns.Msg) { m.CheckingDisabled, m.AuthenticatedData = true, true }), func(q, a *dns.Msg) {
			a.AuthenticatedData, a.CheckingDisabled = true, true
			a.Answer = []dns.RR{rr("s.example. A 192.0.2.1"), rr("s.example. RRSIG A 13 2 300 20300101000000 20200101000000 1 example. AAAA")}
			a.SetEdns0(1232, true)
		}},
		{"no such name, with the zone's SOA", ask(t, "no.example", dns.TypeA), func(q, a *dns.Msg) {
			a.Rcode = dns.RcodeNameError
			a.Ns = []dns.RR{rr("example. SOA a. b. 1 2 3 4 5")}
		}},
		{"mixed letters", ask(t, "wWw.ExAmPlE.cOm", dns.TypeA), func(q, a *dns.Msg) {}},
		{"an EDNS cookie", ask(t, "c.example", dns.TypeA, edns(1232, false), func(m *dns.Msg) {
			m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_COOKIE{Cookie: "0102030405060708"})
		}), func(q, a *dns.Msg) { a.SetEdns0(1232, false) }},
		{"a bad EDNS version", ask(t, "v.example", dns.TypeA, edns(1232, false), func(m *dns.Msg) { m.IsEdns0().SetVersion(9) }), func(q, a *dns.Msg) {
			a.SetEdns0(1232, false)
			a.Rcode = dns.RcodeBadVers
		}},
	} {
		t.Run(row.about, func(t *testing.T) {
			var seen, said []byte
			up := func(q []byte) [][]byte {
				seen = bytes.Clone(q)
				out := respond(row.reply)(q)
				said = bytes.Clone(out[0])
				return out
			}
			r := newResolver(t, Config{Dialer: &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {udp: up}}}, Upstreams: upstreams(1)})
			got := packet(r, row.query)
			if !bytes.Equal(seen[2:], row.query[2:]) {
				t.Errorf("upstream saw\n%x, not\n%x", seen, row.query)
			}
			if !bytes.Equal(got[:2], row.query[:2]) || !bytes.Equal(got[2:], said[2:]) {
				t.Errorf("client got\n%x, not\n%x", got, said)
			}
		})
	}
}

// Upstreams' behaviour, and the client's answer to each. Each runs on a fake clock; took is the
// time allowed for the whole query.
func TestUpstreamBehaviour(t *testing.T) {
	good := func(text string) func([]byte) [][]byte {
		return respond(func(q, a *dns.Msg) { a.Answer = []dns.RR{rr(q.Question[0].Name + " TXT " + text)} })
	}
	code := func(c int) func([]byte) [][]byte { return respond(func(q, a *dns.Msg) { a.Rcode = c }) }
	edit := func(f func(b []byte) []byte) func([]byte) [][]byte {
		return func(q []byte) [][]byte {
			forged := f(bytes.Clone(good("forged")(q)[0]))
			return [][]byte{forged, good("true")(q)[0]}
		}
	}
	long := func(tc bool, n int) func([]byte) [][]byte {
		return respond(func(q, a *dns.Msg) {
			a.Truncated = tc
			for i := range n {
				a.Answer = append(a.Answer, rr(fmt.Sprintf("%s TXT %q", q.Question[0].Name, fmt.Sprintf("%0200d", i))))
			}
		})
	}
	rows := []struct {
		about   string
		servers []*fakeServer
		up      Upstreams // without the servers
		limit   uint16
		rcode   int
		answer  string // the first record's text
		n       int    // or the number of records
		tc      bool
		dials   string
		took    time.Duration
	}{
		{about: "the first server answers", servers: []*fakeServer{{udp: good("1")}, {udp: good("2")}}, answer: "1", dials: "udp1"},
		{about: "a server that refuses the datagram is passed over at once", servers: []*fakeServer{{down: true}, {udp: good("2")}}, answer: "2", dials: "udp1 udp2"},
		{about: "a silent server is passed over after the timeout", servers: []*fakeServer{{}, {udp: good("2")}}, answer: "2", dials: "udp1 udp2", took: 2 * time.Second},
		{about: "the host's timeout counts", servers: []*fakeServer{{}, {udp: good("2")}}, up: Upstreams{Timeout: 3 * time.Second}, answer: "2", dials: "udp1 udp2", took: 3 * time.Second},
		{about: "all silent is SERVFAIL after two rounds", servers: []*fakeServer{{}, {}}, rcode: dns.RcodeServerFailure, dials: "udp1 udp2 udp1 udp2", took: 8 * time.Second},
		{about: "the host's attempts count", servers: []*fakeServer{{}}, up: Upstreams{Attempts: 4}, rcode: dns.RcodeServerFailure, dials: "udp1 udp1 udp1 udp1", took: 8 * time.Second},
		{about: "a query ends even if its servers would wait longer", servers: []*fakeServer{{}}, up: Upstreams{Timeout: 30 * time.Second}, rcode: dns.RcodeServerFailure, dials: "udp1", took: 20 * time.Second},
		{about: "SERVFAIL makes the next one be asked", servers: []*fakeServer{{udp: code(dns.RcodeServerFailure)}, {udp: good("2")}}, answer: "2", dials: "udp1 udp2"},
		{about: "REFUSED makes the next one be asked", servers: []*fakeServer{{udp: code(dns.RcodeRefused)}, {udp: good("2")}}, answer: "2", dials: "udp1 udp2"},
		{about: "REFUSED by all is passed on, each asked once", servers: []*fakeServer{{udp: code(dns.RcodeRefused)}, {udp: code(dns.RcodeServerFailure)}}, rcode: dns.RcodeRefused, dials: "udp1 udp2"},
		{about: "SERVFAIL over TCP is passed on, its token given back", servers: []*fakeServer{{tcp: code(dns.RcodeServerFailure)}, {tcp: code(dns.RcodeRefused)}}, up: Upstreams{UseVC: true}, rcode: dns.RcodeServerFailure, dials: "tcp1 tcp2"},
		{about: "no such name is an answer", servers: []*fakeServer{{udp: code(dns.RcodeNameError)}, {udp: good("2")}}, rcode: dns.RcodeNameError, dials: "udp1"},
		{about: "a bare header with an error counts as one", servers: []*fakeServer{{udp: func(q []byte) [][]byte { return [][]byte{{q[0], q[1], 0x81, 0x81, 0, 0, 0, 0, 0, 0, 0, 0}} }}}, rcode: dns.RcodeFormatError, dials: "udp1"},
		{about: "another ID is ignored", servers: []*fakeServer{{udp: edit(func(b []byte) []byte { b[0]++; return b })}}, answer: "true", dials: "udp1"},
		{about: "another name is ignored", servers: []*fakeServer{{udp: edit(func(b []byte) []byte { b[13]++; return b })}}, answer: "true", dials: "udp1"},
		{about: "another type is ignored", servers: []*fakeServer{{udp: edit(func(b []byte) []byte { b[12+len(qname)+2] ^= 0x20; return b })}}, answer: "true", dials: "udp1"},
		{about: "a query instead of a response is ignored", servers: []*fakeServer{{udp: edit(func(b []byte) []byte { b[2] &^= 0x80; return b })}}, answer: "true", dials: "udp1"},
		{about: "a fragment of a header is ignored", servers: []*fakeServer{{udp: edit(func(b []byte) []byte { return b[:5] })}}, answer: "true", dials: "udp1"},
		{about: "endless strays make it be asked over TCP", servers: []*fakeServer{{udp: func(q []byte) [][]byte {
			return slices.Repeat([][]byte{{1, 2, 3}}, maxIgnored)
		}, tcp: good("1")}, {udp: good("2")}}, answer: "1", dials: "udp1 tcp1"},
		{about: "a folded question comes back as it was asked", servers: []*fakeServer{{udp: func(q []byte) [][]byte {
			b := good("1")(q)[0]
			copy(b[12:], bytes.ToLower(b[12:12+len(qname)]))
			return [][]byte{b}
		}}}, answer: "1", dials: "udp1"},
		{about: "a malformed answer makes the next one be asked", servers: []*fakeServer{{udp: func(q []byte) [][]byte {
			b := good("1")(q)[0]
			return [][]byte{b[:len(b)-1]}
		}}, {udp: good("2")}}, answer: "2", dials: "udp1 udp2"},
		{about: "trailing bytes are dropped", servers: []*fakeServer{{udp: func(q []byte) [][]byte { return [][]byte{append(good("1")(q)[0], 0, 0)} }}}, answer: "1", dials: "udp1"},
		{about: "a truncated answer goes on as it is to a client without EDNS", servers: []*fakeServer{{udp: long(true, 1), tcp: long(false, 9)}}, n: 1, tc: true, dials: "udp1"},
		{about: "a truncated answer is fetched whole for a client that can take it", servers: []*fakeServer{{udp: long(true, 1), tcp: long(false, 9)}}, limit: 4096, n: 9, dials: "udp1 tcp1"},
		{about: "one fetched whole is cut to the client's size", servers: []*fakeServer{{udp: long(true, 1), tcp: long(false, 100)}}, limit: 4096, n: 18, tc: true, dials: "udp1 tcp1"},
		{about: "a truncated answer serves if TCP fails", servers: []*fakeServer{{udp: long(true, 1), tcp: nil}}, limit: 4096, n: 1, tc: true, dials: "udp1 tcp1", took: 2 * time.Second},
		{about: "an answer cut within a record keeps its question", servers: []*fakeServer{{udp: func(q []byte) [][]byte {
			b := long(true, 3)(q)[0]
			return [][]byte{b[:300]}
		}}}, n: 0, tc: true, dials: "udp1"},
		{about: "a datagram larger than our buffer is fetched over TCP", servers: []*fakeServer{{udp: long(false, 30), tcp: long(false, 30)}}, limit: 65000, n: 30, dials: "udp1 tcp1"},
		{about: "an upstream that disregards the client's size is cut to it", servers: []*fakeServer{{udp: long(false, 4)}}, n: 2, tc: true, dials: "udp1"},
		{about: "use-vc asks over TCP only", servers: []*fakeServer{{tcp: good("1")}}, up: Upstreams{UseVC: true}, answer: "1", dials: "tcp1"},
	}
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &fakeNet{servers: make(map[netip.AddrPort]*fakeServer)}
				row.up.Servers = upstreams(len(row.servers)).Servers
				for i, s := range row.servers {
					fake.servers[server(i+1)] = s
				}
				r := newResolver(t, Config{Dialer: fake, Upstreams: row.up, Limits: Limits{UpstreamTCP: 1}})
				q := ask(t, qname, dns.TypeTXT)
				if row.limit != 0 {
					q = ask(t, qname, dns.TypeTXT, edns(row.limit, false))
				}
				start := time.Now()
				b := packet(r, q)
				if took := time.Since(start); took != row.took {
					t.Errorf("took %v, want %v", took, row.took)
				}
				a := unpack(t, b)
				if a.Rcode != row.rcode || a.Truncated != row.tc || a.Question[0].Name != qname+"." || a.Id != unpack(t, q).Id {
					t.Errorf("got %v", a)
				}
				if row.answer != "" {
					if len(a.Answer) != 1 || a.Answer[0].(*dns.TXT).Txt[0] != row.answer {
						t.Errorf("got %v, want %q", a.Answer, row.answer)
					}
				} else if len(a.Answer) != row.n {
					t.Errorf("got %d records, want %d", len(a.Answer), row.n)
				}
				dials := strings.NewReplacer(" 192.0.2.", "", ":53", "").Replace(strings.Join(fake.dialled(), ","))
				if dials = strings.ReplaceAll(dials, ",", " "); dials != row.dials {
					t.Errorf("dialled %q, want %q", dials, row.dials)
				}
			})
		})
	}
}

const qname = "Some.Name"

func TestEachTryHasItsOwnID(t *testing.T) {
	ids := make(map[uint16]bool)
	up := func(q []byte) [][]byte {
		ids[be16(q, 0)] = true
		return respond(func(q, a *dns.Msg) {})(q)
	}
	r := newResolver(t, Config{Dialer: &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {udp: up}}}, Upstreams: upstreams(1)})
	q := ask(t, "a.example", dns.TypeA)
	for range 100 {
		packet(r, q)
	}
	if len(ids) < 95 { // 100 draws of 65536 practically never collide five times
		t.Errorf("%d different IDs in 100 queries", len(ids))
	}
}

func TestAServerThatFailedIsAskedLastForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ok := respond(func(q, a *dns.Msg) {})
		fake := &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {}, server(2): {udp: ok}}}
		r := newResolver(t, Config{Dialer: fake, Upstreams: upstreams(2)})
		q := ask(t, "a.example", dns.TypeA)
		for range 3 {
			packet(r, q)
		}
		if got := len(fake.dialled()); got != 4 { // 1 2, 2, 2
			t.Errorf("%d dials, want 4: %v", got, fake.dialled())
		}
		time.Sleep(failedFor)
		packet(r, q)
		if got := fake.dialled()[4]; got != "udp 192.0.2.1:53" {
			t.Errorf("after %v the first asked is %v", failedFor, got)
		}
	})
}

func TestRotateTakesTurns(t *testing.T) {
	ok := &fakeServer{udp: respond(func(q, a *dns.Msg) {})}
	fake := &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): ok, server(2): ok, server(3): ok}}
	u := upstreams(3)
	u.Rotate = true
	r := newResolver(t, Config{Dialer: fake, Upstreams: u})
	for range 4 {
		packet(r, ask(t, "a.example", dns.TypeA))
	}
	want := []string{"udp 192.0.2.1:53", "udp 192.0.2.2:53", "udp 192.0.2.3:53", "udp 192.0.2.1:53"}
	if got := fake.dialled(); !slices.Equal(got, want) {
		t.Errorf("asked %v", got)
	}
}

func TestNoUpstreamIsServfailAndSaidOnce(t *testing.T) {
	var log bytes.Buffer
	ok := &fakeServer{udp: respond(func(q, a *dns.Msg) {})}
	r := newResolver(t, Config{
		Dialer: &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): ok}},
		Log:    slog.New(slog.NewTextHandler(&log, nil)),
	})
	q := ask(t, "a.example", dns.TypeA)
	for range 3 {
		if a := unpack(t, packet(r, q)); a.Rcode != dns.RcodeServerFailure {
			t.Errorf("got %v", a)
		}
	}
	r.SetUpstreams(Upstreams{Search: []string{"still.none"}})
	if n := strings.Count(log.String(), "no upstream DNS server"); n != 1 {
		t.Errorf("said %d times:\n%s", n, &log)
	}
	r.SetUpstreams(upstreams(1))
	if a := unpack(t, packet(r, q)); a.Rcode != dns.RcodeSuccess {
		t.Errorf("with a server: %v", a)
	}
	r.SetUpstreams(Upstreams{})
	if n := strings.Count(log.String(), "no upstream DNS server"); n != 2 || !strings.Contains(log.String(), "are back") {
		t.Errorf("after coming and going:\n%s", &log)
	}
}

func TestNewUpstreamsServeAQueryOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {}, server(2): {udp: respond(func(q, a *dns.Msg) {})}}}
		r := newResolver(t, Config{Dialer: fake, Upstreams: upstreams(1)})
		time.AfterFunc(time.Second, func() { r.SetUpstreams(Upstreams{Servers: []netip.AddrPort{server(2)}}) })
		if a := unpack(t, packet(r, ask(t, "a.example", dns.TypeA))); a.Rcode != dns.RcodeSuccess {
			t.Errorf("got %v", a)
		}
	})
}

func TestOverTheLimitIsServfailAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {}}}
		r := newResolver(t, Config{Dialer: fake, Upstreams: upstreams(1), Limits: Limits{InFlight: 3}})
		q := ask(t, "a.example", dns.TypeA)
		answers := make(chan rcode, 6)
		send := func(b []byte, _ policy.Outcome) { answers <- rcode(be16(b, 2) & maskRcode) }
		for range 5 {
			r.ServePacket(context.Background(), q, client, send)
		}
		if n := len(answers); n != 2 || r.Stats().OverLimit != 2 {
			t.Errorf("%d answered at once, %d counted, want 2", n, r.Stats().OverLimit)
		}
		for range len(answers) {
			if c := <-answers; c != rcodeServFail {
				t.Errorf("got code %d", c)
			}
		}
		// Local names need no upstream and are not held up.
		r.ServePacket(context.Background(), ask(t, "localhost", dns.TypeA), client, send)
		if len(answers) != 1 {
			t.Error("localhost was held up")
		}
	})
}

func TestCloseEndsQueriesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {}}}
		r, err := New(Config{Dialer: fake, Upstreams: upstreams(1)})
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		for range 10 {
			r.ServePacket(context.Background(), ask(t, "a.example", dns.TypeA), client, func([]byte, policy.Outcome) {})
		}
		synctest.Wait()
		r.Close()
		if time.Since(start) != 0 {
			t.Errorf("Close took %v", time.Since(start))
		}
		r.ServePacket(context.Background(), ask(t, "localhost", dns.TypeA), client, func([]byte, policy.Outcome) { t.Error("answered after Close") })
		r.Close()
		// synctest.Test checks on return that no goroutine is left.
	})
}

func TestTheCallersContextEndsItsQuery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {}}}
		r := newResolver(t, Config{Dialer: fake, Upstreams: upstreams(1)})
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		start := time.Now()
		r.ServePacket(ctx, ask(t, "a.example", dns.TypeA), client, func([]byte, policy.Outcome) {})
		r.work.Wait()
		if time.Since(start) != time.Millisecond {
			t.Errorf("took %v", time.Since(start))
		}
	})
}
