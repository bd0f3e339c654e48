package policy

import (
	"container/heap"
	"net/netip"
	"time"
)

// Hold keeps grants for as long as a flow by them is open: its client knows the address,
// goes on using it, and comes again by it when the connection is lost. The zero value
// holds nothing.
type Hold struct {
	names  *Names
	grants []*grant
}

// heldUntil is the end of a grant that is held. It sorts behind all others but those for good.
var heldUntil = forever.Add(-1)

// Hold holds the grant of an address under a name, or under every name if none is given.
// What is not granted now is not held.
func (n *Names) Hold(addr netip.Addr, name string, now time.Time) (h Hold) {
	if n == nil {
		return h
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h.names = n
	for _, g := range n.byAddr[addr.Unmap()] {
		if name != "" && g.name != name || !g.until.After(now) || g.until == forever {
			continue
		}
		if g.holds++; g.holds == 1 {
			g.ends, g.until = g.until, heldUntil
			heap.Fix(&n.byExpiry, g.index)
		}
		h.grants = append(h.grants, g)
	}
	return h
}

// End lets go. The grant of the name by which the flow went holds for the shortest TTL from
// now on; the others, and all if there is no name, as if they had not been held.
func (h *Hold) End(name string, now time.Time) {
	if len(h.grants) == 0 {
		return
	}
	n := h.names
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, g := range h.grants {
		if g.index < 0 {
			continue // the table was full, and gave it up
		}
		if g.name == name {
			g.ends = latest(g.ends, now.Add(n.floor))
		}
		if g.holds--; g.holds == 0 {
			g.until = g.ends
			heap.Fix(&n.byExpiry, g.index)
		}
	}
	h.grants = nil
}
