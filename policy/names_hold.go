package policy

import (
	"container/heap"
	"net/netip"
	"time"
)

// Hold keeps grants alive while a flow uses them: its client knows the address, keeps using it, and
// reconnects to it when the connection is lost. The zero value holds nothing.
type Hold struct {
	names  *Names
	grants []*grant
}

// heldUntil is the end of a held grant. It sorts after all others except pinned ones.
var heldUntil = forever.Add(-1)

// Hold holds the grant of an address under a name, or under every name if name is empty. It does
// not hold addresses that are not granted now.
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

// End releases the grants. The grant of the name that the flow used then holds for the shortest TTL
// from now. The others, and all of them if name is empty, end as if they had not been held.
func (h *Hold) End(name string, now time.Time) {
	if len(h.grants) == 0 {
		return
	}
	n := h.names
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, g := range h.grants {
		if g.index < 0 {
			continue // the full table evicted it
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
