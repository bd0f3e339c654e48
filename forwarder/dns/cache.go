package dns

// The cache of the gate: what upstream said, sifted, kept for as long as it said.
//
//	question ─► lookup ─┬─ fresh, under the rules in force ─► written for this client
//	                    └─ else: asked upstream, once for all who wait (gate.go)
//
// An answer is kept for the least TTL of its records, a negative one for what its SOA
// record says (RFC 2308 section 5), at least cacheFloor and at most ttlCap; a server's
// failure for cacheFailure (RFC 9520 section 3.2). So a name that is asked again and
// again is asked upstream only every few seconds, whatever TTL its server likes, and
// says nothing to it in between.
//
// An entry counts only under the rules that it was judged by. Where other rules would
// have made the same of the answer it is theirs too (stands); else they ask anew.
// Another set of upstream servers empties the cache. An entry that has ended is kept,
// as long as there is room, to tell whether the next answer says anything new (tunnel.go).

import (
	"bytes"
	"container/list"
	"net/netip"
	"sync"
	"time"

	"sluice.dev/sluice/policy"
)

const (
	// cacheFloor is for how long an answer holds at least. It is the shortest TTL that
	// load balancers are given in earnest.
	cacheFloor = 5 * time.Second
	// cacheFailure is for how long a server's refusal or failure holds.
	cacheFailure = time.Second

	// maxCached bounds the answers, and maxCachedBytes their memory, cachedOverhead
	// added for each.
	maxCached      = 4096
	maxCachedBytes = 4 << 20
	cachedOverhead = 512

	// regrant is how often the grants of an answer that is told again and again are renewed.
	regrant = time.Second
)

// cacheKey is a question's name, in wire form, and its type.
type cacheKey struct {
	name  name
	qtype uint16
}

// cache holds answers, the least recently used one at the back of order. Its zero value
// is ready.
type cache struct {
	mu      sync.Mutex
	entries map[cacheKey]*list.Element // of *cached
	order   list.List
	bytes   int
	age     uint64 // of the upstream servers: counts how often they changed
}

// cached is one answer. Only renewing changes, under the cache's lock.
type cached struct {
	key      cacheKey
	rules    *policy.Rules // it was judged by
	name     string        // in policy's normal form
	verdict  policy.NameVerdict
	from     time.Time // when it came
	until    time.Time
	wire     []byte   // the answer, without an ID, the client's bits and an OPT record
	ttls     []uint16 // where the records' TTLs are
	ttl      uint32   // of all records, when it came
	answer   *sifted
	size     int       // of the data that it told
	renewing time.Time // when its addresses were last granted
}

// lookup finds an answer that holds under rules. Due says that its addresses must be
// granted again before anybody sees it.
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

// peek finds an answer that has not ended, whatever rules it was judged by.
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

// sameData reports whether two answers differ in TTLs at most.
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

// generation is to be handed to put: what was asked of servers that are no longer
// the host's is not kept.
func (c *cache) generation() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.age
}

// put keeps an answer in place of the one before, and gives up the least used ones.
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

// flush forgets everything, and what is on its way.
func (c *cache) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries, c.bytes = nil, 0
	c.order.Init()
	c.age++
}

// weight is what an entry takes of maxCachedBytes: the message, the records that it was
// made of, and the rest.
func (e *cached) weight() int { return 3*len(e.wire) + len(e.key.name) + cachedOverhead }

// stands gives the answer as it is under other rules, by which v lets its name be asked,
// or nil where they could have made another one of it.
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

// newCached makes an entry of an answer to qy.
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

// write makes the answer to qy, whose question is e's.
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

// left is for how long the addresses are still to be granted.
func (e *cached) left(now time.Time) time.Duration {
	return max(time.Duration(e.ttl)*time.Second-now.Sub(e.from), 0)
}

// addrs are what the answer's name leads to, if the policy grants by it.
func (e *cached) addrs() []netip.Addr {
	if !e.verdict.Grants {
		return nil
	}
	return e.answer.addrs
}
