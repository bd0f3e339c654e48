package policy

import (
	"errors"
	"math"
	"net/netip"
	"reflect"
	"testing"
	"time"
)

// refuse is a rule that drops what r is about.
func refuse(r Rule) Rule { return with(r, func(r *Rule) { r.Action = Drop }) }

func TestWhichNamesMayBeAsked(t *testing.T) {
	pypi := byDomain("pypi.org", "*.pypi.org", "**.pypi.org")
	web := []Port{{Protocol: TCP, Port: 80}}
	tests := []struct {
		name  string
		rules []Rule
		ask   string
		want  NameVerdict
	}{
		{"no name where there is no rule", nil, "any.test", NameVerdict{Rule: "default", Refusal: RefuseNXDOMAIN}},
		{"none where rules are by address only", []Rule{{Action: Allow, To: []Peer{{CIDR: cidr("10.0.0.0/8")}}}}, "any.test", NameVerdict{Rule: "default", Refusal: RefuseNXDOMAIN}},
		{"nor if one of them is of a resolver", []Rule{{Action: Allow, To: []Peer{{CIDR: cidr("10.0.0.53/32")}}, Ports: []Port{{Protocol: UDP, Port: 53}}}}, "any.test", NameVerdict{Rule: "default", Refusal: RefuseNXDOMAIN}},
		{"nor a reverse one", []Rule{{Action: Allow, To: []Peer{{CIDR: cidr("10.0.0.0/8")}}}}, "1.0.0.10.in-addr.arpa", NameVerdict{Rule: "default", Refusal: RefuseNXDOMAIN}},
		{"a name on the list", []Rule{pypi}, "pypi.org", NameVerdict{Allowed: true, Rule: "egress[0]", Grants: true, Pattern: "pypi.org"}},
		{"the closest pattern is named", []Rule{pypi}, "a.pypi.org", NameVerdict{Allowed: true, Rule: "egress[0]", Grants: true, Pattern: "*.pypi.org"}},
		{"a deep one", []Rule{pypi}, "b.a.pypi.org", NameVerdict{Allowed: true, Rule: "egress[0]", Grants: true, Pattern: "**.pypi.org"}},
		{"a name off the list", []Rule{pypi}, "other.org", NameVerdict{Rule: "default", Refusal: RefuseNXDOMAIN}},
		{"not even beside rules by address", []Rule{pypi, {Action: Allow, To: []Peer{{CIDR: cidr("10.0.0.0/8")}}}}, "other.org", NameVerdict{Rule: "default", Refusal: RefuseNXDOMAIN}},
		{"any name where the internet is open", []Rule{pypi, {Action: Allow, To: []Peer{{Entity: EntityWorld}}}}, "other.org", NameVerdict{Allowed: true, Rule: "egress[1]"}},
		{"not where only ping is", []Rule{pypi, {Action: Allow, ICMP: []ICMP{{Family: IPv4}}}}, "other.org", NameVerdict{Rule: "default", Refusal: RefuseNXDOMAIN}},
		{"but one that is refused before", []Rule{refuse(byDomain("other.org")), {Action: Allow}}, "other.org", NameVerdict{Rule: "egress[0]", Refusal: RefuseNXDOMAIN}},
		{"unless for some ports only", []Rule{with(refuse(byDomain("other.org")), func(r *Rule) { r.Ports = web }), {Action: Allow}}, "other.org", NameVerdict{Allowed: true, Rule: "egress[1]", Grants: true}},
		{"a refusal of everything before the list", []Rule{{Action: Reject}, pypi}, "pypi.org", NameVerdict{Rule: "egress[0]", Refusal: RefuseNXDOMAIN}},
		{"a refusal of one port of everything before the list", []Rule{{Action: Reject, Ports: web}, pypi}, "pypi.org", NameVerdict{Allowed: true, Rule: "egress[1]", Grants: true, Pattern: "pypi.org"}},
		{"encrypted hellos, if a rule bears them", []Rule{with(pypi, func(r *Rule) { r.ECH = SettingAllow })}, "pypi.org", NameVerdict{Allowed: true, Rule: "egress[0]", Grants: true, ECH: true, Pattern: "pypi.org"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := mustCompile(t, allowing(tt.rules...), here).DecideName(tt.ask); got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
	if got := new(Rules).DecideName("a.test"); got.Allowed {
		t.Errorf("no rules: %+v", got)
	}
	rules := mustCompile(t, allowing(pypi), here)
	if n := testing.AllocsPerRun(100, func() { rules.DecideName("files.pypi.org") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestWhichAddressesMayBeGranted(t *testing.T) {
	lan := with(byDomain("*.lan.test"), func(r *Rule) { r.PrivateAddresses = SettingAllow })
	rules := mustCompile(t, allowing(byDomain("**.test"), lan, Rule{Action: Allow, To: []Peer{{CIDR: cidr("10.2.0.0/16")}, {Entity: EntityHost}}}), here)
	tests := []struct {
		name, addr string
		want       bool
	}{
		{"a.test", "198.51.100.1", true}, {"a.test", "2001:db8:1::1", true}, {"a.test", "::ffff:198.51.100.1", true}, {"a.test", "64:ff9b::198.51.100.1", true},
		{"a.test", "10.1.1.1", false}, {"a.test", "fd12::1", false}, {"a.test", "64:ff9b::10.1.1.1", false}, {"a.test", "100.64.1.1", false},
		{"nas.lan.test", "10.1.1.1", true}, {"nas.lan.test", "fd12::1", true}, {"nas.lan.test", "64:ff9b::10.1.1.1", true},
		{"a.test", "10.2.1.1", true},    // a rule by address opens it anyway
		{"a.test", "192.168.1.5", true}, // so it does the host
		{"nas.lan.test", "169.254.169.254", false}, {"nas.lan.test", "127.0.0.1", false}, {"nas.lan.test", "::1", false}, {"nas.lan.test", "0.0.0.0", false}, {"nas.lan.test", "224.0.0.1", false},
		{"nas.lan.test", "10.0.2.2", false}, {"nas.lan.test", "10.0.2.3", false}, {"nas.lan.test", "10.0.2.100", false}, {"nas.lan.test", "fe80::1", false}, {"nas.lan.test", "fe80::1%eth0", false},
		{"nas.lan.test", "2002:a9fe:a9fe::1", false}, {"nas.lan.test", "2001:0:7f00:1::1", false}, {"nas.lan.test", "::127.0.0.1", false}, {"nas.lan.test", "255.255.255.255", false},
	}
	for _, tt := range tests {
		if got := rules.Grantable(tt.name, addr(tt.addr)); got != tt.want {
			t.Errorf("%s for %s: %v", tt.addr, tt.name, got)
		}
	}
	if new(Rules).Grantable("a.test", addr("198.51.100.1")) || rules.Grantable("a.test", netip.Addr{}) {
		t.Error("no rules, or no address, and it may be granted")
	}
}

func TestWaysAroundTheGateAreClosed(t *testing.T) {
	gate := byDomain("pypi.org")
	world := Rule{Action: Allow, To: []Peer{{Entity: EntityWorld}}}
	tests := []struct {
		name  string
		rules []Rule
		proto Protocol
		dst   string
		want  string
	}{
		{"plain DNS, without rules by domain", []Rule{world}, UDP, "198.51.100.1:53", "builtin:dns"},
		{"plain DNS where the only rule lists it", []Rule{{Action: Allow, To: []Peer{{CIDR: cidr("198.51.100.1/32")}}, Ports: []Port{{Protocol: UDP, Port: 53}}}}, UDP, "198.51.100.1:53", "builtin:dns"},
		{"DNS over TLS where every name may be asked", []Rule{world}, TCP, "198.51.100.1:853", "egress[0]"},
		{"DNS over TLS where none may", []Rule{{Action: Allow, To: []Peer{{CIDR: cidr("198.51.0.0/16")}}}}, TCP, "198.51.100.1:853", "builtin:dns-over-tls"},
		{"a public resolver where every name may be asked", []Rule{world}, TCP, "8.8.8.8:443", "egress[0]"},
		{"a public resolver where none may", []Rule{{Action: Allow, To: []Peer{{CIDR: cidr("8.0.0.0/8")}}}}, TCP, "8.8.8.8:443", "builtin:dns-over-https"},
		{"plain DNS", []Rule{gate, world}, UDP, "198.51.100.1:53", "builtin:dns"},
		{"plain DNS over TCP", []Rule{gate, world}, TCP, "[2001:db8:1::1]:53", "builtin:dns"},
		{"plain DNS where a rule lists it", []Rule{gate, {Action: Allow, Ports: []Port{{Protocol: UDP, Port: 53}}}}, UDP, "198.51.100.1:53", "builtin:dns"},
		{"DNS over TLS", []Rule{gate, world}, TCP, "198.51.100.1:853", "builtin:dns-over-tls"},
		{"DNS over QUIC", []Rule{gate, world}, UDP, "198.51.100.1:853", "builtin:dns-over-tls"},
		{"DNS over TLS in a range of ports", []Rule{gate, {Action: Allow, Ports: []Port{{Protocol: TCP, Port: 800, EndPort: 900}}}}, TCP, "198.51.100.1:853", "builtin:dns-over-tls"},
		{"DNS over TLS where a rule lists it", []Rule{gate, {Action: Allow, Ports: []Port{{Protocol: TCP, Port: 853}}}}, TCP, "198.51.100.1:853", "egress[1]"},
		{"a public resolver", []Rule{gate, world}, TCP, "8.8.8.8:443", "builtin:dns-over-https"},
		{"a public resolver over IPv6", []Rule{gate, world}, UDP, "[2001:4860:4860::8888]:443", "builtin:dns-over-https"},
		{"a public resolver in a wide CIDR", []Rule{gate, {Action: Allow, To: []Peer{{CIDR: cidr("8.0.0.0/8")}}}}, TCP, "8.8.8.8:443", "builtin:dns-over-https"},
		{"a public resolver by its CIDR", []Rule{gate, {Action: Allow, To: []Peer{{CIDR: cidr("8.8.8.0/24")}}}}, TCP, "8.8.8.8:443", "egress[1]"},
		{"a public resolver inside NAT64", []Rule{gate, world}, TCP, "[64:ff9b::8.8.8.8]:443", "builtin:dns-over-https"},
		{"a ping of a public resolver", []Rule{gate, world}, ICMPv4, "8.8.8.8:0", "egress[1]"},
		{"a public resolver by a pattern", []Rule{byDomain("**.test")}, TCP, "1.1.1.1:443", "builtin:dns-over-https"},
		{"a public resolver by its name", []Rule{byDomain("**.test", "one.test")}, TCP, "1.1.1.1:443", "egress[0]"},
	}
	n := NewNames(NamesConfig{})
	grant1(t, n, "one.test", "1.1.1.1", time.Minute, now)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rules := tt.rules
			for i := range rules {
				if rules[i].To != nil && rules[i].To[0].Domain != "" {
					rules[i].Verify = VerifyRuleGrant
				}
			}
			v := mustCompile(t, allowing(rules...), here).Decide(Query{Proto: uint8(tt.proto), Dst: netip.MustParseAddrPort(tt.dst), Names: n, Now: now})
			if v.Rule() != tt.want || v.Allowed() != (tt.want[0] == 'e') {
				t.Errorf("got %v, want %s", v, tt.want)
			}
		})
	}
}

func TestDNSSettingsHaveDefaults(t *testing.T) {
	standard := []string{"A", "AAAA", "CNAME", "HTTPS", "SVCB", "SRV", "PTR"}
	all := DNS{NamesAny, RefuseDrop, []string{"TXT"}, Duration(time.Second), Duration(2 * time.Second), 63, 253, 8, 10000}
	bounds := DNS{MaxLabelLength: DefaultMaxLabelLength, MaxWildcardLength: DefaultMaxWildcardLength, MaxWildcardEntropy: DefaultMaxWildcardEntropy, MaxNamesPerMinute: DefaultMaxNamesPerMinute}
	tests := []struct {
		name     string
		in, want DNS
	}{
		{"nothing said", DNS{}, DNS{Refusal: RefuseNXDOMAIN, Types: standard, TTLFloor: Duration(time.Minute), TTLCap: Duration(time.Hour)}},
		{"a low cap lowers the floor", DNS{TTLCap: Duration(time.Second)}, DNS{Refusal: RefuseNXDOMAIN, Types: standard, TTLFloor: Duration(time.Second), TTLCap: Duration(time.Second)}},
		{"a high floor lifts the cap", DNS{TTLFloor: Duration(2 * time.Hour)}, DNS{Refusal: RefuseNXDOMAIN, Types: standard, TTLFloor: Duration(2 * time.Hour), TTLCap: Duration(2 * time.Hour)}},
		{"all said", all, all},
	}
	for _, tt := range tests {
		p := allowing()
		p.Spec.DNS = tt.in
		got := mustCompile(t, p, here).DNS()
		if tt.want.MaxLabelLength == 0 {
			tt.want.MaxLabelLength, tt.want.MaxWildcardLength = bounds.MaxLabelLength, bounds.MaxWildcardLength
			tt.want.MaxWildcardEntropy, tt.want.MaxNamesPerMinute = bounds.MaxWildcardEntropy, bounds.MaxNamesPerMinute
		}
		if !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
	for _, bad := range []DNS{{Refusal: "no"}, {Types: []string{"a"}}, {TTLFloor: -1}, {TTLCap: Duration(25 * time.Hour)}, {TTLFloor: 2, TTLCap: 1},
		{MaxLabelLength: 64}, {MaxWildcardLength: -1}, {MaxWildcardEntropy: 8.5}, {MaxWildcardEntropy: math.NaN()}, {MaxNamesPerMinute: 10001}} {
		p := allowing()
		p.Spec.DNS = bad
		if _, err := Compile(p, here); err == nil {
			t.Errorf("%+v compiles", bad)
		}
	}
	for d, want := range map[time.Duration]string{time.Minute: "1m", time.Hour: "1h", 90 * time.Minute: "1h30m", 61 * time.Second: "1m1s", 5 * time.Second: "5s"} {
		if got := Duration(d).String(); got != want {
			t.Errorf("%v is written %s, want %s", d, got, want)
		}
	}
	if got := (*Rules)(nil).DNS(); got.Refusal != RefuseNXDOMAIN {
		t.Errorf("no rules: %+v", got)
	}
}

func TestWhatNamesAnyOpens(t *testing.T) {
	pypi := byDomain("pypi.org")
	tests := []struct {
		name  string
		rules []Rule
		ask   string
		want  NameVerdict
	}{
		{"every name, without a rule", nil, "any.test", NameVerdict{Allowed: true, Rule: "builtin:any-name"}},
		{"beside a rule for another name", []Rule{pypi}, "any.test", NameVerdict{Allowed: true, Rule: "builtin:any-name"}},
		{"a rule for the name goes before it, and grants", []Rule{pypi}, "pypi.org", NameVerdict{Allowed: true, Rule: "egress[0]", Grants: true, Pattern: "pypi.org"}},
		{"not a name that a rule refuses", []Rule{refuse(pypi)}, "pypi.org", NameVerdict{Rule: "egress[0]", Refusal: RefuseNXDOMAIN}},
		{"though all addresses be refused", []Rule{{Action: Reject}}, "any.test", NameVerdict{Allowed: true, Rule: "builtin:any-name"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := allowing(tt.rules...)
			p.Spec.DNS.Names = NamesAny
			rules := mustCompile(t, p, here)
			if got := rules.DecideName(tt.ask); got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
			if !rules.GatesNames() || !rules.OpensNames() {
				t.Error("the gate is not what answers")
			}
		})
	}
}

// The gate is on unless a policy turns it off, which no rule by domain can live with.
func TestOnlyUngatedTurnsTheGateOff(t *testing.T) {
	for _, p := range []*Policy{allowing(), allowing(Rule{Action: Allow}), allowing(byDomain("pypi.org"))} {
		if !mustCompile(t, p, here).GatesNames() {
			t.Errorf("not gated: %+v", p.Spec)
		}
	}
	if !(*Rules)(nil).GatesNames() || !new(Rules).GatesNames() || (*Rules)(nil).OpensNames() || new(Rules).OpensNames() {
		t.Error("without rules names are gated, and none is open")
	}
	for _, p := range []*Policy{Builtin{}.Policy(), Builtin{Pod: true}.Policy()} {
		if mustCompile(t, p, here).GatesNames() {
			t.Errorf("%+v gates names", p.Spec)
		}
	}
	p := allowing(byDomain("pypi.org"))
	p.Spec.DNS.Names = NamesUngated
	if _, err := Compile(p, here); !errors.Is(err, errUngated) {
		t.Errorf("rules by domain without the gate: %v", err)
	}
	for _, tt := range []struct {
		name  string
		rules []Rule
		opens bool
	}{
		{"none", nil, false},
		{"addresses", []Rule{{Action: Allow, To: []Peer{{CIDR: cidr("10.0.0.0/8")}}}}, false},
		{"a domain refused", []Rule{refuse(byDomain("pypi.org"))}, false},
		{"a domain", []Rule{byDomain("pypi.org")}, true},
		{"the world", []Rule{{Action: Allow, To: []Peer{{Entity: EntityWorld}}}}, true},
	} {
		if got := mustCompile(t, allowing(tt.rules...), here).OpensNames(); got != tt.opens {
			t.Errorf("%s: OpensNames is %v", tt.name, got)
		}
	}
}
