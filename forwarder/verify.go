package forwarder

// Verification: what a flow says in its first bytes is judged before anything of it passes.
//
// A rule by domain lets a flow through to an address that the sandbox was told under a
// name, if the flow itself says that name: in a ClientHello, in an HTTP request, in a
// QUIC Initial packet. The verdict on its first segment then asks for the first bytes
// (policy.Verdict.Verify), which verify_tcp.go and verify_udp.go read, bounded in bytes
// and in time, and the same question is asked again with what they said:
//
//	Decide ──► Verify: first bytes ──► read, nothing passes ──► Decide with Seen ──► pass, or refuse
//
// A TCP connection is set up before they are read, if anything that they can say would be allowed
// (policy.Verdict.Contact); a datagram is kept. The address is the flow's own destination, which
// is the one that was judged: no name is resolved in between. Clear-text HTTP goes on being judged, request
// by request (verify_http.go, verify_http2.go).
//
// Nobody but the sandbox pays for a flow that waits: there are at most maxChecks of them,
// of which the oldest gives way, each for checkTimeout, and their bytes stay where they
// are queued.

import (
	"container/list"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sluice/forwarder/sniff"
	"sluice/policy"
)

const (
	// maxChecks bounds the flows of each kind whose first bytes are waited for, and
	// those whose refusal is still being told.
	maxChecks = 1024
	// checkTimeout is how long the first bytes may take.
	checkTimeout = 10 * time.Second
	// refusalTimeout is how long a refusal may take to be read.
	refusalTimeout = 5 * time.Second
)

// seenOf puts what was read whole, and is well formed, into policy's words.
func seenOf(s sniff.Seen) policy.Seen {
	seen := policy.Seen{ECH: s.ECH, Method: s.Method, Path: s.Path, Override: s.Override}
	switch s.Kind {
	case sniff.TLS:
		seen.Kind = policy.SeenTLS
	case sniff.HTTP:
		seen.Kind = policy.SeenHTTP
	case sniff.HTTP2:
		seen.Kind = policy.SeenHTTP2
	case sniff.QUIC:
		seen.Kind = policy.SeenQUIC
	default:
		seen.Kind = policy.SeenOpaque
	}
	if name, err := policy.NormalizeSaid(s.Name); err == nil {
		seen.Name = name
		return seen
	}
	addr, err := netip.ParseAddr(s.Name)
	if s.Name == "" || err == nil {
		seen.Nameless, seen.Address = seen.Kind != policy.SeenOpaque, addr
	}
	return seen
}

// checked is a flow that waits in a checkList.
type checked interface {
	// checkExpired is called when its time is over, evicted, or when it has to make
	// room for another one. It may not take the list's lock.
	checkExpired(evicted bool)
}

// checkEntry is a flow's place in a checkList; the zero value is not in it.
type checkEntry struct {
	flow     checked
	at       *list.Element // nil: not in the list; guarded by the list's mu
	deadline time.Time
}

// checkList holds the flows of one kind that are waited for, by deadline.
type checkList struct {
	timer            *need
	now              func() time.Time
	evicted, expired *atomic.Uint64

	mu    sync.Mutex
	flows list.List // of *checkEntry
}

func newCheckList(s *stats, timer *need, now func() time.Time, kind string) *checkList {
	return &checkList{timer: timer, now: now, evicted: s.counter(kind + "_first_bytes_evicted"), expired: s.counter(kind + "_first_bytes_timeout")}
}

// enter has e's flow told when its time is over, or, if timeout is 0, only when it has to make
// room. All entries of a list have a timeout, or none has. An entry that is in the list already
// gets a new deadline.
func (c *checkList) enter(e *checkEntry, fl checked, timeout time.Duration) {
	var evict *checkEntry
	c.mu.Lock()
	if e.at != nil {
		c.flows.Remove(e.at)
	}
	if c.flows.Len() >= maxChecks {
		evict = c.flows.Remove(c.flows.Front()).(*checkEntry)
		evict.at = nil
	}
	e.flow, e.deadline = fl, time.Time{}
	if timeout > 0 {
		e.deadline = c.now().Add(timeout)
	}
	// Nearly always at the end: there are only two timeouts.
	after := c.flows.Back()
	for after != nil && after.Value.(*checkEntry).deadline.After(e.deadline) {
		after = after.Prev()
	}
	if after == nil {
		e.at = c.flows.PushFront(e)
	} else {
		e.at = c.flows.InsertAfter(e, after)
	}
	c.mu.Unlock()
	if timeout > 0 {
		c.timer.raise()
	}
	if evict != nil {
		c.evicted.Add(1)
		evict.flow.checkExpired(true)
	}
}

func (c *checkList) leave(e *checkEntry) {
	c.mu.Lock()
	if e.at != nil {
		c.flows.Remove(e.at)
		e.at = nil
	}
	c.mu.Unlock()
}

// expire tells those whose time is over, and whether there are others. Called by
// Forwarder's timer.
func (c *checkList) expire(now time.Time) (pending bool) {
	var over []*checkEntry
	c.mu.Lock()
	for at := c.flows.Front(); at != nil && now.After(at.Value.(*checkEntry).deadline); at = c.flows.Front() {
		e := c.flows.Remove(at).(*checkEntry)
		e.at = nil
		over = append(over, e)
	}
	pending = c.flows.Len() > 0
	c.mu.Unlock()
	for _, e := range over {
		c.expired.Add(1)
		e.flow.checkExpired(false)
	}
	return pending
}
