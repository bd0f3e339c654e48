package dns

// Senders that know the bounds: over ten minutes, a sandbox gets no more out and in than tunnel.go
// says, whatever the sender does.

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

// tunnelEnd is the far end of a tunnel: the zone's server. It sees the questions, and gives answers
// that are new each time and must not be cached.
type tunnelEnd struct {
	questions int
	fresh     int             // bytes of names not seen before
	bits      float64         // information in the choice among names seen before
	seen      map[string]bool // names
	size      int             // of a TXT record, or the number of addresses
}

const tunnelTypes = 17

// that a policy can list

func (e *tunnelEnd) serve(suffix string) func([]byte) [][]byte {
	return respond(func(q, a *dns.Msg) {
		e.questions++
		name := strings.ToLower(q.Question[0].Name)
		if !e.seen[name] {
			e.seen[name] = true
			e.fresh += len(strings.TrimSuffix(name, suffix))
		}
		e.bits += math.Log2(float64(len(e.seen) * tunnelTypes))
		for range e.size {
			var b [16]byte
			rand.Read(b[:])
			switch q.Question[0].Qtype {
			case dns.TypeA:
				a.Answer = append(a.Answer, rr(fmt.Sprintf("%s 0 A 198.51.%d.%d", name, b[0], b[1])))
			case dns.TypeAAAA:
				a.Answer = append(a.Answer, rr(fmt.Sprintf("%s 0 AAAA 2001:db8:%x:%x:%x:%x:%x:%x", name, b[2:4], b[4:6], b[6:8], b[8:10], b[10:12], b[12:14])))
			case dns.TypeTXT:
				a.Answer = append(a.Answer, rr(fmt.Sprintf("%s 0 TXT %q", name, strings.Repeat(fmt.Sprintf("%x", b), 7))))
			}
		}
	})
}

func TestWhatATunnelCarriesIsBounded(t *testing.T) {
	const minutes = 10
	rng := mathrand.New(mathrand.NewPCG(1, 1))
	types := []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeCNAME, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeSRV, dns.TypePTR, dns.TypeTXT}
	words := strings.Fields("the of and to in for is on that by this with you it not or be are from at as your all have new more an was we will home can us about if page my has search free but our one other do no")
	encoded := func(n int) string {
		b := make([]byte, n)
		rand.Read(b)
		return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b))
	}
	for _, row := range []struct {
		about, suffix string
		name          func() string
		out, in       float64 // bytes a second
	}{
		{"a codebook of types at an exact name", "pypi.test.", func() string { return "pypi.test" }, 3, 273},
		{"a codebook of names and types under a wildcard", "deep.test.", func() string { return fmt.Sprintf("n%d.deep.test", rng.IntN(1000)) }, 200, 512},
		{"a codebook that fits what is known", "deep.test.", func() string { return fmt.Sprintf("n%d.deep.test", rng.IntN(64)) }, 200, 512},
		{"short labels that are encoded", "deep.test.", func() string { return encoded(10) + ".deep.test" }, 200, 512},
		{"long names of words", "deep.test.", func() string {
			var b strings.Builder
			for b.Len() < 90 {
				b.WriteString(words[rng.IntN(len(words))] + "-")
			}
			return b.String()[:45] + "." + b.String()[45:90] + ".deep.test"
		}, 200, 512},
		{"hexadecimal digits as long as can be", "deep.test.", func() string {
			b := make([]byte, 25)
			rand.Read(b)
			return fmt.Sprintf("%x.%x.deep.test", b[:12], b[12:])
		}, 200, 512},
	} {
		t.Run(row.about, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				end := &tunnelEnd{seen: make(map[string]bool), size: 20}
				g := newGate(t, gatedPolicy+"  dns: {types: [A, AAAA, CNAME, HTTPS, SVCB, SRV, PTR, TXT]}\n  limits: {dnsQueriesPerSecond: 1000000}\n", end.serve("."+row.suffix))
				in, told := 0, make(map[string]bool)
				for range minutes * 60 {
					for range 20 {
						m := packet(g.Resolver, ask(t, row.name(), types[rng.IntN(len(types))], edns(4096, false)))
						for _, r := range unpack(t, m).Answer {
							// An answer seen before tells nothing, its TTL apart.
							r.Header().Ttl = 0
							if s := r.String(); !told[s] {
								told[s] = true
								in += int(r.Header().Rdlength)
							}
						}
					}
					time.Sleep(time.Second)
				}
				seconds := float64(minutes * 60)
				out := (float64(end.fresh) + end.bits/8) / seconds
				down := float64(in+answerCost*end.questions) / seconds
				t.Logf("%d questions upstream, %.1f bytes a second out, %.1f in; %d answered from the cache", end.questions, out, down, g.Stats().Cached)
				if out > row.out || down > row.in {
					t.Errorf("%.1f bytes a second out, %.1f in; the bounds are %.0f and %.0f", out, down, row.out, row.in)
				}
			})
		})
	}
}

// The bounds stated in tunnel.go and the threat model are those of the constants.
func TestTheBoundsAreAsStated(t *testing.T) {
	if out := defaults.MaxNamesPerMinute * defaults.MaxWildcardLength / 60; out != 200 {
		t.Errorf("%d bytes a second out under a wildcard", out)
	}
	if in := defaults.MaxNamesPerMinute * answerPerName / 60; in != 512 {
		t.Errorf("%d bytes a second in under a wildcard", in)
	}
	if out, in := exactQuestions*questionCost/60, exactAnswers/60; out != 3 || in != 273 {
		t.Errorf("%d bytes a second out and %d in by an exact name", out, in)
	}
	if n := sandboxPatterns * defaults.MaxNamesPerMinute / 60; n != 20 {
		t.Errorf("%d questions a second", n)
	}
	if bits := math.Log2(2 * 10000 * tunnelTypes); bits > 8*questionCost {
		t.Errorf("a question tells %.1f bits", bits)
	}
}

// A sandbox is bounded even if it has many zones to ask.
func TestTheSandboxIsBoundedAcrossPatterns(t *testing.T) {
	var b tunnels
	now := time.Unix(100, 0)
	passed := 0
	for i := range 4000 {
		if b.admit(defaults, "", fmt.Sprintf("a.zone%d.test", i%2000), now) == tunnelOpen {
			passed++
		}
	}
	if want := sandboxPatterns * defaults.MaxNamesPerMinute; passed != want {
		t.Errorf("%d questions in a minute, want %d", passed, want)
	}
	if r := b.admit(defaults, "", "a.zone1.test", now.Add(tunnelMinute)); r != tunnelOpen {
		t.Errorf("in the next: %s", r)
	}
}

// Ordinary use passes.
func TestOrdinaryUsePasses(t *testing.T) {
	for _, row := range []struct {
		about string
		names []string
		types []uint16
	}{
		{"a page of sixty names", named(60, "cdn%d.static.deep.test"), []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS}},
		{"a search list of Kubernetes, for eight services", func() (all []string) {
			for i := range 8 {
				for _, search := range []string{".default.svc.cluster.deep.test", ".svc.cluster.deep.test", ".cluster.deep.test", ".internal.deep.test", ".com"} {
					all = append(all, fmt.Sprintf("service-%d%s", i, search))
				}
			}
			return
		}(), []uint16{dns.TypeA, dns.TypeAAAA}},
		{"one name again and again", strings.Fields(strings.Repeat("pypi.test ", 500)), []uint16{dns.TypeA, dns.TypeAAAA}},
		{"buckets with names of hashes", func() (all []string) {
			for i := range 30 {
				all = append(all, fmt.Sprintf("d%x.files.test", binary.BigEndian.AppendUint64(nil, uint64(i+1)*0x9e3779b97f4a7c15)))
			}
			return
		}(), []uint16{dns.TypeA, dns.TypeAAAA}},
	} {
		t.Run(row.about, func(t *testing.T) {
			g := newGate(t, gatedPolicy, respond(func(q, a *dns.Msg) {
				name := q.Question[0].Name
				switch q.Question[0].Qtype {
				case dns.TypeA:
					a.Answer = append(a.Answer, rr(name+" 60 CNAME "+"edge."+name), rr("edge."+name+" 60 A 198.51.100.1"), rr("edge."+name+" 60 A 198.51.100.2"))
				case dns.TypeAAAA:
					a.Answer = append(a.Answer, rr(name+" 60 CNAME "+"edge."+name), rr("edge."+name+" 60 AAAA 2001:db8::1"))
				}
			}))
			for _, n := range row.names {
				for _, qtype := range row.types {
					if m := unpack(t, packet(g.Resolver, ask(t, n, qtype, edns(1232, false)))); m.Rcode != dns.RcodeSuccess {
						t.Fatalf("%s: %v", n, m)
					}
				}
			}
			if s := g.Stats(); s.RefusedTunnel != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

func named(n int, format string) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf(format, i))
	}
	return all
}

// Answers under a wildcard or an exact name stop once they have carried enough, and resume a minute
// later.
func TestAnswersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		end := &tunnelEnd{seen: make(map[string]bool), size: 60}
		g := newGate(t, gatedPolicy, end.serve(".deep.test."))
		told := 0
		for i := range policy.DefaultMaxNamesPerMinute {
			m := unpack(t, packet(g.Resolver, ask(t, fmt.Sprintf("n%d.deep.test", i), dns.TypeAAAA, edns(4096, false))))
			if len(m.Answer) == 0 {
				if m.Rcode != dns.RcodeRefused || g.granted(fmt.Sprintf("n%d.deep.test", i), "2001:db8::1") {
					t.Fatal(m)
				}
				continue
			}
			told++
		}
		if most := answerPerName * policy.DefaultMaxNamesPerMinute / (60*16 + answerCost); told != most {
			t.Errorf("%d answers of 960 bytes were told, want %d", told, most)
		}
		time.Sleep(tunnelMinute)
		if m := unpack(t, packet(g.Resolver, ask(t, "n0.deep.test", dns.TypeAAAA, edns(4096, false)))); len(m.Answer) != 60 {
			t.Errorf("a minute later: %v", m)
		}
	})
}
