package policy

import (
	"net/netip"
	"slices"
	"testing"
)

// An environment with everything that an operator or a host can add.
func crowded() Environment {
	env := here
	env.Host = slices.Concat(here.Host, prefixes("203.0.113.0/24", "2001:db8:a::/64", "2001:db8:b::/128", "192.168.1.255/32", "169.254.7.0/24"))
	env.Metadata = prefixes("192.0.2.80/32", "169.254.77.77/32", "fd00:77::/64", "10.9.0.0/24")
	env.NAT64 = prefixes("2600:64::/96", "2600:32::/32", "2600:40::/40", "2600:48::/48", "2600:56::/56", "2600:65::/64", "fd64::/96")
	return env
}

func TestWhatTheEnvironmentAddsIsClosed(t *testing.T) {
	broad := allowing(
		Rule{Action: Allow},
		Rule{Action: Allow, To: []Peer{{CIDR: everyIPv4}, {CIDR: everyIPv6}, {Entity: EntityWorld}, {Entity: EntityPrivate}, {Entity: EntityLinkLocal}}},
		Rule{Action: Allow, To: []Peer{{CIDR: cidr("203.0.112.0/23")}, {CIDR: cidr("2600::/16")}}},
	)
	rules := mustCompile(t, broad, crowded())
	tests := []struct{ name, dst, by string }{
		{"AnyIP", "203.0.113.77", "special:host"},
		{"AnyIP of IPv6", "2001:db8:a::1234", "special:host"},
		{"AnyIP behind 6to4", "2002:cb00:714d::1", "special:host"},
		{"a subnet-router anycast address", "2001:db8:b::", "special:host"},
		{"a broadcast address", "192.168.1.255", "special:host"},
		{"AnyIP inside link-local stays there, which a rule opens", "169.254.7.7", "egress[1]"},
		{"a metadata service of the operator's", "192.0.2.80", "special:metadata"},
		{"one in link-local is not link-local", "169.254.77.77", "special:metadata"},
		{"one in a private network", "10.9.0.8", "special:metadata"},
		{"one by IPv6", "fd00:77::8", "special:metadata"},
		{"one by NAT64", "64:ff9b::c000:250", "special:metadata"},
		{"one that a local address spells", "fd12::c000:250", "special:metadata"},
		{"own NAT64 of 96 bits", "2600:64::7f00:1", "special:loopback"},
		{"own NAT64 of 96 bits to the host", "2600:64::c0a8:105", "special:host"},
		{"own NAT64 of 96 bits to AnyIP", "2600:64::cb00:714d", "special:host"},
		{"own NAT64 of 32 bits", "2600:32:a9fe:a9fe::", "special:metadata"},
		{"own NAT64 of 40 bits", "2600:40:a9:fea9:fe::", "special:metadata"},
		{"own NAT64 of 48 bits", "2600:48:0:a9fe:a9:fe00::", "special:metadata"},
		{"own NAT64 of 56 bits", "2600:56:0:a9:fe:a9fe::", "special:metadata"},
		{"own NAT64 of 64 bits", "2600:65::a9:fea9:fe00:0", "special:metadata"},
		{"own NAT64 with something in the octet u", "2600:65::ffa9:fea9:fe00:0", "special:metadata"},
		{"own NAT64 in a private network", "fd64::7f00:1", "special:loopback"},
		{"own NAT64 to a public address", "2600:64::808:808", "egress[0]"},
		{"a neighbour of AnyIP", "203.0.112.1", "egress[0]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if v := rules.Decide(tcpTo(netip.AddrPortFrom(netip.MustParseAddr(tt.dst), 80).String())); v.Rule() != tt.by {
				t.Errorf("%s: %v, want %s", tt.dst, v, tt.by)
			}
			if rules.Grantable("a.test", netip.MustParseAddr(tt.dst)) != (tt.by[0] == 'e') {
				t.Errorf("%s is grantable, or is not", tt.dst)
			}
		})
	}
}

func TestWhatOpensWhatTheEnvironmentAdds(t *testing.T) {
	tests := []struct {
		name, dst string
		peer      Peer
		open      bool
	}{
		{"AnyIP by entity host", "203.0.113.77", Peer{Entity: EntityHost}, true},
		{"AnyIP by its one address", "203.0.113.77", Peer{CIDR: cidr("203.0.113.77/32")}, true},
		{"AnyIP not by a wider network", "203.0.113.77", Peer{CIDR: cidr("203.0.112.0/23")}, false},
		{"AnyIP not by what a wider network leaves over", "203.0.113.77", Peer{CIDR: cidr("203.0.112.0/23"), Except: []netip.Prefix{cidr("203.0.113.76/32")}}, false},
		{"a configured metadata service by its entity", "169.254.77.77", Peer{Entity: EntityMetadata}, true},
		{"a configured metadata service by its one address", "192.0.2.80", Peer{CIDR: cidr("192.0.2.80/32")}, true},
		{"a configured metadata service not by its network", "192.0.2.80", Peer{CIDR: cidr("192.0.2.0/24")}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rules := mustCompile(t, allowing(Rule{Action: Allow, To: []Peer{tt.peer}}), crowded())
			if v := rules.Decide(tcpTo(tt.dst + ":80")); v.Allowed() != tt.open {
				t.Errorf("%v, want open: %v", v, tt.open)
			}
		})
	}
}

func TestClientsOfTheEnvironment(t *testing.T) {
	any := allowing()
	any.Spec.Ingress = []Rule{{Action: Allow}}
	world := allowing()
	world.Spec.Ingress = []Rule{{Action: Allow, From: []Peer{{Entity: EntityWorld}}}}
	holes := allowing()
	holes.Spec.Ingress = []Rule{{Action: Allow, From: []Peer{{CIDR: everyIPv4, Except: []netip.Prefix{cidr("192.0.2.81/32"), cidr("169.254.169.255/32")}}}}}
	pod := crowded()
	pod.HostClients = true
	tests := []struct {
		name   string
		policy *Policy
		env    Environment
		client string
		by     string
	}{
		{"a configured metadata service is none", any, crowded(), "192.0.2.80", "special:metadata"},
		{"nor is one by what a network of everybody leaves over", holes, crowded(), "192.0.2.80", "special:metadata"},
		{"nor is a known one", holes, crowded(), "169.254.169.254", "special:metadata"},
		{"nor is one behind own NAT64", any, crowded(), "2600:64::c000:250", "special:metadata"},
		{"nor is loopback behind own NAT64", any, crowded(), "2600:65::7f:0:100:0", "special:loopback"},
		{"an ordinary address behind own NAT64 is one", any, crowded(), "2600:64::808:808", "ingress[0]"},
		{"the node reaches its pod by any", any, pod, "192.168.1.5", "ingress[0]"},
		{"the node reaches its pod by world", world, pod, "192.168.1.5", "ingress[0]"},
		{"the host is not world to a published port", world, crowded(), "192.168.1.5", "default"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := mustCompile(t, tt.policy, tt.env).Decide(Query{Ingress: true, Proto: uint8(TCP), Src: netip.AddrPortFrom(netip.MustParseAddr(tt.client), 4000), Dst: netip.MustParseAddrPort("10.0.2.100:80")})
			if v.Rule() != tt.by {
				t.Errorf("%v, want %s", v, tt.by)
			}
		})
	}
}

func TestAnUnknownHostDeniesEverything(t *testing.T) {
	many := here
	for i := range MaxHostRanges + 1 {
		many.Host = append(many.Host, netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), 32))
	}
	unknown := here
	unknown.HostUnknown = true
	for name, env := range map[string]Environment{"too many": many, "unknown": unknown} {
		rules := mustCompile(t, Builtin{Pod: true}.Policy(), env)
		if v := rules.Decide(tcpTo("1.1.1.1:80")); v.Allowed() {
			t.Errorf("%s: %v", name, v)
		}
		if rules.DecideName("a.test").Allowed || rules.Grantable("a.test", netip.MustParseAddr("1.1.1.1")) {
			t.Errorf("%s: a name may be asked", name)
		}
	}
	many.Host = many.Host[:MaxHostRanges]
	if v := mustCompile(t, Builtin{Pod: true}.Policy(), many).Decide(tcpTo("1.1.1.1:80")); !v.Allowed() {
		t.Errorf("at the bound: %v", v)
	}
}

func TestWhatAnOperatorMayAdd(t *testing.T) {
	for _, s := range []string{"", "x", "10.0.0.0/23", "10.0.0.1/24", "fd00::/63", "127.0.0.1", "::1", "224.0.0.1", "0.0.0.0", "255.255.255.255", "fe80::1%eth0", "::/96"} {
		if p, err := ParseMetadata([]string{s}); err == nil {
			t.Errorf("metadata %q is taken for %v", s, p)
		}
	}
	for _, s := range []string{"", "2600::1", "10.0.0.0/32", "2600::/33", "2600::1/96", "::ffff:0:0/96", "2600::/128"} {
		if p, err := ParseNAT64([]string{s}); err == nil {
			t.Errorf("NAT64 prefix %q is taken for %v", s, p)
		}
	}
	if _, err := ParseMetadata(slices.Repeat([]string{"10.0.0.1"}, MaxMetadata+1)); err == nil {
		t.Error("too many metadata services are taken")
	}
	if _, err := ParseNAT64(slices.Repeat([]string{"2600::/96"}, MaxNAT64+1)); err == nil {
		t.Error("too many NAT64 prefixes are taken")
	}
	if got, err := ParseMetadata([]string{"::ffff:10.0.0.1", "fd00:77::/64"}); err != nil || !slices.Equal(got, prefixes("10.0.0.1/32", "fd00:77::/64")) {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := Compile(allowing(), Environment{NAT64: prefixes("2600::/33")}); err == nil {
		t.Error("Compile takes a NAT64 prefix of 33 bits")
	}
}
