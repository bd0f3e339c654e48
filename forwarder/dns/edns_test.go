package dns

import (
	"encoding/hex"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// The questions that ISC's ednscomp asks servers (RFC 6891), and a few more, each with the answer
// that a server must give. They go to the gate, which answers EDNS itself, and to a resolver that
// gates no names.
func TestEDNSCompliance(t *testing.T) {
	option := func(code uint16, data string) func(*dns.Msg) {
		b, err := hex.DecodeString(data)
		if err != nil {
			t.Fatal(err)
		}
		return func(m *dns.Msg) {
			m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_LOCAL{Code: code, Data: b})
		}
	}
	version := func(v uint8) func(*dns.Msg) { return func(m *dns.Msg) { m.IsEdns0().SetVersion(v) } }
	flags := func(m *dns.Msg) { m.IsEdns0().Hdr.Ttl |= 0x7f80 } // all the unassigned ones
	cookie := func(n int) func(*dns.Msg) { return option(dns.EDNS0COOKIE, strings.Repeat("5a", n)) }
	const unknown = 100
	for _, row := range []struct {
		about string
		edit  []func(*dns.Msg)
		rcode int
		do    bool
	}{
		{"plain DNS", nil, dns.RcodeSuccess, false},
		{"EDNS", []func(*dns.Msg){edns(4096, false)}, dns.RcodeSuccess, false},
		{"512 bytes", []func(*dns.Msg){edns(512, false)}, dns.RcodeSuccess, false},
		{"less than DNS has", []func(*dns.Msg){edns(0, false)}, dns.RcodeSuccess, false},
		{"DO", []func(*dns.Msg){edns(4096, true)}, dns.RcodeSuccess, true},
		{"unknown flags", []func(*dns.Msg){edns(4096, false), flags}, dns.RcodeSuccess, false},
		{"unknown flags and DO", []func(*dns.Msg){edns(4096, true), flags}, dns.RcodeSuccess, true},
		{"an unknown option", []func(*dns.Msg){edns(4096, false), option(unknown, "")}, dns.RcodeSuccess, false},
		{"one with data, twice, with DO", []func(*dns.Msg){edns(4096, true), option(unknown, "00ff"), option(unknown, "01")}, dns.RcodeSuccess, true},
		{"version 1", []func(*dns.Msg){edns(4096, false), version(1)}, dns.RcodeBadVers, false},
		{"version 1 with DO", []func(*dns.Msg){edns(4096, true), version(1)}, dns.RcodeBadVers, true},
		{"version 1 with unknown flags", []func(*dns.Msg){edns(4096, false), version(1), flags}, dns.RcodeBadVers, false},
		{"version 1 with an unknown option", []func(*dns.Msg){edns(4096, false), version(1), option(unknown, "ff")}, dns.RcodeBadVers, false},
		{"version 255", []func(*dns.Msg){edns(4096, false), version(255)}, dns.RcodeBadVers, false},
		{"version 1, whose options nobody can read", []func(*dns.Msg){edns(4096, false), version(1), cookie(3)}, dns.RcodeBadVers, false},
		{"a list of options: NSID, ECS, EXPIRE, COOKIE, PADDING", []func(*dns.Msg){edns(4096, false), option(dns.EDNS0NSID, ""),
			option(dns.EDNS0SUBNET, "0001200000000000"), option(dns.EDNS0EXPIRE, ""), cookie(8), option(dns.EDNS0PADDING, "0000")}, dns.RcodeSuccess, false},
		{"a client's cookie", []func(*dns.Msg){edns(4096, false), cookie(8)}, dns.RcodeSuccess, false},
		{"with a server's of 8 bytes", []func(*dns.Msg){edns(4096, false), cookie(16)}, dns.RcodeSuccess, false},
		{"with a server's of 32 bytes", []func(*dns.Msg){edns(4096, false), cookie(40)}, dns.RcodeSuccess, false},
		{"an empty cookie", []func(*dns.Msg){edns(4096, false), cookie(0)}, dns.RcodeFormatError, false},
		{"a cookie of 7 bytes", []func(*dns.Msg){edns(4096, false), cookie(7)}, dns.RcodeFormatError, false},
		{"of 9 bytes", []func(*dns.Msg){edns(4096, false), cookie(9)}, dns.RcodeFormatError, false},
		{"of 15 bytes", []func(*dns.Msg){edns(4096, false), cookie(15)}, dns.RcodeFormatError, false},
		{"of 41 bytes, and DO", []func(*dns.Msg){edns(4096, true), cookie(41)}, dns.RcodeFormatError, true},
	} {
		t.Run(row.about, func(t *testing.T) {
			g := newGate(t, gatedPolicy, says("an pypi.test. 60 A 198.51.100.1"))
			for _, name := range []string{"pypi.test", "pypi.test" /* from the cache */, "localhost", "other.test"} {
				query := ask(t, name, dns.TypeA, row.edit...)
				m := unpack(t, packet(g.Resolver, query))
				if fast := g.AnswerPacket(query, client); fast != nil && row.rcode != dns.RcodeSuccess {
					t.Errorf("%s: the cache answers %v", name, unpack(t, fast))
				}
				want := row.rcode
				if name == "other.test" && want == dns.RcodeSuccess {
					want = dns.RcodeNameError // refused
				}
				opt := m.IsEdns0()
				if m.Rcode != want || (opt != nil) != (len(row.edit) > 0) {
					t.Errorf("%s: got %v", name, m)
					continue
				}
				if answers := len(m.Answer); (want == dns.RcodeSuccess) != (answers > 0) {
					t.Errorf("%s: %d answers", name, answers)
				}
				if opt == nil {
					continue
				}
				if opt.Version() != 0 || opt.Do() != row.do || opt.Hdr.Ttl&0x7fff != 0 || opt.UDPSize() < minUDPSize {
					t.Errorf("%s: %v", name, opt)
				}
				for _, o := range opt.Option {
					if o.Option() != dns.EDNS0EDE {
						t.Errorf("%s: it has the option %d", name, o.Option())
					}
				}
			}
		})
	}
}

// Options that do not parse as a list, which no packer writes.
func TestABrokenListOfOptionsIsMalformed(t *testing.T) {
	for _, data := range []string{"00", "0003", "000300", "00030001", "000a0008010203", "00640000000a0009010203040506070809"} {
		b, err := hex.DecodeString(data)
		if err != nil {
			t.Fatal(err)
		}
		q := ask(t, "pypi.test", dns.TypeA, edns(4096, false))
		q[len(q)-1] = byte(len(b))
		g := newGate(t, gatedPolicy, says())
		if m := unpack(t, packet(g.Resolver, append(q, b...))); m.Rcode != dns.RcodeFormatError || m.IsEdns0() == nil {
			t.Errorf("%s: %v", data, m)
		}
	}
}
