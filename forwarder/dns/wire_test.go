package dns

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/miekg/dns"
)

// The twin of truncate: try every number of leading records, with the OPT record if there is one,
// and take the longest that fits.
func stupidTruncate(m *dns.Msg, limit int) int {
	opt := m.IsEdns0()
	var all []dns.RR
	all = append(append(append(all, m.Answer...), m.Ns...), m.Extra...)
	best := 0
	for n := range len(all) + 1 {
		t := m.Copy()
		t.Answer, t.Ns, t.Extra = nil, nil, nil
		t.Compress = m.Compress
		kept := 0
		for i, r := range all[:n] {
			if r == dns.RR(opt) {
				continue
			}
			kept++
			switch {
			case i < len(m.Answer):
				t.Answer = append(t.Answer, r)
			case i < len(m.Answer)+len(m.Ns):
				t.Ns = append(t.Ns, r)
			default:
				t.Extra = append(t.Extra, r)
			}
		}
		if opt != nil {
			t.Extra = append(t.Extra, opt)
		}
		if b, err := t.Pack(); err == nil && len(b) <= limit {
			best = max(best, kept)
		}
	}
	return best
}

func TestTruncateKeepsAllThatFits(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		m := new(dns.Msg)
		m.SetQuestion("some.name.example.", dns.TypeTXT)
		m.Response, m.Compress = true, rnd.IntN(2) == 0
		records := func(n int) (out []dns.RR) {
			for range rnd.IntN(n) {
				out = append(out, rr(fmt.Sprintf("n%d.name.example. TXT %q", rnd.IntN(3), fmt.Sprintf("%0*d", 1+rnd.IntN(200), 7))))
			}
			return out
		}
		m.Answer, m.Ns, m.Extra = records(12), records(5), records(5)
		if rnd.IntN(2) == 0 {
			m.SetEdns0(1232, true)
		}
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		limit := minUDPSize + rnd.IntN(1000)
		if len(b) <= limit {
			continue
		}
		q, _ := readQuestion(b)
		cut := truncate(b, q.end, limit)
		got := unpack(t, cut)
		n := len(got.Answer) + len(got.Ns) + len(got.Extra)
		if m.IsEdns0() != nil {
			n--
			if got.IsEdns0() == nil {
				t.Fatal("the OPT record is lost")
			}
		}
		if want := stupidTruncate(m, limit); n != want || len(cut) > limit || !got.Truncated {
			t.Fatalf("kept %d records in %d of %d bytes, the twin keeps %d", n, len(cut), limit, want)
		}
	}
}

func TestTruncateDropsWhatItCannotKeep(t *testing.T) {
	m := new(dns.Msg)
	m.SetQuestion("a.example.", dns.TypeTXT)
	m.Response = true
	for range 8 {
		m.Answer = append(m.Answer, rr(fmt.Sprintf("a.example. TXT %q", fmt.Sprintf("%0250d", 1))))
	}
	t.Run("a signature over the whole message", func(t *testing.T) {
		m := m.Copy()
		m.SetTsig("key.", dns.HmacSHA256, 300, 1)
		b, _ := m.Pack()
		q, _ := readQuestion(b)
		if got := unpack(t, truncate(b, q.end, 600)); got.IsTsig() != nil || len(got.Answer) != 2 {
			t.Errorf("got %v", got)
		}
	})
	t.Run("an OPT record as large as the limit", func(t *testing.T) {
		m := m.Copy()
		m.SetEdns0(512, false)
		m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_PADDING{Padding: make([]byte, 500)})
		b, _ := m.Pack()
		q, _ := readQuestion(b)
		if cut := truncate(b, q.end, 512); len(cut) > 512 || unpack(t, cut).IsEdns0() != nil {
			t.Errorf("%d bytes", len(cut))
		}
	})
}

func TestUnder(t *testing.T) {
	for _, row := range []struct {
		n, zone string
		want    bool
	}{
		{"localhost", "localhost", true},
		{"a.b.localhost", "localhost", true},
		{"notlocalhost", "localhost", false},
		{"localhost.example", "localhost", false},
		{"resolver.arpa", "resolver.arpa", true},
		{"arpa", "resolver.arpa", false},
	} {
		if got := mustName(row.n).under(mustName(row.zone)); got != row.want {
			t.Errorf("%s under %s: %v", row.n, row.zone, got)
		}
	}
	if name("\x00").under(zoneLocalhost) {
		t.Error("the root is under localhost")
	}
}
