package policy

import (
	"net/netip"
	"time"
)

// Ended grants are remembered for a while so that a refusal can say that the address had been
// granted. They never allow anything.

// maxFormer bounds what is remembered, some 64 KiB.
const maxFormer = 1024

// formerGrants are the last grants that ended. The zero value has none.
type formerGrants struct {
	ring  []formerGrant
	next  int
	count map[netip.Addr]int // in the ring: most refused addresses were never granted
}

type formerGrant struct {
	name    string
	addr    netip.Addr
	evicted bool // newer grants took its place
}

// note remembers g in place of the grant that ended longest ago.
func (f *formerGrants) note(g *grant, evicted bool) {
	if f.count == nil {
		f.count = make(map[netip.Addr]int)
	}
	was := formerGrant{g.name, g.addr, evicted}
	f.count[was.addr]++
	if len(f.ring) < maxFormer {
		f.ring = append(f.ring, was)
		return
	}
	oldest := f.ring[f.next].addr
	if f.count[oldest]--; f.count[oldest] == 0 {
		delete(f.count, oldest)
	}
	f.ring[f.next] = was
	f.next = (f.next + 1) % maxFormer
}

// former yields the names under which an address was granted but is not now, and whether the grant
// was evicted early.
func (n *Names) former(addr netip.Addr, now time.Time, yield func(name string, evicted bool)) {
	if n == nil || now.IsZero() {
		return
	}
	addr = addr.Unmap()
	n.mu.RLock()
	defer n.mu.RUnlock()
	for _, g := range n.byAddr[addr] {
		if !g.until.After(now) { // expire has not reached it yet
			yield(g.name, false)
		}
	}
	if n.gone.count[addr] == 0 {
		return
	}
	for k, size := 1, len(n.gone.ring); k <= size; k++ { // newest first
		if g := &n.gone.ring[(n.gone.next-k+size)%size]; g.addr == addr {
			yield(g.name, g.evicted)
		}
	}
}
