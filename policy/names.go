package policy

import (
	"cmp"
	"container/heap"
	"errors"
	"iter"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Names records what the sandbox's resolver told it: which address is granted under which name, and
// until when. It outlives the rules, so that a reload takes nothing away; a grant counts only while
// the rules in force match its name.
//
//	name ──► its grants (≤ MaxGrantsPerName) ──► address
//	address ──► its grants (≤ MaxNamesPerAddress) ──► name
//	heap of all grants (≤ MaxGrants), the first to expire on top
//
// A full table evicts the grant that would expire first: a sandbox that asks for too much loses its
// own grants, and gains none.
type Names struct {
	mu          sync.RWMutex
	floor, ceil time.Duration
	byName      map[string][]*grant
	byAddr      map[netip.Addr][]*grant
	byExpiry    grantHeap
	evicted     uint64
	gone        formerGrants
}

// Bounds on what a sandbox can make us remember, about 4 MiB at worst. A name may have every
// address that its answers can list in a minute (package dns limits them against tunnels: 16 KiB
// for a name that a rule spells out), so a name that rotates through hundreds of addresses loses
// none within the shortest TTL. An address may have every name under a wildcard that may be asked
// in that minute (maxNamesPerMinute).
const (
	MaxNames           = 4096
	MaxGrantsPerName   = 4096
	MaxNamesPerAddress = 128
	MaxGrants          = 16384
)

// ErrGrant is returned for a grant without a normalized name or without an address.
var ErrGrant = errors.New("grant: no name in its normal form, or no address")

// NamesConfig bounds how long a grant holds. The zero value means the defaults.
type NamesConfig struct {
	TTLFloor, TTLCap time.Duration
}

type grant struct {
	name  string
	addr  netip.Addr
	until time.Time // heldUntil while flows hold it
	index int       // in the heap; -1 once evicted

	holds int       // flows that hold it
	ends  time.Time // until, ignoring holds
}

// NewNames returns an empty table.
func NewNames(c NamesConfig) *Names {
	n := &Names{byName: make(map[string][]*grant), byAddr: make(map[netip.Addr][]*grant)}
	n.Configure(c)
	return n
}

// Configure sets the bounds for later grants.
func (n *Names) Configure(c NamesConfig) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.floor = cmp.Or(c.TTLFloor, DefaultTTLFloor)
	n.ceil = max(cmp.Or(c.TTLCap, DefaultTTLCap), n.floor)
}

// Grant records that a name, in its normal form, has these addresses for ttl, which the floor and
// the cap bound. An existing grant is extended, never shortened.
func (n *Names) Grant(name string, addrs []netip.Addr, ttl time.Duration, now time.Time) error {
	if checkName(name) != nil || len(addrs) == 0 {
		return ErrGrant
	}
	for _, a := range addrs {
		if !a.IsValid() || a.Zone() != "" {
			return ErrGrant
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	until := now.Add(min(max(ttl, n.floor), n.ceil))
	n.expire(now)
	for _, a := range addrs {
		n.grant(name, a.Unmap(), until)
	}
	return nil
}

// Pin grants addresses to a name permanently: for the host entries that the sandbox started with,
// which are never asked for.
func (n *Names) Pin(name string, addrs []netip.Addr) error {
	if checkName(name) != nil {
		return ErrGrant
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range addrs {
		if !a.IsValid() || a.Zone() != "" {
			return ErrGrant
		}
		n.grant(name, a.Unmap(), forever)
	}
	return nil
}

// forever is later than any time that a TTL can reach.
var forever = time.Unix(1<<40, 0)

func (n *Names) grant(name string, addr netip.Addr, until time.Time) {
	if g := n.find(name, addr); g != nil {
		n.prolong(g, until)
		return
	}
	if list := n.byName[name]; len(list) >= MaxGrantsPerName {
		n.evict(soonest(list))
	}
	if list := n.byAddr[addr]; len(list) >= MaxNamesPerAddress {
		n.evict(soonest(list))
	}
	for len(n.byExpiry) >= MaxGrants || len(n.byName) >= MaxNames && n.byName[name] == nil {
		n.evict(n.byExpiry[0])
	}
	g := &grant{name: name, addr: addr, until: until}
	n.byName[name] = append(n.byName[name], g)
	n.byAddr[addr] = append(n.byAddr[addr], g)
	heap.Push(&n.byExpiry, g)
}

// find finds a grant by the shorter of its two lists.
func (n *Names) find(name string, addr netip.Addr) *grant {
	list := n.byAddr[addr]
	if byName := n.byName[name]; len(byName) < len(list) {
		list = byName
	}
	for _, g := range list {
		if g.name == name && g.addr == addr {
			return g
		}
	}
	return nil
}

func (n *Names) prolong(g *grant, until time.Time) {
	switch {
	case g.holds > 0:
		g.ends = latest(g.ends, until)
	case until.After(g.until):
		g.until = until
		heap.Fix(&n.byExpiry, g.index)
	}
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func soonest(list []*grant) *grant {
	return slices.MinFunc(list, func(a, b *grant) int { return a.until.Compare(b.until) })
}

func (n *Names) evict(g *grant) {
	n.evicted++
	n.gone.note(g, true)
	n.remove(g)
}

// expire removes grants that have ended.
func (n *Names) expire(now time.Time) {
	for len(n.byExpiry) > 0 && !n.byExpiry[0].until.After(now) {
		n.gone.note(n.byExpiry[0], false)
		n.remove(n.byExpiry[0])
	}
}

func (n *Names) remove(g *grant) {
	heap.Remove(&n.byExpiry, g.index)
	g.index = -1
	if list := without(n.byName[g.name], g); len(list) > 0 {
		n.byName[g.name] = list
	} else {
		delete(n.byName, g.name)
	}
	if list := without(n.byAddr[g.addr], g); len(list) > 0 {
		n.byAddr[g.addr] = list
	} else {
		delete(n.byAddr, g.addr)
	}
}

func without(list []*grant, g *grant) []*grant {
	i := slices.Index(list, g)
	return slices.Delete(list, i, i+1)
}

// Bounded returns how long a grant for ttl holds.
func (n *Names) Bounded(ttl time.Duration) time.Duration {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return min(max(ttl, n.floor), n.ceil)
}

// Granted is one address under one name, with its remaining time.
type Granted struct {
	Name string
	Addr netip.Addr
	TTL  time.Duration
}

// All yields the current grants, except pinned ones.
func (n *Names) All(now time.Time) iter.Seq[Granted] {
	return func(yield func(Granted) bool) {
		n.mu.RLock()
		defer n.mu.RUnlock()
		for _, g := range n.byExpiry {
			until := g.until
			if g.holds > 0 {
				until = g.ends
			}
			if left := until.Sub(now); left > 0 && until != forever && !yield(Granted{g.name, g.addr, left}) {
				return
			}
		}
	}
}

// Of appends the names under which an address is granted now. With a zero time nothing is granted.
func (n *Names) Of(addr netip.Addr, now time.Time, dst []string) []string {
	n.each(addr, now, "", func(name string) { dst = append(dst, name) })
	return dst
}

// Holds reports whether an address is granted under a name now.
func (n *Names) Holds(name string, addr netip.Addr, now time.Time) bool {
	if n == nil || now.IsZero() {
		return false
	}
	n.mu.RLock()
	defer n.mu.RUnlock()
	for _, g := range n.byAddr[addr.Unmap()] {
		if g.name == name {
			return g.until.After(now)
		}
	}
	return false
}

// each yields the names under which an address is granted now. The held name comes first, whatever
// the time.
func (n *Names) each(addr netip.Addr, now time.Time, held string, yield func(string)) {
	if held != "" {
		yield(held)
	}
	if n == nil || now.IsZero() {
		return
	}
	n.mu.RLock()
	defer n.mu.RUnlock()
	for _, g := range n.byAddr[addr.Unmap()] {
		if g.name != held && g.until.After(now) {
			yield(g.name)
		}
	}
}

// NamesStats are counters and sizes.
type NamesStats struct {
	Names   int    `json:"names"`
	Grants  int    `json:"grants"`
	Evicted uint64 `json:"evicted"` // removed because the table was full
}

// Stats reports how full the table is.
func (n *Names) Stats() NamesStats {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return NamesStats{Names: len(n.byName), Grants: len(n.byExpiry), Evicted: n.evicted}
}

// grantHeap is a container/heap of grants, the first to expire on top.
type grantHeap []*grant

func (h grantHeap) Len() int           { return len(h) }
func (h grantHeap) Less(i, j int) bool { return h[i].until.Before(h[j].until) }
func (h grantHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *grantHeap) Push(x any) {
	g := x.(*grant)
	g.index = len(*h)
	*h = append(*h, g)
}

func (h *grantHeap) Pop() any {
	last := len(*h) - 1
	g := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return g
}
