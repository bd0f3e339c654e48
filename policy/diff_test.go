package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func changeText(c Change) string {
	s := fmt.Sprintf("%s %s %s: %s (%s → %s)", c.Kind, c.Direction, strings.Join(c.To, " "), strings.Join(c.Ports, ", "), c.Before, c.After)
	if len(c.Except) > 0 {
		s += fmt.Sprint(" except ", c.Except)
	}
	return s
}

func TestDiffTellsDecisionsNotText(t *testing.T) {
	https, web := []Port{{Protocol: TCP, Port: 443}}, []Port{{Protocol: TCP, Port: 80}, {Protocol: TCP, Port: 443}}
	net8 := Rule{Action: Allow, To: []Peer{{CIDR: cidr("10.0.0.0/8")}}, Ports: https}
	var services [2][]string
	for _, p := range metadataServices {
		services[p.Addr().BitLen()/128] = append(services[p.Addr().BitLen()/128], p.String())
	}
	slices.SortFunc(services[0], func(x, y string) int { return netip.Prefix.Compare(cidr(x), cidr(y)) })
	slices.SortFunc(services[1], func(x, y string) int { return netip.Prefix.Compare(cidr(x), cidr(y)) })
	metadata4, metadata6 := strings.Join(services[0], " "), strings.Join(services[1], " ")
	set := func(p *Policy, change func(*Spec)) *Policy { change(&p.Spec); return p }
	tests := []struct {
		name          string
		before, after *Policy
		want          []string
	}{
		{"the same", allowing(net8), allowing(net8), nil},
		{"the same in two halves", allowing(net8), allowing(Rule{Action: Allow, To: []Peer{{CIDR: cidr("10.0.0.0/9")}, {CIDR: cidr("10.128.0.0/9")}}, Ports: https}), nil},
		{"a port more", allowing(net8), allowing(with(net8, func(r *Rule) { r.Ports = web })), []string{"opens egress 10.0.0.0/8: TCP 80 (reject by default → allow by egress[0])"}},
		{"an exception", allowing(net8), allowing(with(net8, func(r *Rule) { r.To = []Peer{{CIDR: cidr("10.0.0.0/8"), Except: prefixes("10.9.0.0/16")}} })),
			[]string{"closes egress 10.9.0.0/16: TCP 443 (allow by egress[0] → reject by default)"}},
		{"a network with a hole", allowing(), allowing(Rule{Action: Drop, To: []Peer{{CIDR: cidr("10.9.0.0/16")}}}, net8),
			[]string{"opens egress 10.0.0.0/8: TCP 443 (reject by default → allow by egress[1]) except [10.9.0.0/16]", "alters egress 10.9.0.0/16: every protocol (reject by default → drop by egress[0])"}},
		{"a name more", allowing(byDomain("a.test")), allowing(byDomain("a.test"), with(byDomain("*.b.test"), func(r *Rule) { r.Ports = https })),
			[]string{"opens egress *.b.test: TCP 443 (reject by default → allow by egress[1])"}},
		{"a pattern that has it already", allowing(byDomain("**.test")), allowing(byDomain("**.test", "a.test")), nil},
		{"a wider pattern", allowing(byDomain("*.test")), allowing(byDomain("**.test")), []string{"opens egress **.test: TCP, UDP (reject by default → allow by egress[0])"}},
		{"another verification", allowing(byDomain("a.test")), allowing(with(byDomain("a.test"), func(r *Rule) { r.Verify = VerifyRuleGrant })),
			[]string{"alters egress a.test: TCP, UDP (allow by egress[0] → allow by egress[0])"}},
		{"ping", allowing(), allowing(Rule{Action: Allow, To: []Peer{{CIDR: cidr("192.0.2.1/32")}}, ICMP: []ICMP{{Family: IPv4, Type: new(uint8)}}}),
			[]string{"opens egress 192.0.2.1/32: ICMP type 0 (reject by default → allow by egress[0])"}},
		{"clients", set(allowing(), func(s *Spec) { s.Ingress = []Rule{{Action: Allow}} }), allowing(),
			[]string{"closes ingress 0.0.0.0/0 ::/0 ::1/128: every protocol (allow by ingress[0] → reject by default) except [0.0.0.0/8 " + metadata4 + " 224.0.0.0/4 255.255.255.255/32 ::/96 " + metadata6 + " ff00::/8]"}},
		{"a setting", allowing(), set(allowing(), func(s *Spec) { s.Mode, s.Limits.Flows, s.DNS.Refusal = Audit, 5, RefuseDrop }),
			[]string{"resets  dns.refusal:  (not set → drop)", "resets  limits.flows:  (not set → 5)", "resets  mode:  (enforce → audit)"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			changes, err := Diff(tt.before, tt.after, Environment{})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range changes {
				got = append(got, changeText(c))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

// The difference of two random policies is exactly where they decide otherwise:
// for every address and port, it is told if and only if it is so.
func TestDiffAgreesWithDecide(t *testing.T) {
	d := dice(rand.New(rand.NewPCG(9, 9)).IntN)
	differed := 0
	for range 300 {
		a, b := d.policy(), d.policy()
		for _, p := range []*Policy{a, b} {
			p.Spec.Mode = ""
			p.Spec.DNS.Names = NamesUngated // what the gate closes beside the rules is none of theirs
			for i := range p.Spec.Egress {
				// What depends on names or requests has no place among addresses.
				r := &p.Spec.Egress[i]
				r.To = slices.DeleteFunc(r.To, func(p Peer) bool { return p.Domain != "" })
				*r = Rule{Action: r.Action, To: r.To, Ports: r.Ports, ICMP: r.ICMP}
			}
		}
		changes, err := Diff(a, b, twinEnv)
		if err != nil {
			t.Fatal(err)
		}
		x, y := mustCompile(t, a, twinEnv), mustCompile(t, b, twinEnv)
		for range 60 {
			q := d.query(nil)
			q.Seen = Seen{}
			at, direction := q.Dst.Addr(), "egress"
			if q.Ingress {
				at, direction = q.Src.Addr(), "ingress"
			}
			// What a client says to the gate, and what is inside an address, is not told.
			q.Src = netip.AddrPortFrom(q.Src.Addr(), 1234)
			if q.Ingress && isPublicResolver(at.Unmap().WithZone("")) {
				continue
			}
			if at = at.Unmap().WithZone(""); q.Dst.Addr().Zone() != "" || q.Proto != 47 && q.Proto != 1 && q.Proto != 58 && q.Dst.Port() == 0 || twinEmbedded(at) != nil {
				continue
			}
			was, is := x.Decide(q).Action(), y.Decide(q).Action()
			told := ""
			for _, c := range changes {
				if c.Direction == direction && inside(c, at) && lists(c.Ports, q) {
					told += string(c.Kind)
				}
			}
			want := ""
			switch {
			case was == is:
			case is == Allow:
				want = "opens"
			case was == Allow:
				want = "closes"
			default:
				want = "alters"
			}
			if told != want {
				t.Fatalf("%+v: %v became %v, told %q", q, was, is, told)
			}
			if want != "" {
				differed++
			}
		}
	}
	if differed < 100 {
		t.Errorf("only %d differences", differed)
	}
}

// inside reports whether a change is about an address: the narrowest range of its
// that holds it is no exception.
func inside(c Change, a netip.Addr) bool {
	in, out := -1, -1
	for _, s := range c.To {
		if p := cidr(s); p.Contains(a) {
			in = max(in, p.Bits())
		}
	}
	for _, p := range c.Except {
		if p.Contains(a) {
			out = max(out, p.Bits())
		}
	}
	return in > out
}

// lists reports whether the words of a change hold for a query.
func lists(words []string, q Query) bool {
	for _, w := range words {
		var proto, proto2 uint8
		var lo, hi, code int
		switch {
		case w == "every protocol", w == Protocol(q.Proto).String(), w == fmt.Sprintf("protocol %d", q.Proto):
			return true
		}
		if n, _ := fmt.Sscanf(w, "protocols %d-%d", &proto, &proto2); n == 2 && proto <= q.Proto && q.Proto <= proto2 {
			return true
		}
		name := Protocol(q.Proto).String()
		rest, ok := strings.CutPrefix(w, name+" ")
		if !ok {
			continue
		}
		port, kind := int(q.Dst.Port()), int(q.ICMPType)
		switch {
		case strings.Contains(rest, "code"):
			if n, _ := fmt.Sscanf(rest, "type %d code %d", &lo, &code); n == 2 && lo == kind && code == int(q.ICMPCode) {
				return true
			}
			if n, _ := fmt.Sscanf(rest, "type %d codes %d-%d", &lo, &code, &hi); n == 3 && lo == kind && code <= int(q.ICMPCode) && int(q.ICMPCode) <= hi {
				return true
			}
		case strings.HasPrefix(rest, "types "):
			if n, _ := fmt.Sscanf(rest, "types %d-%d", &lo, &hi); n == 2 && lo <= kind && kind <= hi {
				return true
			}
		case strings.HasPrefix(rest, "type "):
			if n, _ := fmt.Sscanf(rest, "type %d", &lo); n == 1 && lo == kind {
				return true
			}
		default:
			if n, _ := fmt.Sscanf(rest, "%d-%d", &lo, &hi); n == 2 && lo <= port && port <= hi || n == 1 && lo == port {
				return true
			}
		}
	}
	return false
}
