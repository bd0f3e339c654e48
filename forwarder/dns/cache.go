package dns

// The cache of the gate: upstream's answers, sifted, kept for as long as their TTLs say.
//
//	question ─► lookup ─┬─ fresh, under the rules in force ─► written for this client
//	                    └─ else: asked upstream, once for all who wait (gate.go)
//
// An answer is kept for the least TTL of its records, a negative one for the TTL of its SOA record
// (RFC 2308 section 5), at least cacheFloor and at most ttlCap. A server's failure is kept for
// cacheFailure (RFC 9520 section 3.2). So a name that is asked repeatedly goes upstream only every
// few seconds, whatever TTL its server sets, and tells that server nothing in between.
//
// An entry is valid only under the rules that it was judged by. If other rules would have made the
// same of the answer, it is valid under them too (stands); otherwise the name is asked again. A new
// set of upstream servers empties the cache. An expired entry is kept while there is room, to tell
// whether the next answer says anything new (tunnel.go).

import (
	"bytes"
	"container/list"
	"net/netip"
	"sync"
	"time"

	"sluice.dev/sluice/policy"
)

const (
	// cacheFloor is the least time that an answer is kept. It is the shortest TTL that load
	// balancers use in practice.
	cacheFloor = 5 * time.Second
	// cacheFailure is how long a server's refusal or failure is kept.
	cacheFailure = time.Second

	// maxCached bounds the number of answers, and maxCachedBytes their memory, with cachedOverhead
	// added for each.
	maxCached      = 4096
	maxCachedBytes = 4 << 20
	cachedOverhead = 512

	// regrant is how often the grants of an answer served from the cache are renewed.
	regrant = time.Second
)

// cacheKey is a question's name, in wire form, and its type.
type cacheKey struct {
	name  name
	qtype uint16
}

// cache holds answers. The least recently used one is at the back of order. The zero value is
// ready.
type cache struct {
	mu      sync.Mutex
	entries map[cacheKey]*list.Element // of *cached
	order   list.List
	bytes   int
	age     uint64 // how often the upstream servers have changed
}

// cached is one answer. Only renewing changes, under the cache's lock.
type cached struct {
	key      cacheKey
	rules    *policy.Rules // that it was judged by
	name     string        // in policy's normal form
	verdict  policy.NameVerdict
	from     time.Time // when it came
	until    time.Time
	wire     []byte   // the answer, without an ID, the client's bits and an OPT record
	ttls     []uint16 // where the records' TTLs are
	ttl      uint32   // of every record, on arrival
	answer   *sifted
	size     int       // of the data that it carried
	renewing time.Time // when its addresses were last granted
}

// lookup finds an answer that is valid under rules. due reports that its addresses must be granted
// again before a client sees it.
func (c *cache) lookup(k cacheKey, rules *policy.Rules, now time.Time) (e *cached, due bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.entries[k]
	if at == nil {
		return nil, false
	}
	e = at.Value.(*cached)
	if e.rules != rules || !now.Before(e.until) {
		return nil, false
	}
	c.order.MoveToFront(at)
	if due = now.Sub(e.renewing) >= regrant; due {
		e.renewing = now
	}
	return e, due
}

// peek finds an answer that has not expired, whatever rules it was judged by.
func (c *cache) peek(k cacheKey, now time.Time) *cached {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at := c.entries[k]; at != nil && now.Before(at.Value.(*cached).until) {
		return at.Value.(*cached)
	}
	return nil
}

// says reports whether the last answer to k, ended or not, had the data of e.
func (c *cache) says(k cacheKey, e *cached) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.entries[k]
	return at != nil && sameData(at.Value.(*cached), e)
}

// sameData reports whether two answers differ at most in their TTLs.
func sameData(a, b *cached) bool {
	if len(a.wire) != len(b.wire) || len(a.ttls) != len(b.ttls) {
		return false
	}
	at := 0
	for i, off := range a.ttls {
		if b.ttls[i] != off || !bytes.Equal(a.wire[at:off], b.wire[at:off]) {
			return false
		}
		at = int(off) + 4
	}
	return bytes.Equal(a.wire[at:], b.wire[at:])
}

// generation returns the value to pass to put, which drops the answer if the upstream servers have
// changed since.
func (c *cache) generation() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.age
}

// put stores an answer in place of the one before, and evicts the least recently used ones.
func (c *cache) put(e *cached, generation uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if generation != c.age {
		return
	}
	if c.entries == nil {
		c.entries = make(map[cacheKey]*list.Element)
	}
	if at := c.entries[e.key]; at != nil {
		c.remove(at)
	}
	c.entries[e.key] = c.order.PushFront(e)
	c.bytes += e.weight()
	for c.order.Len() > maxCached || c.bytes > maxCachedBytes {
		c.remove(c.order.Back())
	}
}

func (c *cache) remove(at *list.Element) {
	e := c.order.Remove(at).(*cached)
	delete(c.entries, e.key)
	c.bytes -= e.weight()
}

// flush forgets every answer, and those still on their way.
func (c *cache) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries, c.bytes = nil, 0
	c.order.Init()
	c.age++
}

// weight is the share of maxCachedBytes that an entry takes: the message, the records that it was
// made of, and the rest.
func (e *cached) weight() int { return 3*len(e.wire) + len(e.key.name) + cachedOverhead }

// stands returns the answer as an entry under other rules, given that v lets its name be asked, or
// nil if they could have made a different one of it.
func (e *cached) stands(rules *policy.Rules, v policy.NameVerdict, now time.Time) *cached {
	if e.answer.rebound > 0 || v.ECH != e.verdict.ECH || !now.Before(e.from.Add(max(time.Duration(rules.DNS().TTLCap), cacheFloor))) {
		return nil
	}
	for _, a := range e.answer.addrs {
		if !rules.Grantable(e.name, a) {
			return nil
		}
	}
	return &cached{
		key: e.key, rules: rules, name: e.name, verdict: v, from: e.from, until: e.until,
		wire: e.wire, ttls: e.ttls, ttl: e.ttl, answer: e.answer, size: e.size, renewing: now,
	}
}

// newCached makes an entry of the answer to qy.
func newCached(qy *query, rules *policy.Rules, v policy.NameVerdict, s *sifted, now time.Time) (*cached, error) {
	wire, err := s.message(qy.q)
	if err != nil {
		return nil, err
	}
	e := &cached{
		key: cacheKey{qy.q.name, qy.q.qtype}, rules: rules, name: qy.gated.name, verdict: v,
		from: now, until: now.Add(s.holds()), wire: wire, ttl: s.told(), answer: s, renewing: now,
	}
	walk(wire, qy.q.end, func(rec record) bool {
		if off, ok := skipName(wire, rec.start); ok {
			e.ttls = append(e.ttls, uint16(off+4))
			e.size += rec.end - (off + 10)
		}
		return true
	})
	return e, nil
}

// write returns the answer to qy, whose question is e's.
func (e *cached) write(qy *query, now time.Time) []byte {
	out := make([]byte, len(e.wire), len(e.wire)+optRecordLen)
	copy(out, e.wire)
	put16(out, 0, qy.id)
	put16(out, 2, be16(out, 2)|be16(qy.asked, 2)&(bitRD|bitCD))
	copy(out[headerLen:qy.q.end], qy.asked[headerLen:]) // the client's own spelling
	left := uint32(0)
	if old := now.Sub(e.from) / time.Second; int64(old) < int64(e.ttl) {
		left = e.ttl - uint32(max(old, 0))
	}
	for _, off := range e.ttls {
		put16(out, int(off), uint16(left>>16))
		put16(out, int(off)+2, uint16(left))
	}
	if qy.edns {
		out = appendOPT(out, rcodeSuccess, qy.do)
	}
	return out
}

// left is how much longer the addresses are to be granted.
func (e *cached) left(now time.Time) time.Duration {
	return max(time.Duration(e.ttl)*time.Second-now.Sub(e.from), 0)
}

// addrs returns the addresses that the answer's name leads to, if the policy grants by it.
func (e *cached) addrs() []netip.Addr {
	if !e.verdict.Grants {
		return nil
	}
	return e.answer.addrs
}
