package policy

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func grant1(t testing.TB, n *Names, name, a string, ttl time.Duration, now time.Time) {
	t.Helper()
	if err := n.Grant(name, []netip.Addr{addr(a)}, ttl, now); err != nil {
		t.Fatal(err)
	}
}

func TestAGrantHoldsForItsTTL(t *testing.T) {
	start := time.Unix(1000, 0)
	tests := []struct {
		name       string
		ttl, holds time.Duration
	}{
		{"as long as it says", 5 * time.Minute, 5 * time.Minute},
		{"at least the floor", 0, DefaultTTLFloor},
		{"at most the cap", 100 * time.Hour, DefaultTTLCap},
		{"at least the floor, if it is negative", -time.Hour, DefaultTTLFloor},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := NewNames(NamesConfig{})
			grant1(t, n, "a.test", "192.0.2.1", tt.ttl, start)
			if end := start.Add(tt.holds); !n.Holds("a.test", addr("192.0.2.1"), end.Add(-1)) || n.Holds("a.test", addr("192.0.2.1"), end) {
				t.Errorf("it does not hold for exactly %v", tt.holds)
			}
		})
	}
}

func TestWhatIsGranted(t *testing.T) {
	now := time.Unix(1000, 0)
	n := NewNames(NamesConfig{TTLFloor: time.Second})
	grant1(t, n, "a.test", "192.0.2.1", time.Minute, now)
	grant1(t, n, "b.test", "192.0.2.1", time.Second, now)
	grant1(t, n, "a.test", "2001:db8::1", time.Minute, now)
	grant1(t, n, "c.test", "::ffff:192.0.2.9", time.Minute, now)
	if got := n.Of(addr("192.0.2.1"), now, nil); !slices.Equal(got, []string{"a.test", "b.test"}) {
		t.Errorf("got %v", got)
	}
	if got := n.Of(addr("::ffff:192.0.2.1"), now.Add(time.Second), []string{"x"}); !slices.Equal(got, []string{"x", "a.test"}) {
		t.Errorf("after b.test is over: got %v", got)
	}
	if !n.Holds("c.test", addr("192.0.2.9"), now) {
		t.Error("a 4-in-6 form is not the IPv4 address")
	}
	if n.Holds("b.test", addr("2001:db8::1"), now) || n.Holds("a.test", addr("192.0.2.2"), now) {
		t.Error("what was not granted holds")
	}
	// A shorter answer does not take away what a longer one gave.
	grant1(t, n, "a.test", "192.0.2.1", time.Second, now)
	if !n.Holds("a.test", addr("192.0.2.1"), now.Add(30*time.Second)) {
		t.Error("a shorter TTL ended a grant")
	}
	if n.Holds("a.test", addr("192.0.2.1"), time.Time{}) || n.Of(addr("192.0.2.1"), time.Time{}, nil) != nil {
		t.Error("without a time, something is granted")
	}
	for name, as := range map[string][]netip.Addr{"A.test": {addr("192.0.2.1")}, "": {addr("192.0.2.1")}, "a.test": nil, "b.test": {{}}, "c.test": {addr("fe80::1%x")}} {
		if n.Grant(name, as, time.Minute, now) == nil || len(as) > 0 && n.Pin(name, as) == nil {
			t.Errorf("%q with %v is granted", name, as)
		}
	}
	var none *Names
	if none.Holds("a.test", addr("192.0.2.1"), now) || none.Of(addr("192.0.2.1"), now, nil) != nil {
		t.Error("nil grants")
	}
}

func TestGrantsAreBounded(t *testing.T) {
	now := time.Unix(1000, 0)
	v6 := func(i int) netip.Addr {
		b := addr("2001:db8::").As16()
		binary.BigEndian.PutUint32(b[12:], uint32(i))
		return netip.AddrFrom16(b)
	}
	tests := []struct {
		name        string
		grant       func(n *Names, i int) error
		times, kept int
	}{
		{"addresses of a name", func(n *Names, i int) error { return n.Grant("a.test", []netip.Addr{v6(i)}, time.Minute, now) }, MaxGrantsPerName * 3, MaxGrantsPerName},
		{"names of an address", func(n *Names, i int) error {
			return n.Grant(fmt.Sprintf("n%d.test", i), []netip.Addr{v6(0)}, time.Minute, now)
		}, MaxNamesPerAddress * 3, MaxNamesPerAddress},
		{"names", func(n *Names, i int) error {
			return n.Grant(fmt.Sprintf("n%d.test", i), []netip.Addr{v6(i)}, time.Minute, now)
		}, MaxNames + 100, MaxNames},
		{"grants", func(n *Names, i int) error {
			return n.Grant(fmt.Sprintf("n%d.test", i%(MaxNames-1)), []netip.Addr{v6(i)}, time.Minute, now)
		}, MaxGrants + 100, MaxGrants},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := NewNames(NamesConfig{})
			if err := n.Pin("pinned.test", []netip.Addr{addr("192.0.2.1")}); err != nil {
				t.Fatal(err)
			}
			for i := range tt.times {
				if err := tt.grant(n, i); err != nil {
					t.Fatal(err)
				}
			}
			pinned := 1
			if tt.name == "names" || tt.name == "grants" {
				pinned = 0 // it is among what is kept
			}
			s := n.Stats()
			if s.Grants != tt.kept+pinned || s.Evicted != uint64(tt.times-tt.kept+1-pinned) {
				t.Errorf("%+v, expected %d kept", s, tt.kept)
			}
			if !n.Holds("pinned.test", addr("192.0.2.1"), now.Add(1e6*time.Hour)) {
				t.Error("a pinned grant is gone")
			}
			// What is over makes room without being counted as given up.
			if err := n.Grant("later.test", []netip.Addr{v6(1)}, time.Minute, now.Add(2*time.Hour)); err != nil {
				t.Fatal(err)
			}
			if after := n.Stats(); after.Grants != 2 || after.Evicted != s.Evicted || after.Names != 2 {
				t.Errorf("after all is over: %+v", after)
			}
		})
	}
}

// The twin of Names: a list.
type namesTwin = []grant

func TestNamesAgreeWithAList(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	for range 200 {
		checkNames(t, rng.IntN, 300)
	}
}

// FuzzNames lets the fuzzer throw the dice.
func FuzzNames(f *testing.F) {
	f.Add([]byte("some dice"))
	f.Fuzz(func(t *testing.T, data []byte) {
		i := 0
		checkNames(t, func(n int) int {
			if i++; i > len(data) {
				return i % n
			}
			return int(data[i-1]) % n
		}, 100)
	})
}

func checkNames(t *testing.T, d func(int) int, steps int) {
	t.Helper()
	n, twin, now := NewNames(NamesConfig{TTLFloor: 1, TTLCap: 50}), namesTwin{}, time.Unix(1000, 0)
	for range steps {
		now = now.Add(time.Duration(d(3)))
		name, a, ttl := twinNames[d(len(twinNames))], netip.AddrFrom4([4]byte{192, 0, 2, byte(d(12))}), time.Duration(d(80))
		if err := n.Grant(name, []netip.Addr{a}, ttl, now); err != nil {
			t.Fatal(err)
		}
		until := now.Add(min(max(ttl, 1), 50))
		i := slices.IndexFunc(twin, func(g grant) bool { return g.name == name && g.addr == a && g.until.After(now) })
		if i < 0 {
			twin = append(twin, grant{name: name, addr: a, until: until})
		} else if until.After(twin[i].until) {
			twin[i].until = until
		}
		at := now.Add(time.Duration(d(20)))
		for _, name := range twinNames {
			want := slices.ContainsFunc(twin, func(g grant) bool { return g.name == name && g.addr == a && g.until.After(at) })
			if n.Holds(name, a, at) != want || slices.Contains(n.Of(a, at, nil), name) != want {
				t.Fatalf("%s at %v: got %v, the list says %v", name, a, !want, want)
			}
		}
	}
	for i, g := range n.byExpiry {
		if g.index != i || !slices.Contains(n.byName[g.name], g) || !slices.Contains(n.byAddr[g.addr], g) {
			t.Fatalf("grant %+v is lost", g)
		}
	}
}

func TestNamesAreSafeForConcurrentUse(t *testing.T) {
	n, now := NewNames(NamesConfig{}), time.Unix(1000, 0)
	rules := mustCompile(t, allowing(Rule{Action: Allow, To: []Peer{{Domain: "**.test"}}}), here)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 500 {
				grant1(t, n, fmt.Sprintf("n%d-%d.test", i, j), "198.51.100.1", time.Minute, now)
				rules.Decide(Query{Proto: uint8(TCP), Dst: netip.MustParseAddrPort("198.51.100.1:443"), Names: n, Now: now})
				n.Stats()
			}
		})
	}
	wg.Wait()
	if s := n.Stats(); s.Grants != MaxNamesPerAddress {
		t.Errorf("%+v", s)
	}
}
