package inbound

// Fragments of packets of the inbound path. They are not put together: the first
// one has the ports, is judged as a packet is, and opens the way for the others of
// the same packet, which are known by addresses, protocol and identifier. Fragments
// that come before the first one are dropped: the kernel of the uplink namespace,
// which puts packets together and cuts them again, sends them in order, and so does
// the sandbox's.
//
// A later fragment that reaches into the transport header of the first is dropped
// (RFC 1858 section 4.2, RFC 3128).

import (
	"net/netip"
	"sync"
	"time"

	"sluice.dev/sluice/nat"
)

const (
	// MaxFragmented is how many packets in fragments are known at once; the oldest
	// gives way.
	MaxFragmented = 1024
	// FragTimeout is for how long: net.ipv4.ipfrag_time.
	FragTimeout = 30 * time.Second
)

type fragKey struct {
	src, dst netip.Addr
	id       uint32
	proto    uint8
	// dir keeps the sides apart: the sandbox must not be able to continue, in the client's name, a
	// packet that the client began.
	dir nat.Dir
}

type fragEntry struct {
	fl    *inboundFlow
	since time.Time
}

// fragTable maps packets in fragments, of both directions, to their flows.
type fragTable struct {
	mu      sync.Mutex
	Entries map[fragKey]fragEntry
	Ring    []fragKey // in the order of arrival, oldest at next once it is full
	next    int
}

func newFragTable() fragTable { return fragTable{Entries: make(map[fragKey]fragEntry)} }

func (p *datum) fragKey(d nat.Dir) fragKey {
	return fragKey{src: p.src, dst: p.dst, id: p.fragID, proto: p.proto, dir: d}
}

// note lets the fragments that follow p pass.
func (t *fragTable) note(d nat.Dir, p *datum, fl *inboundFlow, now time.Time) {
	k := p.fragKey(d)
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.Entries[k]; !known {
		if len(t.Ring) < MaxFragmented {
			t.Ring = append(t.Ring, k)
		} else {
			delete(t.Entries, t.Ring[t.next])
			t.Ring[t.next] = k
			t.next = (t.next + 1) % MaxFragmented
		}
	}
	t.Entries[k] = fragEntry{fl: fl, since: now}
}

// forget stops that again. The key stays in the ring until its turn.
func (t *fragTable) forget(d nat.Dir, p *datum) {
	k := p.fragKey(d)
	t.mu.Lock()
	if e, ok := t.Entries[k]; ok {
		e.fl = nil
		t.Entries[k] = e
	}
	t.mu.Unlock()
}

// find returns the flow of a later fragment, or nil.
func (t *fragTable) find(d nat.Dir, p *datum, now time.Time) *inboundFlow {
	if p.fragOff < headerLenOf(p.proto) {
		return nil
	}
	t.mu.Lock()
	e, ok := t.Entries[p.fragKey(d)]
	t.mu.Unlock()
	if !ok || e.fl == nil || now.Sub(e.since) > FragTimeout || e.fl.Lease.Ended() {
		return nil
	}
	return e.fl
}
