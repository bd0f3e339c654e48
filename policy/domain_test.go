package policy

import (
	"net/netip"
	"testing"
	"time"
)

// A little internet: one server with two names, one on its own, one at home.
var (
	shared  = addr("198.51.100.1")
	alone   = addr("198.51.100.2")
	athome  = addr("10.1.1.1")
	sharedV = addr("2001:db8:1::1")
	now     = time.Unix(1_000_000, 0)
)

func granted(t testing.TB) *Names {
	n := NewNames(NamesConfig{})
	for name, addrs := range map[string][]netip.Addr{
		"pypi.org": {shared, sharedV}, "other.org": {shared, sharedV}, "files.pypi.org": {alone}, "a.b.pypi.org": {alone},
		"intranet.test": {athome}, "evil.test": {addr("169.254.169.254"), addr("127.0.0.1"), addr("192.168.1.5"), addr("64:ff9b::a9fe:a9fe"), addr("2002:7f00:1::1"), addr("64:ff9b::c633:6401"), addr("64:ff9b::a01:101")},
	} {
		if err := n.Grant(name, addrs, time.Minute, now); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func tls(name string) Seen { return Seen{Kind: SeenTLS, Name: name, Nameless: name == ""} }

func byDomain(domains ...string) Rule {
	r := Rule{Action: Allow}
	for _, d := range domains {
		r.To = append(r.To, Peer{Domain: d})
	}
	return r
}

func with(r Rule, change func(*Rule)) Rule {
	change(&r)
	return r
}

// A look-alike of an allowed name is another name: neither asked nor verified.
func TestLookAlikesAreRefused(t *testing.T) {
	tests := []struct {
		pattern, name string
		same          bool
	}{
		{"example.com", "example.com", true},
		{"example.com", "EXAMPLE.com", true},
		{"example.com", "example.com.", true},
		{"EXAMPLE.COM.", "example.com", true},
		{"bücher.example", "xn--bcher-kva.example", true},
		{"example.com", "evilexample.com", false},
		{"example.com", "example.com.evil.io", false},
		{"example.com", "www.example.com", false},
		{"example.com", "example.co", false},
		{"example.com", "com", false},
		{"example.com", "ex\u0430mple.com", false},   // Cyrillic
		{"example.com", "xn--exmple-4nf.com", false}, // the same
		{"example.com", "examp1e.com", false},
		{"*.example.com", "www.example.com", true},
		{"*.example.com", "example.com", false},
		{"*.example.com", "a.b.example.com", false},
		{"*.example.com", "wwwexample.com", false},
		{"*.example.com", "www.example.com.evil.io", false},
		{"**.example.com", "www.example.com", true},
		{"**.example.com", "a.b.c.example.com", true},
		{"**.example.com", "example.com", false},
		{"**.example.com", "aexample.com", false},
		{"**.example.com", "a.example.com.evil.io", false},
		{"*.com", "example.com", true},
	}
	for _, tt := range tests {
		pattern, err := NormalizePattern(tt.pattern)
		if err != nil {
			t.Fatal(err)
		}
		rules := mustCompile(t, allowing(byDomain(pattern)), here)
		name, err := NormalizeName(tt.name)
		if err != nil {
			t.Fatal(err)
		}
		// Even if the address were granted under the other name.
		n := NewNames(NamesConfig{})
		grant1(t, n, name, "198.51.100.1", time.Minute, now)
		q := Query{Proto: uint8(TCP), Dst: netip.AddrPortFrom(shared, 443), Names: n, Now: now, Seen: tls(name)}
		if asked, passed := rules.DecideName(name).Allowed, rules.Decide(q).Allowed(); asked != tt.same || passed != tt.same {
			t.Errorf("%s under %s: may be asked %v, may be reached %v; want %v", tt.name, tt.pattern, asked, passed, tt.same)
		}
	}
}

func TestWhatTheFirstBytesMustSay(t *testing.T) {
	pypi := byDomain("pypi.org", "**.pypi.org")
	set := func(change func(*Rule)) []Rule { return []Rule{with(pypi, change)} }
	nameless := func(ech Setting) []Rule {
		return set(func(r *Rule) { r.MissingName, r.ECH = SettingAllow, ech })
	}
	tests := []struct {
		name  string
		rules []Rule
		proto Protocol
		dst   netip.AddrPort
		seen  Seen
		want  string // the verdict, and its reason
	}{
		{"before anything is read, it asks", nil, TCP, netip.AddrPortFrom(shared, 443), Seen{}, "read first-bytes TCP for egress[0] (unread)"},
		{"the granted name passes", nil, TCP, netip.AddrPortFrom(shared, 443), tls("pypi.org"), "allow TCP to 198.51.100.1:443 by egress[0]"},
		{"over IPv6 too", nil, TCP, netip.AddrPortFrom(sharedV, 443), tls("pypi.org"), "allow TCP to [2001:db8:1::1]:443 by egress[0]"},
		{"as a 4-in-6 form too", nil, TCP, netip.MustParseAddrPort("[::ffff:198.51.100.1]:443"), tls("pypi.org"), "allow TCP to 198.51.100.1:443 by egress[0]"},
		{"the other name of the same server does not", nil, TCP, netip.AddrPortFrom(shared, 443), tls("other.org"), "reject TCP by default (name-mismatch)"},
		{"a name of the rule that is granted for another address does not", nil, TCP, netip.AddrPortFrom(shared, 443), tls("files.pypi.org"), "reject TCP by default (name-mismatch)"},
		{"a name of the rule that was never granted does not", nil, TCP, netip.AddrPortFrom(shared, 443), tls("www.pypi.org"), "reject TCP by default (name-mismatch)"},
		{"no server name does not", nil, TCP, netip.AddrPortFrom(shared, 443), tls(""), "reject TCP by default (no-name)"},
		{"no server name does, if settled so", set(func(r *Rule) { r.MissingName = SettingAllow }), TCP, netip.AddrPortFrom(shared, 443), tls(""), "allow TCP to 198.51.100.1:443 by egress[0]"},
		{"but a wrong one does not then", set(func(r *Rule) { r.MissingName = SettingAllow }), TCP, netip.AddrPortFrom(shared, 443), tls("other.org"), "reject TCP by default (name-mismatch)"},
		{"nor does a hello that was not read whole", nameless(""), TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenTLS}, "reject TCP by default (no-name)"},
		{"nor an encrypted hello without an outer name", nameless(""), TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenTLS, Nameless: true, ECH: true}, "reject TCP by default (no-name)"},
		{"unless that is settled too", nameless(SettingAllow), TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenTLS, Nameless: true, ECH: true}, "allow TCP to 198.51.100.1:443 by egress[0]"},
		{"nor silence", nameless(""), TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenServerFirst}, "reject TCP by default (no-name)"},
		{"nor opaque bytes", nameless(""), TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenOpaque}, "reject TCP by default (no-name)"},
		{"its own address for a name does", nameless(""), TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenHTTP, Nameless: true, Address: shared}, "allow TCP to 198.51.100.1:443 by egress[0]"},
		{"another address does not", nameless(""), TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenHTTP, Nameless: true, Address: netip.MustParseAddr("198.51.100.2")}, "reject TCP by default (no-name)"},
		{"an encrypted hello does not", nil, TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenTLS, Name: "pypi.org", ECH: true}, "reject TCP by default (encrypted-hello)"},
		{"an encrypted hello does, if settled so", set(func(r *Rule) { r.ECH = SettingAllow }), TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenTLS, Name: "pypi.org", ECH: true}, "allow TCP to 198.51.100.1:443 by egress[0]"},
		{"with a wrong outer name it does not even then", set(func(r *Rule) { r.ECH = SettingAllow }), TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenTLS, Name: "other.org", ECH: true}, "reject TCP by default (name-mismatch)"},
		{"silence does not", nil, TCP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenServerFirst}, "reject TCP by default (no-name)"},
		{"a bare address does not", nil, TCP, netip.MustParseAddrPort("203.0.113.9:443"), Seen{}, "reject TCP by default"},
		{"a bare address does not with the right name", nil, TCP, netip.MustParseAddrPort("203.0.113.9:443"), tls("pypi.org"), "reject TCP by default"},
		{"ssh waits for nothing", nil, TCP, netip.AddrPortFrom(shared, 22), Seen{}, "allow TCP to 198.51.100.1:22 by egress[0]"},
		{"ssh waits, if strict", set(func(r *Rule) { r.Verify = VerifyRuleStrict }), TCP, netip.AddrPortFrom(shared, 22), Seen{}, "read first-bytes TCP for egress[0] (unread)"},
		{"https waits for nothing, if by grant", set(func(r *Rule) { r.Verify = VerifyRuleGrant }), TCP, netip.AddrPortFrom(shared, 443), Seen{}, "allow TCP to 198.51.100.1:443 by egress[0]"},
		{"NTP waits for nothing", nil, UDP, netip.AddrPortFrom(shared, 123), Seen{}, "allow UDP to 198.51.100.1:123 by egress[0]"},
		{"ping is not meant by a rule that lists nothing", nil, ICMPv4, netip.AddrPortFrom(shared, 0), Seen{}, "reject ICMP by default"},
		{"nor is SCTP", nil, SCTP, netip.AddrPortFrom(shared, 443), Seen{}, "reject SCTP by default"},
		{"ping waits for nothing, if it is listed", set(func(r *Rule) { r.ICMP = []ICMP{{Family: IPv4}} }), ICMPv4, netip.AddrPortFrom(shared, 0), Seen{}, "allow ICMP to 198.51.100.1:0 by egress[0]"},
		{"QUIC is read", nil, UDP, netip.AddrPortFrom(shared, 443), Seen{}, "read first-bytes UDP for egress[0] (unread)"},
		{"QUIC passes with its name", nil, UDP, netip.AddrPortFrom(shared, 443), Seen{Kind: SeenQUIC, Name: "pypi.org"}, "allow UDP to 198.51.100.1:443 by egress[0]"},
		{"QUIC is refused at once, if settled so", set(func(r *Rule) { r.QUIC = SettingRefuse }), UDP, netip.AddrPortFrom(shared, 443), Seen{}, "reject UDP by egress[0] (quic)"},
		{"TCP is not, then", set(func(r *Rule) { r.QUIC = SettingRefuse }), TCP, netip.AddrPortFrom(shared, 443), tls("pypi.org"), "allow TCP to 198.51.100.1:443 by egress[0]"},
		{"clear-text HTTP passes by its host", nil, TCP, netip.AddrPortFrom(shared, 80), Seen{Kind: SeenHTTP, Name: "pypi.org", Method: "GET", Path: "/"}, "allow TCP to 198.51.100.1:80 by egress[0]"},
		{"and not by another", nil, TCP, netip.AddrPortFrom(shared, 80), Seen{Kind: SeenHTTP, Name: "other.org", Method: "GET", Path: "/"}, "reject TCP by default (name-mismatch)"},
		{"CONNECT does not", nil, TCP, netip.AddrPortFrom(shared, 80), Seen{Kind: SeenHTTP, Name: "pypi.org", Method: "CONNECT"}, "reject TCP by egress[0] (http-request)"},

		{"an address rule further down may still allow it", []Rule{pypi, {Action: Allow, To: []Peer{{CIDR: cidr("198.51.100.0/24")}}}}, TCP, netip.AddrPortFrom(shared, 443), tls("other.org"), "allow TCP to 198.51.100.1:443 by egress[1]"},
		{"an address rule further up asks for nothing", []Rule{{Action: Allow, To: []Peer{{CIDR: cidr("198.51.100.0/24")}}}, pypi}, TCP, netip.AddrPortFrom(shared, 443), Seen{}, "allow TCP to 198.51.100.1:443 by egress[0]"},
		{"a refusal by name is for that name only", []Rule{with(byDomain("other.org"), func(r *Rule) { r.Action = Drop }), pypi}, TCP, netip.AddrPortFrom(shared, 443), tls("pypi.org"), "allow TCP to 198.51.100.1:443 by egress[1]"},
		{"and for it", []Rule{with(byDomain("other.org"), func(r *Rule) { r.Action = Drop }), byDomain("other.org")}, TCP, netip.AddrPortFrom(shared, 443), tls("other.org"), "drop TCP by egress[0]"},
		{"a name that is refused is refused at every address", []Rule{with(byDomain("bad.org"), func(r *Rule) { r.Action = Drop }), pypi, {Action: Allow}}, TCP, netip.AddrPortFrom(shared, 443), tls("bad.org"), "drop TCP by egress[0]"},

		{"a private address is not reached by a name", []Rule{byDomain("intranet.test")}, TCP, netip.AddrPortFrom(athome, 443), tls("intranet.test"), "reject TCP by default (private-address)"},
		{"unless settled so", []Rule{with(byDomain("intranet.test"), func(r *Rule) { r.PrivateAddresses = SettingAllow })}, TCP, netip.AddrPortFrom(athome, 443), tls("intranet.test"), "allow TCP to 10.1.1.1:443 by egress[0]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rules := tt.rules
			if rules == nil {
				rules = []Rule{pypi}
			}
			v := mustCompile(t, allowing(rules...), here).Decide(Query{Proto: uint8(tt.proto), Dst: tt.dst, Names: granted(t), Now: now, Seen: tt.seen, ICMPType: 8})
			got := v.String()
			if v.Reason() != "" {
				got += " (" + string(v.Reason()) + ")"
			}
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if v.Verify() != VerifyNone && (v.Allowed() || v.Target().IsValid() || v.Permits(tt.dst)) {
				t.Errorf("%v lets it be dialled", v)
			}
			if mismatch := v.Reason() == ReasonMismatch || v.Reason() == ReasonNoName; mismatch && v.Tried() != "egress[0]" {
				t.Errorf("it does not say which rule was tried: %q", v.Tried())
			}
		})
	}
}

// A connection is set up before its first bytes are read, but not where they can say nothing
// that would be allowed.
func TestContactIsWhereSomethingMayBeSaid(t *testing.T) {
	pypi, deny := byDomain("pypi.org"), func(r *Rule) { r.Action = Reject }
	for _, tt := range []struct {
		what    string
		rules   []Rule
		port    uint16
		to      netip.Addr
		contact bool
	}{
		{"a granted name", []Rule{pypi}, 443, shared, true},
		{"a granted name behind a refused one", []Rule{with(byDomain("other.org"), deny), pypi}, 443, shared, true},
		{"an address rule behind a refused name", []Rule{with(byDomain("other.org"), deny), {Action: Allow, To: []Peer{{CIDR: cidr("198.51.100.0/24")}}}}, 443, shared, true},
		{"refused names only", []Rule{with(byDomain("other.org"), deny), with(byDomain("files.pypi.org"), func(r *Rule) { r.Ports = []Port{{Protocol: TCP, Port: 443}} })}, 443, shared, false},
		{"DNS over TLS", []Rule{pypi}, 853, shared, false},
		{"DNS over TLS that is listed", []Rule{with(pypi, func(r *Rule) { r.Ports = []Port{{Protocol: TCP, Port: 853}} })}, 853, shared, true},
		{"what carries a private address", []Rule{byDomain("evil.test")}, 443, addr("64:ff9b::a01:101"), false},
		{"what carries a metadata address", []Rule{byDomain("evil.test")}, 443, addr("64:ff9b::a9fe:a9fe"), false},
		{"what carries an address of the same name", []Rule{byDomain("evil.test", "pypi.org")}, 443, addr("64:ff9b::c633:6401"), true},
		{"a private address", []Rule{byDomain("intranet.test")}, 443, athome, false},
	} {
		to := netip.AddrPortFrom(tt.to, tt.port)
		v := mustCompile(t, allowing(tt.rules...), here).Decide(Query{Proto: uint8(TCP), Dst: to, Names: granted(t), Now: now})
		if v.PermitsContact(to) != tt.contact || v.Permits(to) || v.Allowed() {
			t.Errorf("%s: %v, contact %v, want it: %v", tt.what, v, v.Contact(), tt.contact)
		}
	}
}

// What a request says next may be decided by another rule than what it said first.
func TestEachRequestIsJudgedWhereANameDecides(t *testing.T) {
	nameless := with(byDomain("pypi.org"), func(r *Rule) { r.MissingName = SettingAllow })
	refused := with(byDomain("other.org"), func(r *Rule) { r.Action, r.Ports = Reject, []Port{{Protocol: TCP, Port: 80}} })
	web := Rule{Action: Allow, To: []Peer{{CIDR: cidr("198.51.100.0/24")}}}
	for _, tt := range []struct {
		what  string
		rules []Rule
		seen  Seen
		each  bool
	}{
		{"by its name", []Rule{nameless}, Seen{Kind: SeenHTTP, Name: "pypi.org", Method: "GET", Path: "/"}, true},
		{"without a name", []Rule{nameless}, Seen{Kind: SeenHTTP, Nameless: true, Method: "GET", Path: "/"}, true},
		{"by its address below a refusal by name", []Rule{refused, web}, Seen{Kind: SeenHTTP2, Name: "third.org", Method: "GET", Path: "/"}, true},
		{"by its address where no name decides", []Rule{web, nameless}, Seen{Kind: SeenHTTP, Name: "third.org", Method: "GET", Path: "/"}, false},
		{"in TLS", []Rule{nameless}, tls(""), false},
	} {
		v := mustCompile(t, allowing(tt.rules...), here).Decide(Query{Proto: uint8(TCP), Dst: netip.AddrPortFrom(shared, 80), Names: granted(t), Now: now, Seen: tt.seen})
		if !v.Allowed() || v.EachRequest() != tt.each {
			t.Errorf("%s: %v, each request %v", tt.what, v, v.EachRequest())
		}
	}
}

// No name opens a special address, in whatever form it hides; only a rule for
// the address does.
func TestNoNameOpensASpecialAddress(t *testing.T) {
	all := with(byDomain("evil.test"), func(r *Rule) { r.Verify, r.PrivateAddresses = VerifyRuleGrant, SettingAllow })
	for _, tt := range []struct{ dst, by string }{
		{"169.254.169.254", "special:metadata"}, {"::ffff:169.254.169.254", "special:metadata"}, {"64:ff9b::a9fe:a9fe", "special:metadata"},
		{"127.0.0.1", "special:loopback"}, {"2002:7f00:1::1", "special:loopback"}, {"192.168.1.5", "special:host"},
	} {
		for _, mode := range []Mode{Enforce, Audit} {
			p := allowing(all)
			p.Spec.Mode = mode
			rules := mustCompile(t, p, here)
			q := Query{Proto: uint8(TCP), Dst: netip.AddrPortFrom(addr(tt.dst), 80), Names: granted(t), Now: now}
			if v := rules.Decide(q); v.Allowed() || v.Rule() != tt.by {
				t.Errorf("%s in mode %s: %v, want it refused by %s", tt.dst, mode, v, tt.by)
			}
			if rules.Grantable("evil.test", addr(tt.dst)) {
				t.Errorf("%s may be granted", tt.dst)
			}
		}
	}
	// What an address carries is judged with the names of the whole.
	carried := netip.AddrPortFrom(addr("64:ff9b::c633:6401"), 80)
	if v := mustCompile(t, allowing(all), here).Decide(Query{Proto: uint8(TCP), Dst: carried, Names: granted(t), Now: now}); v.Target() != carried {
		t.Errorf("a granted NAT64 address of a public server: %v", v)
	}
	carried = netip.AddrPortFrom(addr("64:ff9b::a01:101"), 80)
	strict := with(all, func(r *Rule) { r.PrivateAddresses = "" })
	if v := mustCompile(t, allowing(strict), here).Decide(Query{Proto: uint8(TCP), Dst: carried, Names: granted(t), Now: now}); v.Allowed() {
		t.Errorf("a granted NAT64 address of a private server: %v", v)
	}
	opened := allowing(all, Rule{Action: Allow, To: []Peer{{Entity: EntityMetadata}}})
	rules := mustCompile(t, opened, here)
	if !rules.Grantable("evil.test", addr("169.254.169.254")) || rules.Grantable("evil.test", addr("127.0.0.1")) {
		t.Error("the policy opens metadata by itself, and loopback not")
	}
}

// Grants outlive a reload, and count for what the new rules say.
func TestGrantsSurviveAReload(t *testing.T) {
	n := granted(t)
	q := Query{Proto: uint8(TCP), Dst: netip.AddrPortFrom(shared, 443), Names: n, Now: now, Seen: tls("pypi.org")}
	before := mustCompile(t, allowing(byDomain("pypi.org")), here)
	same := mustCompile(t, allowing(byDomain("x.test"), byDomain("*.org")), here)
	without := mustCompile(t, allowing(byDomain("other.org")), here)
	v := before.Decide(q)
	if !v.Allowed() || v.Name() != "pypi.org" {
		t.Fatalf("before: %v by name %q", v, v.Name())
	}
	if v := same.Decide(q); !v.Allowed() || v.Rule() != "egress[1]" {
		t.Errorf("still allowed, by another rule: %v", v)
	}
	if v := without.Decide(q); v.Allowed() {
		t.Errorf("no longer allowed: %v", v)
	}
	// A flow that lives on keeps the grant that it began with; a new one does not.
	q.Now = now.Add(time.Hour * 10)
	if v := same.Decide(q); v.Allowed() {
		t.Errorf("after the grant is over: %v", v)
	}
	q.Held = v.Name()
	if v := same.Decide(q); !v.Allowed() {
		t.Errorf("a flow that was let in is cut after the grant is over: %v", v)
	}
	if v := without.Decide(q); v.Allowed() {
		t.Errorf("a held grant outlives its rule: %v", v)
	}
}

func TestAuditLetsThroughAndSaysWhatItWouldNot(t *testing.T) {
	p := allowing(byDomain("pypi.org"), Rule{Name: "lan", Action: Drop, To: []Peer{{CIDR: cidr("203.0.113.0/24")}}})
	p.Spec.Mode = Audit
	rules := mustCompile(t, p, here)
	tests := []struct {
		name    string
		dst     string
		seen    Seen
		by      string
		reason  Reason
		audited bool
	}{
		{"what passes passes", "198.51.100.1:443", tls("pypi.org"), "egress[0]", "", false},
		{"another name", "198.51.100.1:443", tls("other.org"), "default", ReasonMismatch, true},
		{"a dropped network", "203.0.113.1:80", Seen{}, "egress[1] lan", "", true},
		{"an address of no rule", "192.0.2.1:80", Seen{}, "default", "", true},
	}
	for _, tt := range tests {
		v := rules.Decide(Query{Proto: uint8(TCP), Dst: netip.MustParseAddrPort(tt.dst), Names: granted(t), Now: now, Seen: tt.seen})
		if !v.Allowed() || v.Rule() != tt.by || v.Reason() != tt.reason || v.Audited() != tt.audited || !v.Permits(netip.MustParseAddrPort(tt.dst)) {
			t.Errorf("%s: %v, reason %q, audited %v", tt.name, v, v.Reason(), v.Audited())
		}
	}
	asked := Query{Proto: uint8(TCP), Dst: netip.MustParseAddrPort("198.51.100.1:8443"), Names: granted(t), Now: now}
	p.Spec.Egress[0].Ports = []Port{{Protocol: TCP, Port: 443}}
	if v := mustCompile(t, p, here).Decide(asked); v.Allowed() || v.Verify() != VerifyFirstBytes {
		t.Errorf("what nothing allows, to a granted address, is let through before it said a name: %v", v)
	}
	// A name is learnt by reading it, where names are said.
	for port, verify := range map[uint16]Verify{8080: VerifyFirstBytes, 22: VerifyNone} {
		if v := rules.Decide(Query{Proto: uint8(TCP), Dst: netip.AddrPortFrom(alone, port), Names: granted(t), Now: now}); v.Verify() != verify || v.Allowed() != (verify == VerifyNone) {
			t.Errorf("port %d of an address that is granted under names of no rule: %v", port, v)
		}
	}
	if !rules.Grantable("intranet.test", athome) || rules.Grantable("intranet.test", addr("127.0.0.1")) {
		t.Error("in audit mode, private addresses are granted and special ones are not")
	}
	if v := rules.DecideName("unknown.test"); !v.Allowed || !v.Audited || !v.Grants || v.Rule != "default" {
		t.Errorf("a name that is not on the list: %+v", v)
	}
}
