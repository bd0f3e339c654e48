package policy

import (
	"net/netip"
	"strings"
	"testing"
)

var here = Environment{
	Gateway4: netip.MustParseAddr("10.0.2.2"), Gateway6: netip.MustParseAddr("fe80::2"),
	DNS4: netip.MustParseAddr("10.0.2.3"), DNS6: netip.MustParseAddr("fd00::3"),
	Guest: []netip.Addr{netip.MustParseAddr("10.0.2.100")},
	Host:  prefixes("192.168.1.5/32", "2001:db8::5/128", "169.254.20.10/32", "127.0.0.1/32", "fe80::9/128"),
}

func mustCompile(t *testing.T, p *Policy, env Environment) *Rules {
	t.Helper()
	r, err := Compile(p, env)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSpecialAddressesStayClosedToABroadAllow(t *testing.T) {
	// Everything that ordinary words can open.
	broad := allowing(
		Rule{Name: "all", Action: Allow},
		Rule{Name: "cidrs", Action: Allow, To: []Peer{{CIDR: everyIPv4}, {CIDR: everyIPv6}, {CIDR: cidr("128.0.0.0/1")}, {CIDR: cidr("fe00::/7")}, {CIDR: cidr("8000::/1")}}},
		Rule{Name: "holes", Action: Allow, To: []Peer{{CIDR: everyIPv4, Except: []netip.Prefix{cidr("169.254.169.254/32"), cidr("127.0.0.2/32"), cidr("224.0.0.9/32")}}}},
		Rule{Name: "world", Action: Allow, To: []Peer{{Entity: EntityWorld}, {Entity: EntityPrivate}}},
	)
	broad.Spec.DefaultAction = Allow
	rules := mustCompile(t, broad, here)
	tests := []struct{ dst, by string }{
		{"0.0.0.0", "special:this-network"}, {"0.1.2.3", "special:this-network"}, {"::", "special:this-network"},
		{"127.0.0.1", "special:loopback"}, {"127.0.0.3", "special:loopback"}, {"127.255.255.255", "special:loopback"}, {"::1", "special:loopback"},
		{"169.254.0.1", "special:link-local"}, {"169.254.169.253", "special:link-local"}, {"fe80::1", "special:link-local"}, {"febf::1", "special:link-local"},
		{"169.254.20.10", "special:link-local"}, {"fe80::9", "special:link-local"}, // the host's own, yet link-local
		{"169.254.169.254", "special:metadata"}, {"fd00:ec2::254", "special:metadata"}, {"169.254.170.2", "special:metadata"}, {"169.254.170.23", "special:metadata"},
		{"fd00:ec2::23", "special:metadata"}, {"fd20:ce::254", "special:metadata"}, {"100.100.100.200", "special:metadata"}, {"168.63.129.16", "special:metadata"},
		{"fd00:a9fe:a9fe::1", "special:metadata"}, {"fe80::a9fe:a9fe", "special:metadata"}, {"fd00:c1::a9fe:a9fe", "special:metadata"}, {"100.96.0.96", "special:metadata"},
		{"100.80.80.80", "special:metadata"}, {"fd00:100::100:200", "special:metadata"},
		{"fd12:3456::a9fe:a9fe", "special:metadata"}, {"fd12:3456::6464:64c8", "special:metadata"}, // as yet unknown clouds'
		{"2600::5efe:127.0.0.1", "special:loopback"}, {"2600::200:5efe:a9fe:a9fe", "special:metadata"}, {"fd00::5efe:192.168.1.5", "special:host"},
		{"192.0.0.192", "special:metadata"}, {"169.254.42.42", "special:metadata"}, {"fd00:42::42", "special:metadata"},
		{"224.0.0.1", "special:multicast"}, {"239.255.255.250", "special:multicast"}, {"ff02::1", "special:multicast"},
		{"240.0.0.1", "special:reserved"}, {"255.255.255.254", "special:reserved"}, {"255.255.255.255", "special:broadcast"},
		{"::2", "special:v4-compat"}, {"::127.0.0.1", "special:v4-compat"}, {"::1.1.1.1", "special:v4-compat"},
		{"10.0.2.2", "special:gateway"}, {"fe80::2", "special:gateway"}, {"10.0.2.3", "special:dns"}, {"fd00::3", "special:dns"}, {"10.0.2.100", "special:guest"},
		{"192.168.1.5", "special:host"}, {"2001:db8::5", "special:host"},
		{"fe80::1%eth0", "special:zone"}, {"2600::1%1", "special:zone"},

		{"::ffff:127.0.0.1", "special:loopback"}, {"::ffff:169.254.169.254", "special:metadata"}, {"::ffff:0.0.0.0", "special:this-network"}, {"::ffff:10.0.2.2", "special:gateway"},
		{"64:ff9b::127.0.0.1", "special:loopback"}, {"64:ff9b::169.254.169.254", "special:metadata"}, {"64:ff9b::192.168.1.5", "special:host"}, {"64:ff9b::10.0.2.2", "special:gateway"},
		{"64:ff9b:1::1.1.1.1", "special:nat64-local"}, {"::ffff:0:127.0.0.1", "special:loopback"},
		{"2002:7f00:1::1", "special:loopback"}, {"2002:a9fe:a9fe::", "special:metadata"}, {"2002::1", "special:this-network"},
		{"2001:0:7f00:1::f7f7:f7f7", "special:loopback"},  // Teredo server 127.0.0.1
		{"2001:0:101:101::5601:5601", "special:metadata"}, // Teredo client 169.254.169.254
		{"2001:0:101:101::3f57:fefa", "special:host"},     // Teredo client 192.168.1.5
	}
	for _, tt := range tests {
		v := rules.Decide(Query{Proto: uint8(TCP), Dst: netip.AddrPortFrom(netip.MustParseAddr(tt.dst), 80)})
		if v.Action() != Reject || v.Rule() != tt.by || v.Target().IsValid() {
			t.Errorf("%s: %v, want reject by %s", tt.dst, v, tt.by)
		}
	}
	for _, dst := range []string{"1.1.1.1", "10.0.2.4", "192.168.1.6", "100.64.0.1", "126.255.255.255", "128.0.0.1", "223.255.255.255", "169.253.255.255",
		"2600::1", "fd00::4", "::1:0:0:1", "64:ff9b::1.1.1.1", "2002:101:101::1", "2001:0:101:101::f7f7:f7f7", "2001:db8::6", "::ffff:0:1.1.1.1", "198.18.0.1"} {
		want := netip.AddrPortFrom(netip.MustParseAddr(dst), 80)
		if v := rules.Decide(Query{Proto: uint8(TCP), Dst: want}); v.Rule() != "egress[0] all" || v.Target() != want {
			t.Errorf("%s: %v, want it open", dst, v)
		}
	}
}

func TestWhatUnlocksASpecialAddress(t *testing.T) {
	loopbackOn := here
	loopbackOn.HostLoopback = true
	tests := []struct {
		name, peer, dst string
		env             Environment
		target          string // "": refused
	}{
		{"link-local by its entity", "link-local", "169.254.1.1", here, "169.254.1.1"},
		{"link-local by a CIDR inside", "169.254.1.0/24", "169.254.1.1", here, "169.254.1.1"},
		{"link-local by its whole range", "169.254.0.0/16", "169.254.1.1", here, "169.254.1.1"},
		{"link-local not by a wider CIDR", "169.252.0.0/14", "169.254.1.1", here, ""},
		{"metadata not by what opens link-local", "169.254.0.0/16", "169.254.169.254", here, ""},
		{"metadata not by entity link-local", "link-local", "169.254.169.254", here, ""},
		{"metadata by its entity", "metadata", "169.254.169.254", here, "169.254.169.254"},
		{"metadata by its one address", "169.254.169.254/32", "169.254.169.254", here, "169.254.169.254"},
		{"IPv6 metadata by its entity", "metadata", "fd00:ec2::254", here, "fd00:ec2::254"},
		{"IPv6 metadata not by entity private", "private", "fd00:ec2::254", here, ""},
		{"metadata of a local network by its one address", "fd00:c1::a9fe:a9fe/128", "fd00:c1::a9fe:a9fe", here, "fd00:c1::a9fe:a9fe"},
		{"multicast by its entity", "multicast", "ff02::fb", here, "ff02::fb"},
		{"class E by its entity", "reserved", "240.0.0.1", here, "240.0.0.1"},
		{"broadcast not by what opens class E", "reserved", "255.255.255.255", here, ""},
		{"broadcast not even by name", "255.255.255.255/32", "255.255.255.255", here, ""},
		{"the host by its entity", "host", "192.168.1.5", here, "192.168.1.5"},
		{"the host by its one address", "192.168.1.5/32", "192.168.1.5", here, "192.168.1.5"},
		{"the host not by its network", "192.168.1.0/24", "192.168.1.5", here, ""},
		{"the host not by private", "private", "192.168.1.5", here, ""},
		{"the host's IPv6 address by its entity", "host", "2001:db8::5", here, "2001:db8::5"},
		{"a 4-in-6 form is the IPv4 address", "host", "::ffff:192.168.1.5", here, "192.168.1.5"},
		{"a local NAT64 prefix by CIDR alone does not open what it embeds", "64:ff9b:1::/96", "64:ff9b:1::1.1.1.1", here, ""},
		{"loopback not by entity host", "host", "127.0.0.1", here, ""},
		{"loopback not by a CIDR", "127.0.0.0/8", "127.0.0.1", here, ""},
		{"loopback itself not even with host loopback on", "host-loopback", "127.0.0.1", loopbackOn, ""},
		{"the gateway not by host-loopback when that is off", "host-loopback", "10.0.2.2", here, ""},
		{"the gateway not by its address when that is off", "10.0.2.2/32", "10.0.2.2", here, ""},
		{"the gateway is the host's loopback", "host-loopback", "10.0.2.2", loopbackOn, "127.0.0.1"},
		{"the IPv6 gateway is the host's loopback", "host-loopback", "fe80::2", loopbackOn, "::1"},
		{"the gateway by a loopback CIDR", "127.0.0.1/32", "10.0.2.2", loopbackOn, "127.0.0.1"},
		{"the gateway by its own address", "10.0.2.2/32", "10.0.2.2", loopbackOn, "127.0.0.1"},
		{"the gateway not by world", "world", "10.0.2.2", loopbackOn, ""},
		{"the gateway not by link-local", "link-local", "fe80::2", loopbackOn, ""},
		{"the gateway not inside NAT64", "host-loopback", "64:ff9b::10.0.2.2", loopbackOn, ""},
		{"the DNS address never", "10.0.2.3/32", "10.0.2.3", loopbackOn, ""},
		{"the guest's own address never", "10.0.2.100/32", "10.0.2.100", loopbackOn, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			peer := Peer{Entity: Entity(tt.peer)}
			if strings.Contains(tt.peer, "/") {
				peer = Peer{CIDR: cidr(tt.peer)}
			}
			rules := mustCompile(t, allowing(Rule{Action: Allow, To: []Peer{peer}}), tt.env)
			v := rules.Decide(Query{Proto: uint8(UDP), Dst: netip.AddrPortFrom(netip.MustParseAddr(tt.dst), 123)})
			var want netip.AddrPort
			if tt.target != "" {
				want = netip.AddrPortFrom(netip.MustParseAddr(tt.target), 123)
			}
			if v.Target() != want || v.Allowed() != (tt.target != "") {
				t.Errorf("got %v, want target %q", v, tt.target)
			}
		})
	}
}

func TestADenyNeedsNoPrecision(t *testing.T) {
	tests := []struct {
		name string
		deny Peer
		dst  string
		by   string // of the drop, or of the allow behind it
	}{
		{"a wide CIDR denies the host inside it", Peer{CIDR: cidr("192.168.0.0/16")}, "192.168.1.5", "egress[0]"},
		{"private denies the host inside it", Peer{Entity: EntityPrivate}, "192.168.1.5", "egress[0]"},
		{"link-local denies metadata inside it", Peer{Entity: EntityLinkLocal}, "169.254.169.254", "egress[0]"},
		{"everything denies metadata", Peer{CIDR: everyIPv4}, "169.254.169.254", "egress[0]"},
		{"a loopback CIDR denies the gateway that stands for it", Peer{CIDR: cidr("127.0.0.0/8")}, "10.0.2.2", "egress[0]"},
		{"an IPv4 CIDR denies what NAT64 would bring there", Peer{CIDR: cidr("1.1.1.0/24")}, "64:ff9b::1.1.1.1", "egress[0]"},
		{"an exception is not denied", Peer{CIDR: everyIPv4, Except: []netip.Prefix{cidr("192.168.1.5/32")}}, "192.168.1.5", "egress[1]"},
		{"world is what is not special", Peer{Entity: EntityWorld}, "192.168.1.5", "egress[1]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			env := here
			env.HostLoopback = true
			open := []Peer{{Entity: EntityWorld}, {Entity: EntityHost}, {Entity: EntityMetadata}, {Entity: EntityHostLoopback}}
			rules := mustCompile(t, allowing(Rule{Action: Drop, To: []Peer{tt.deny}}, Rule{Action: Allow, To: open}), env)
			v := rules.Decide(Query{Proto: uint8(TCP), Dst: netip.AddrPortFrom(netip.MustParseAddr(tt.dst), 80)})
			if v.Rule() != tt.by || v.Allowed() != (tt.by == "egress[1]") {
				t.Errorf("got %v, want %s", v, tt.by)
			}
		})
	}
}

// The ranges of the table are as the RFCs write them: canonical, and no two
// classes claim the same one.
func TestTheTableIsConsistent(t *testing.T) {
	seen := make(map[netip.Prefix]class)
	for c := range numClasses {
		for _, p := range classes[c].ranges {
			if checkPrefix(p) != nil {
				t.Errorf("%v is not canonical", p)
			}
			if other, ok := seen[p]; ok {
				t.Errorf("%v is in %s and %s", p, classes[c].rule, classes[other].rule)
			}
			seen[p] = c
		}
		if c != ordinary && !strings.HasPrefix(classes[c].rule, "special:") {
			t.Errorf("class %d has no name", c)
		}
	}
}

// Who begins a flow is answered, whatever egress rules say: so what is closed begins none.
func TestClosedAddressesAreNoClients(t *testing.T) {
	anybody := allowing()
	anybody.Spec.Ingress = []Rule{{Name: "any", Action: Allow}, {Name: "cidrs", Action: Allow, From: []Peer{{CIDR: everyIPv4}, {CIDR: everyIPv6}, {Entity: EntityLinkLocal}}}}
	anybody.Spec.DNS.Names = NamesUngated
	named := allowing()
	named.Spec.Ingress = []Rule{{Action: Drop, From: []Peer{{CIDR: cidr("fd00::/8")}}}, {Name: "any", Action: Allow}, {Action: Allow, From: []Peer{{Entity: EntityMetadata}}}}
	gated := allowing(byDomain("a.test"), Rule{Action: Allow, Ports: []Port{{Protocol: TCP, Port: 853}}, To: []Peer{{CIDR: cidr("8.8.8.8/32")}}})
	gated.Spec.Ingress = anybody.Spec.Ingress
	tests := []struct {
		name   string
		policy *Policy
		client string
		by     string
	}{
		{"a metadata service not by what lets everybody in", anybody, "169.254.169.254:80", "special:metadata"},
		{"nor an IPv6 one", anybody, "[fd00:ec2::254]:80", "special:metadata"},
		{"a metadata service by a rule that names it", named, "169.254.169.254:80", "ingress[2]"},
		{"a drop rule around it goes before", named, "[fd00:ec2::254]:80", "ingress[0]"},
		{"behind NAT64", anybody, "[64:ff9b::169.254.169.254]:80", "special:metadata"},
		{"spelled by an address of a local network", anybody, "[fd12::a9fe:a9fe]:80", "special:metadata"},
		{"behind ISATAP", anybody, "[2600::5efe:a9fe:a9fe]:80", "special:metadata"},
		{"behind 6to4", anybody, "[2002:a9fe:a9fe::1]:80", "special:metadata"},
		{"loopback behind NAT64", anybody, "[64:ff9b::127.0.0.1]:80", "special:loopback"},
		{"an ordinary address behind NAT64", anybody, "[64:ff9b::8.8.8.8]:80", "ingress[0] any"},
		{"a link-local neighbour", anybody, "169.254.1.1:80", "ingress[0] any"},
		{"a client from port 53", anybody, "192.0.2.1:53", "ingress[0] any"},
		{"a client from port 53 while names are gated", gated, "192.0.2.1:53", "builtin:dns"},
		{"from port 853", gated, "192.0.2.1:853", "builtin:dns-over-tls"},
		{"a public resolver", gated, "1.1.1.1:443", "builtin:dns-over-https"},
		{"one that a rule opens", gated, "8.8.8.8:853", "ingress[0] any"},
		{"any other", gated, "192.0.2.1:443", "ingress[0] any"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := mustCompile(t, tt.policy, here).Decide(Query{Ingress: true, Proto: uint8(TCP), Src: netip.MustParseAddrPort(tt.client), Dst: netip.MustParseAddrPort("10.0.2.100:80")})
			if v.Rule() != tt.by {
				t.Errorf("got %v, want %s", v, tt.by)
			}
		})
	}
}
