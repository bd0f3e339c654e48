package policy

import (
	"net/netip"
	"os"
	"strings"
	"testing"
)

func TestZeroValuesDeny(t *testing.T) {
	q := tcpTo("1.1.1.1:443")
	var none *Rules
	for _, r := range []*Rules{none, {}} {
		if v := r.Decide(q); v.Allowed() || v.Action() != Drop || v.Rule() != "no-policy" || v.Target().IsValid() {
			t.Errorf("without rules: %v", v)
		}
		if r.Limits() != (Limits{}) || r.Name() != "" {
			t.Errorf("without rules: %v %q", r.Limits(), r.Name())
		}
	}
	var v Verdict
	if v.Allowed() || v.Permits(netip.AddrPort{}) || v.Permits(q.Dst) {
		t.Errorf("the zero verdict permits something: %v", v)
	}
	if v := mustCompile(t, &Policy{}, Environment{}).Decide(q); v.Action() != Drop || v.Rule() != "default" {
		t.Errorf("the empty policy: %v", v)
	}
	if _, err := Compile(nil, Environment{}); err == nil {
		t.Error("compiled no policy")
	}
}

func TestAVerdictPermitsItsTargetOnly(t *testing.T) {
	v := mustCompile(t, Default(true), here).Decide(tcpTo("[::ffff:1.1.1.1]:443"))
	tests := []struct {
		addr string
		want bool
	}{
		{"1.1.1.1:443", true}, {"[::ffff:1.1.1.1]:443", true},
		{"1.1.1.1:80", false}, {"1.1.1.2:443", false}, {"[::1.1.1.1]:443", false}, {"[::ffff:1.1.1.1%1]:443", false}, {"[64:ff9b::1.1.1.1]:443", false},
	}
	for _, tt := range tests {
		if got := v.Permits(netip.MustParseAddrPort(tt.addr)); got != tt.want {
			t.Errorf("%v: Permits(%s) is %v", v, tt.addr, got)
		}
	}
	if v.Permits(netip.AddrPort{}) || v.Proto() != uint8(TCP) || v.String() != "allow TCP to 1.1.1.1:443 by egress[0] internet" {
		t.Errorf("verdict %v", v)
	}
}

func TestTheDefaultPolicy(t *testing.T) {
	env := here
	env.HostLoopback = true
	tests := []struct {
		name   string
		reject bool
		env    Environment
		q      Query
		want   string
	}{
		{"the internet is open", true, here, tcpTo("1.1.1.1:443"), "allow TCP to 1.1.1.1:443 by egress[0] internet"},
		{"over IPv6 too", true, here, tcpTo("[2600::1]:443"), "allow TCP to [2600::1]:443 by egress[0] internet"},
		{"local networks are open", true, here, tcpTo("192.168.1.7:80"), "allow TCP to 192.168.1.7:80 by egress[0] internet"},
		{"the host's own address is open", true, here, tcpTo("192.168.1.5:22"), "allow TCP to 192.168.1.5:22 by egress[1] host"},
		{"metadata is rejected", true, here, tcpTo("169.254.169.254:80"), "reject TCP by special:metadata"},
		{"metadata is dropped where refusals are silent", false, here, tcpTo("169.254.169.254:80"), "drop TCP by special:metadata"},
		{"the gateway is closed", true, here, tcpTo("10.0.2.2:22"), "reject TCP by special:gateway"},
		{"the gateway is the host's loopback when asked for", true, env, tcpTo("10.0.2.2:22"), "allow TCP to 127.0.0.1:22 by egress[2] host-loopback"},
		{"port 0 is nobody's", true, here, tcpTo("1.1.1.1:0"), "reject TCP by special:port-zero"},
		{"no address is no address", true, here, Query{Proto: uint8(TCP)}, "reject TCP by special:invalid"},
		{"ping is open, and has no port", true, here, Query{Proto: uint8(ICMPv4), ICMPType: 8, Dst: netip.MustParseAddrPort("1.1.1.1:7")}, "allow ICMP to 1.1.1.1:0 by egress[0] internet"},
		{"a published port takes loopback clients", true, here, Query{Ingress: true, Proto: uint8(TCP), Src: netip.MustParseAddrPort("127.0.0.1:5000"), Dst: netip.MustParseAddrPort("10.0.2.100:80")}, "allow TCP to 10.0.2.100:80 by ingress[0] published"},
		{"a published port takes link-local clients", true, here, Query{Ingress: true, Proto: uint8(TCP), Src: netip.MustParseAddrPort("[fe80::7%eth0]:5000"), Dst: netip.MustParseAddrPort("[fd00::100]:80")}, "allow TCP to [fd00::100]:80 by ingress[0] published"},
		{"a published port takes no multicast clients", true, here, Query{Ingress: true, Proto: uint8(UDP), Src: netip.MustParseAddrPort("224.0.0.1:5000"), Dst: netip.MustParseAddrPort("10.0.2.100:80")}, "reject UDP by special:multicast"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := mustCompile(t, Default(tt.reject), tt.env).Decide(tt.q).String(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// The examples mean what their comments say.
func TestTheExamplesDecide(t *testing.T) {
	env := here
	env.HostLoopback = true
	in := func(src, dst string) Query {
		return Query{Ingress: true, Proto: uint8(TCP), Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}
	}
	echo := func(proto Protocol, typ uint8, dst string) Query {
		return Query{Proto: uint8(proto), ICMPType: typ, Dst: netip.AddrPortFrom(netip.MustParseAddr(dst), 0)}
	}
	udp := tcpTo("1.1.1.1:443")
	udp.Proto = uint8(UDP)
	tests := []struct {
		file string
		q    Query
		want string
	}{
		{"agent", tcpTo("1.1.1.1:443"), "allow TCP to 1.1.1.1:443 by egress[3] web"},
		{"agent", udp, "allow UDP to 1.1.1.1:443 by egress[3] web"},
		{"agent", tcpTo("1.1.1.1:22"), "reject TCP by default"},
		{"agent", tcpTo("10.20.30.40:8443"), "allow TCP to 10.20.30.40:8443 by egress[1] build-cache"},
		{"agent", tcpTo("10.20.30.40:443"), "reject TCP by egress[2] no-lan"},
		{"agent", tcpTo("192.168.1.5:443"), "reject TCP by egress[2] no-lan"},
		{"agent", tcpTo("169.254.169.254:80"), "drop TCP by egress[0] metadata"},
		{"agent", echo(ICMPv4, 8, "1.1.1.1"), "allow ICMP to 1.1.1.1:0 by egress[4] ping"},
		{"agent", echo(ICMPv6, 128, "2600::1"), "allow ICMPv6 to [2600::1]:0 by egress[4] ping"},
		{"agent", echo(ICMPv4, 13, "1.1.1.1"), "reject ICMP by default"},
		{"agent", in("127.0.0.1:5", "10.0.2.100:80"), "reject TCP by default"},
		{"server", tcpTo("10.1.1.1:5432"), "allow TCP to 10.1.1.1:5432 by egress[0] database"},
		{"server", tcpTo("10.9.1.1:5432"), "drop TCP by default"},
		{"server", tcpTo("10.0.2.2:9099"), "allow TCP to 127.0.0.1:9099 by egress[1] host-tools"},
		{"server", tcpTo("10.0.2.2:9100"), "drop TCP by special:host-loopback"},
		{"server", in("192.0.2.9:5", "10.0.2.100:80"), "allow TCP to 10.0.2.100:80 by ingress[0] office"},
		{"server", in("[::1]:5", "10.0.2.100:80"), "allow TCP to 10.0.2.100:80 by ingress[0] office"},
		{"server", in("198.51.100.9:5", "10.0.2.100:80"), "drop TCP by default"},
	}
	for _, tt := range tests {
		data, err := os.ReadFile("testdata/" + tt.file + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		p, err := Parse(tt.file, data)
		if err != nil {
			t.Fatal(err)
		}
		if got := mustCompile(t, p, env).Decide(tt.q).String(); got != tt.want {
			t.Errorf("%s, %+v:\ngot  %s\nwant %s", tt.file, tt.q, got, tt.want)
		}
	}
}

func TestLimitsReachTheRules(t *testing.T) {
	data, err := os.ReadFile("testdata/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := Parse("agent", data)
	if err != nil {
		t.Fatal(err)
	}
	want := Limits{Flows: 1024, NewFlowsPerSecond: 100, EgressBandwidth: 50e6, IngressBandwidth: 200e6, TotalBytes: 20 << 30, FlowsPerDestination: 256}
	if r := mustCompile(t, p, here); r.Limits() != want || r.Name() != "agent" {
		t.Errorf("got %+v of %s, want %+v", r.Limits(), r.Name(), want)
	}
}

func TestCompileRefusesWhatParseWould(t *testing.T) {
	one := uint8(1)
	tests := []struct {
		name string
		rule Rule
		want string
	}{
		{"an action that does not exist", Rule{Action: 9}, "action(9)"},
		{"from in egress", Rule{From: []Peer{{Entity: EntityHost}}}, "egress rules have to"},
		{"an empty peer", Rule{To: []Peer{{}}}, "not a network in its plain form"},
		{"host bits", Rule{To: []Peer{{CIDR: netip.MustParsePrefix("10.0.0.1/8")}}}, "not a network in its plain form"},
		{"IPv4 written as IPv6", Rule{To: []Peer{{CIDR: netip.MustParsePrefix("::ffff:10.0.0.0/104")}}}, "not a network in its plain form"},
		{"an exception outside", Rule{To: []Peer{{CIDR: cidr("10.0.0.0/8"), Except: []netip.Prefix{cidr("11.0.0.0/8")}}}}, "not a part of cidr"},
		{"an exception with host bits", Rule{To: []Peer{{CIDR: cidr("10.0.0.0/8"), Except: []netip.Prefix{netip.MustParsePrefix("10.1.1.1/16")}}}}, "not a network"},
		{"both kinds of peer", Rule{To: []Peer{{CIDR: cidr("10.0.0.0/8"), Entity: EntityHost}}}, "not both"},
		{"an exception of an entity", Rule{To: []Peer{{Entity: EntityHost, Except: []netip.Prefix{cidr("10.0.0.0/8")}}}}, "except needs a cidr"},
		{"an unknown entity", Rule{To: []Peer{{Entity: "moon"}}}, `unknown entity "moon"`},
		{"an unknown protocol", Rule{Ports: []Port{{Protocol: 47}}}, "unknown protocol 47"},
		{"a port of ICMP", Rule{Ports: []Port{{Protocol: ICMPv4, Port: 1}}}, "ICMP has no ports"},
		{"an inverted range", Rule{Ports: []Port{{Protocol: TCP, Port: 9, EndPort: 8}}}, "inverted"},
		{"an unknown family", Rule{ICMP: []ICMP{{}}}, "neither IPv4 nor IPv6"},
		{"a code without type", Rule{ICMP: []ICMP{{Family: IPv4, Code: &one}}}, "code without a type"},
	}
	for _, tt := range tests {
		_, err := Compile(allowing(Rule{}, tt.rule), here)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "compile policy test: egress[1]: ") {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	bad := allowing()
	bad.Spec.DefaultAction = 7
	if _, err := Compile(bad, here); err == nil {
		t.Error("compiled an unknown default action")
	}
}
