package dns

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

// counted wraps an upstream to count the questions that reach it.
func counted(n *int, up func([]byte) [][]byte) func([]byte) [][]byte {
	return func(q []byte) [][]byte { *n++; return up(q) }
}

func TestAnAnswerIsKeptForItsTTL(t *testing.T) {
	for _, row := range []struct {
		about   string
		records []string
		code    int
		holds   time.Duration
		told    uint32 // TTL on arrival, of the first record of any section
	}{
		{"an address", []string{"an pypi.test. 60 A 198.51.100.1"}, 0, 60 * time.Second, 60},
		{"the least TTL of a chain", []string{"an pypi.test. 600 CNAME a.test.", "an a.test. 20 A 198.51.100.1"}, 0, 20 * time.Second, 20},
		{"a TTL of nothing, for the floor", []string{"an pypi.test. 0 A 198.51.100.1"}, 0, cacheFloor, 0},
		{"a TTL of a day, for ttlCap", []string{"an pypi.test. 86400 A 198.51.100.1"}, 0, policy.DefaultTTLCap, 3600},
		{"no such data, for the zone's minimum", []string{"ns test. 900 SOA a.test. b.test. 1 2 3 4 30"}, 0, 30 * time.Second, 30},
		{"no such data, for the TTL of what says so", []string{"ns test. 10 SOA a.test. b.test. 1 2 3 4 900"}, 0, 10 * time.Second, 10},
		{"no such name", []string{"ns test. 900 SOA a.test. b.test. 1 2 3 4 30"}, dns.RcodeNameError, 30 * time.Second, 30},
		{"no such name that nobody vouches for, for the floor", nil, dns.RcodeNameError, cacheFloor, 0},
		{"a server's failure", nil, dns.RcodeServerFailure, cacheFailure, 0},
	} {
		t.Run(row.about, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				asked := 0
				up := says(row.records...)
				g := newGate(t, gatedPolicy, counted(&asked, func(q []byte) [][]byte {
					out := up(q)
					put16(out[0], 2, be16(out[0], 2)|uint16(row.code))
					return out
				}))
				told := func() *dns.Msg { return unpack(t, packet(g.Resolver, ask(t, "PyPI.test", dns.TypeA))) }
				first := told()
				ttl := func(m *dns.Msg) uint32 {
					for _, r := range append(slices.Clone(m.Answer), m.Ns...) {
						return r.Header().Ttl
					}
					return 0
				}
				if first.Rcode != row.code || ttl(first) != row.told {
					t.Errorf("at first: %v", first)
				}
				time.Sleep(row.holds - time.Nanosecond)
				again := told()
				if asked != 1 || again.Rcode != row.code || len(again.Answer) != len(first.Answer) || again.Question[0].Name != "PyPI.test." {
					t.Errorf("asked %d times right before the end, and told %v", asked, again)
				}
				if want := max(int(row.told)-int((row.holds-time.Nanosecond)/time.Second), 0); ttl(again) != uint32(want) {
					t.Errorf("a TTL of %d, want %d", ttl(again), want)
				}
				time.Sleep(time.Nanosecond)
				if told(); asked != 2 {
					t.Errorf("asked %d times after the end", asked)
				}
				if s := g.Stats(); s.Cached != 1 || s.Forwarded != 2 {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

// The client gets its own header back, whichever client asked first.
func TestACachedAnswerIsForTheClient(t *testing.T) {
	g := newGate(t, gatedPolicy, says("an pypi.test. 60 A 198.51.100.1"))
	packet(g.Resolver, ask(t, "pypi.test", dns.TypeA))
	m := unpack(t, packet(g.Resolver, ask(t, "PYPI.test", dns.TypeA, edns(1232, true), func(m *dns.Msg) { m.Id, m.RecursionDesired, m.CheckingDisabled = 4711, false, true })))
	if m.Id != 4711 || m.RecursionDesired || !m.CheckingDisabled || !m.RecursionAvailable || m.Question[0].Name != "PYPI.test." || m.IsEdns0() == nil || !m.IsEdns0().Do() {
		t.Errorf("with options: %v", m)
	}
	m = unpack(t, packet(g.Resolver, ask(t, "pypi.test", dns.TypeA)))
	if !m.RecursionDesired || m.CheckingDisabled || m.IsEdns0() != nil || m.Question[0].Name != "pypi.test." {
		t.Errorf("without: %v", m)
	}
	long := newGate(t, gatedPolicy, says(slices.Collect(func(yield func(string) bool) {
		for i := range 64 {
			yield(fmt.Sprintf("an pypi.test. 60 A 198.51.100.%d", i))
		}
	})...))
	for _, row := range []struct {
		size uint16
		n    int
	}{{4096, 64}, {512, 29}, {4096, 64}} {
		if m := unpack(t, packet(long.Resolver, ask(t, "pypi.test", dns.TypeA, edns(row.size, false)))); len(m.Answer) != row.n || m.Truncated != (row.n < 64) {
			t.Errorf("%d records for a client that takes %d bytes", len(m.Answer), row.size)
		}
	}
}

// Addresses in a cached answer are granted for as long as it is served, and again if the grant was
// given up.
func TestACachedAnswerIsGranted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		g := newGate(t, gatedPolicy, counted(&asked, says("an pypi.test. 600 A 198.51.100.1")), func(c *Config) {
			c.Names.(*policy.Names).Configure(policy.NamesConfig{TTLFloor: time.Minute, TTLCap: time.Hour})
		})
		holds := func(until time.Duration) bool {
			return g.names.Holds("pypi.test", netip.MustParseAddr("198.51.100.1"), time.Now().Add(until))
		}
		packet(g.Resolver, ask(t, "pypi.test", dns.TypeA))
		time.Sleep(590 * time.Second)
		packet(g.Resolver, ask(t, "pypi.test", dns.TypeA))
		if asked != 1 || !holds(time.Minute-time.Second) || holds(time.Minute+time.Second) {
			t.Errorf("asked %d times; an answer with ten seconds left is granted for the floor of a minute", asked)
		}
		for i := range policy.MaxNames { // push it out
			if err := g.names.Grant(fmt.Sprintf("n%d.test", i), []netip.Addr{netip.MustParseAddr("198.51.100.9")}, time.Hour, time.Now()); err != nil {
				break
			}
		}
		time.Sleep(regrant)
		packet(g.Resolver, ask(t, "pypi.test", dns.TypeA))
		if asked != 1 || !holds(0) {
			t.Errorf("asked %d times; what was told is not granted", asked)
		}
	})
}

// Only answers that the rules in force allow are served, and none from former servers.
func TestTheCacheEndsWithRulesAndServers(t *testing.T) {
	var rules atomic.Pointer[policy.Rules]
	rules.Store(compile(t, gatedPolicy))
	asked := 0
	g := newGate(t, gatedPolicy, counted(&asked, says("an inner.test. 600 A 10.0.0.1")), func(c *Config) { c.Rules = rules.Load })
	g.net.servers[server(2)] = g.net.servers[server(1)]
	q := ask(t, "inner.test", dns.TypeA)
	if m := unpack(t, packet(g.Resolver, q)); len(m.Answer) != 1 {
		t.Fatal(m)
	}
	rules.Store(compile(t, gatedPolicy+"  - {action: allow, to: [{domain: other.test}]}\n"))
	if m := unpack(t, packet(g.Resolver, q)); len(m.Answer) != 1 || asked != 1 {
		t.Errorf("under other rules that allow it: asked %d times, %v", asked, m)
	}
	closed := "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: c}\nspec: {defaultAction: reject, egress: [{action: allow, to: [{domain: inner.test}]}]}\n"
	rules.Store(compile(t, closed))
	if m := unpack(t, packet(g.Resolver, q)); len(m.Answer) != 0 || m.Rcode != dns.RcodeSuccess {
		t.Errorf("under rules that open no private address: %v", m)
	}
	rules.Store(compile(t, "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: c}\nspec: {defaultAction: reject}\n"))
	before := asked
	g.forget()
	if m := unpack(t, packet(g.Resolver, q)); m.Rcode != dns.RcodeNameError || asked != before {
		t.Errorf("under rules that allow no name: asked %d times more, %v", asked-before, m)
	}
	rules.Store(compile(t, gatedPolicy))
	packet(g.Resolver, q)
	packet(g.Resolver, q)
	before = asked
	g.SetUpstreams(Upstreams{Servers: []netip.AddrPort{server(2)}})
	if packet(g.Resolver, q); asked != before+1 {
		t.Errorf("asked %d times after the servers changed, want once", asked-before)
	}
}

// An answer from servers that are no longer the host's goes to the clients that wait for it, and is
// not kept.
func TestAnAnswerOfOldServersIsNotKept(t *testing.T) {
	var c cache
	k := cacheKey{name: "\x01a\x00", qtype: typeA}
	e := &cached{key: k, until: time.Now().Add(time.Hour)}
	old := c.generation()
	c.flush()
	if c.put(e, old); c.entries[k] != nil {
		t.Error("it is kept")
	}
	if c.put(e, c.generation()); c.entries[k] == nil {
		t.Error("one of the new servers is not")
	}
}

func TestTheCacheIsBounded(t *testing.T) {
	for _, row := range []struct {
		about   string
		each    int // bytes of a message
		entries int
	}{
		{"by entries", 40, maxCached},
		{"by bytes", 8 << 10, maxCachedBytes / (3*8<<10 + cachedOverhead + 4)},
	} {
		t.Run(row.about, func(t *testing.T) {
			var c cache
			until := time.Now().Add(time.Hour)
			for i := range 2 * maxCached {
				c.put(&cached{key: keyOf(i), wire: make([]byte, row.each), until: until}, 0)
				if c.order.Len() > maxCached || c.bytes > maxCachedBytes || len(c.entries) != c.order.Len() {
					t.Fatalf("%d entries of %d bytes", c.order.Len(), c.bytes)
				}
				c.lookup(keyOf(0), nil, time.Now()) // used, so it stays
			}
			if c.order.Len() != row.entries {
				t.Errorf("%d entries, want %d", c.order.Len(), row.entries)
			}
			if e, _ := c.lookup(keyOf(0), nil, time.Now()); e == nil {
				t.Error("the one in use was given up")
			}
		})
	}
}

func keyOf(i int) cacheKey {
	return cacheKey{name: name(binary.BigEndian.AppendUint32(nil, uint32(i))), qtype: typeA}
}

// stupidCache is the cache's twin: a map, and a list in order of use.
type stupidCache struct {
	at  map[cacheKey]*cached
	use []cacheKey // most recently used last
}

func (s *stupidCache) touch(k cacheKey) {
	s.use = append(slices.DeleteFunc(s.use, func(o cacheKey) bool { return o == k }), k)
}

func (s *stupidCache) lookup(k cacheKey, rules *policy.Rules, now time.Time) *cached {
	e := s.at[k]
	if e == nil || e.rules != rules || !now.Before(e.until) {
		return nil
	}
	s.touch(k)
	return e
}

func (s *stupidCache) put(e *cached) {
	s.at[e.key] = e
	s.touch(e.key)
	for {
		bytes := 0
		for e := range maps.Values(s.at) {
			bytes += e.weight()
		}
		if len(s.at) <= maxCached && bytes <= maxCachedBytes {
			return
		}
		delete(s.at, s.use[0])
		s.use = s.use[1:]
	}
}

func FuzzCache(f *testing.F) {
	for seed := range uint64(8) {
		f.Add(seed, uint16(300))
	}
	f.Fuzz(func(t *testing.T, seed uint64, steps uint16) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var c cache
		twin := &stupidCache{at: make(map[cacheKey]*cached)}
		rules := []*policy.Rules{nil, new(policy.Rules)}
		now := time.Unix(0, 0)
		for range steps % 2000 {
			k, r := keyOf(rng.IntN(40)), rules[rng.IntN(2)]
			switch rng.IntN(20) {
			case 0:
				c.flush()
				*twin = stupidCache{at: make(map[cacheKey]*cached)}
			case 1, 2, 3:
				now = now.Add(time.Duration(rng.IntN(5)) * time.Second)
			case 4, 5, 6, 7:
				// Large entries, so that few fill it.
				e := &cached{key: k, rules: r, until: now.Add(time.Duration(rng.IntN(20)) * time.Second), wire: make([]byte, rng.IntN(maxCachedBytes/20))}
				c.put(e, c.generation())
				twin.put(e)
			default:
				if got, _ := c.lookup(k, r, now); got != twin.lookup(k, r, now) {
					t.Fatalf("%v: got %v", k, got)
				}
			}
			bytes := 0
			for e := c.order.Front(); e != nil; e = e.Next() {
				bytes += e.Value.(*cached).weight()
			}
			if len(c.entries) != len(twin.at) || c.order.Len() != len(twin.at) || bytes != c.bytes || bytes > maxCachedBytes {
				t.Fatalf("%d entries, %d in order, %d in the twin; %d bytes, counted as %d", len(c.entries), c.order.Len(), len(twin.at), bytes, c.bytes)
			}
		}
	})
}
