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
	v := mustCompile(t, Builtin{}.Policy(), here).Decide(tcpTo("[::ffff:1.1.1.1]:443"))
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
	if v.Permits(netip.AddrPort{}) || v.Proto() != uint8(TCP) || v.String() != "allow TCP to 1.1.1.1:443 by egress[2] internet" {
		t.Errorf("verdict %v", v)
	}
}

func TestTheBuiltinPolicies(t *testing.T) {
	looped := here
	looped.HostLoopback = true
	run, private, hostToo := Builtin{}, Builtin{AllowPrivate: true}, Builtin{AllowHost: true}
	all, pod := Builtin{AllowPrivate: true, AllowHost: true}, Builtin{Pod: true}
	ping := Query{Proto: uint8(ICMPv4), ICMPType: 8, Dst: netip.MustParseAddrPort("1.1.1.1:7")}
	in := func(src string) Query {
		return Query{Ingress: true, Proto: uint8(TCP), Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort("10.0.2.100:80")}
	}
	const needsPrivate, needsHost = "reject TCP by egress[3] needs--allow-private", "reject TCP by egress[0] needs--allow-host"
	tests := []struct {
		name    string
		builtin Builtin
		env     Environment
		q       Query
		want    string
	}{
		{"the internet is open", run, here, tcpTo("1.1.1.1:443"), "allow TCP to 1.1.1.1:443 by egress[2] internet"},
		{"over IPv6 too", run, here, tcpTo("[2600::1]:443"), "allow TCP to [2600::1]:443 by egress[2] internet"},
		{"and mapped IPv4", run, here, tcpTo("[::ffff:1.1.1.1]:443"), "allow TCP to 1.1.1.1:443 by egress[2] internet"},
		{"ping is open, and has no port", run, here, ping, "allow ICMP to 1.1.1.1:0 by egress[2] internet"},
		{"10/8 is closed", run, here, tcpTo("10.255.255.255:80"), needsPrivate},
		{"172.16/12 is closed", run, here, tcpTo("172.31.0.1:80"), needsPrivate},
		{"192.168/16 is closed", run, here, tcpTo("192.168.1.7:80"), needsPrivate},
		{"carrier-grade NAT is closed", run, here, tcpTo("100.64.0.1:80"), needsPrivate},
		{"unique local addresses are closed", run, here, tcpTo("[fd12::7]:80"), needsPrivate},
		{"a mapped private address is closed", run, here, tcpTo("[::ffff:192.168.1.7]:80"), needsPrivate},
		{"a private address behind NAT64 is closed", run, here, tcpTo("[64:ff9b::192.168.1.7]:80"), needsPrivate},
		{"a private address behind 6to4 is closed", run, here, tcpTo("[2002:c0a8:107::1]:80"), needsPrivate},
		{"the neighbours of private ranges are public", run, here, tcpTo("100.128.0.1:80"), "allow TCP to 100.128.0.1:80 by egress[2] internet"},
		{"the host's private address is closed", run, here, tcpTo("192.168.1.5:22"), needsHost},
		{"the host's global IPv6 address is closed", run, here, tcpTo("[2001:db8::5]:22"), needsHost},
		{"the host's address behind NAT64 is closed", run, here, tcpTo("[64:ff9b::192.168.1.5]:22"), needsHost},
		{"--allow-private opens private networks", private, here, tcpTo("192.168.1.7:80"), "allow TCP to 192.168.1.7:80 by egress[2] internet"},
		{"--allow-private does not open the host", private, here, tcpTo("192.168.1.5:22"), needsHost},
		{"--allow-host opens the host's addresses, private ones too", hostToo, here, tcpTo("192.168.1.5:22"), "allow TCP to 192.168.1.5:22 by egress[0] host"},
		{"--allow-host does not open private networks", hostToo, here, tcpTo("192.168.1.7:80"), needsPrivate},
		{"both open both", all, here, tcpTo("[2001:db8::5]:22"), "allow TCP to [2001:db8::5]:22 by egress[0] host"},
		{"metadata is rejected", run, here, tcpTo("169.254.169.254:80"), "reject TCP by special:metadata"},
		{"metadata inside a private range is no matter of --allow-private", run, here, tcpTo("[fd00:ec2::254]:80"), "reject TCP by special:metadata"},
		{"nor does that open it", all, here, tcpTo("[fd00:ec2::254]:80"), "reject TCP by special:metadata"},
		{"link-local is closed", all, here, tcpTo("169.254.1.1:80"), "reject TCP by special:link-local"},
		{"the gateway is closed, and no matter of --allow-private", run, here, tcpTo("10.0.2.2:22"), "reject TCP by special:gateway"},
		{"the gateway is the host's loopback when asked for", run, looped, tcpTo("10.0.2.2:22"), "allow TCP to 127.0.0.1:22 by egress[1] host-loopback"},
		{"port 0 is nobody's", run, here, tcpTo("1.1.1.1:0"), "reject TCP by special:port-zero"},
		{"no address is no address", run, here, Query{Proto: uint8(TCP)}, "reject TCP by special:invalid"},
		{"a published port takes loopback clients", run, here, in("127.0.0.1:5000"), "allow TCP to 10.0.2.100:80 by ingress[0] published"},
		{"a published port takes private clients", run, here, in("192.168.1.7:5000"), "allow TCP to 10.0.2.100:80 by ingress[0] published"},
		{"a published port takes link-local clients", run, here, in("[fe80::7%eth0]:5000"), "allow TCP to 10.0.2.100:80 by ingress[0] published"},
		{"a published port takes no multicast clients", run, here, in("224.0.0.1:5000"), "reject TCP by special:multicast"},
		{"a pod reaches private networks", pod, here, tcpTo("192.168.1.7:80"), "allow TCP to 192.168.1.7:80 by egress[0] world"},
		{"a pod reaches a node's own resolver", pod, here, tcpTo("169.254.20.10:53"), "allow TCP to 169.254.20.10:53 by egress[1] link-local"},
		{"a pod reaches its node", pod, here, tcpTo("192.168.1.5:10250"), "allow TCP to 192.168.1.5:10250 by egress[2] node"},
		{"a pod's metadata is dropped", pod, here, tcpTo("169.254.169.254:80"), "drop TCP by special:metadata"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := mustCompile(t, tt.builtin.Policy(), tt.env).Decide(tt.q)
			if got := v.String(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			flag := map[string]string{needsPrivate: "--allow-private", needsHost: "--allow-host"}[tt.want]
			if got := tt.builtin.OpenedBy(v); got != flag {
				t.Errorf("opened by %q, not by %q", got, flag)
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
