package firstbytes

// Verification: what a flow says in its first bytes is judged before anything of it passes.
//
// A rule by domain lets a flow through to an address that the sandbox was told under a
// name, if the flow itself says that name: in a ClientHello, in an HTTP request, in a
// QUIC Initial packet. The verdict on its first segment then asks for the first bytes
// (policy.Verdict.Verify), which verify.go and quic_hold.go read, bounded in bytes
// and in time, and the same question is asked again with what they said:
//
//	Decide ──► Verify: first bytes ──► read, nothing passes ──► Decide with Seen ──► pass, or refuse
//
// A TCP connection is set up before they are read, if anything that they can say would be allowed
// (policy.Verdict.Contact); a datagram is kept. The address is the flow's own destination, which
// is the one that was judged: no name is resolved in between. Clear-text HTTP goes on being judged, request
// by request (package gate).
//
// Nobody but the sandbox pays for a flow that waits: there are at most MaxChecks of them,
// of which the oldest gives way, each for CheckTimeout, and their bytes stay where they
// are queued.

import (
	"container/list"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/policy"
)

const (
	// MaxChecks bounds the flows of each kind whose first bytes are waited for, and
	// those whose refusal is still being told.
	MaxChecks = 1024
	// CheckTimeout is how long the first bytes may take.
	CheckTimeout = 10 * time.Second
	// RefusalTimeout is how long a refusal may take to be read.
	RefusalTimeout = 5 * time.Second
)

// SeenOf puts what was read whole, and is well formed, into policy's words.
func SeenOf(s sniff.Seen) policy.Seen {
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

// checked is a flow that waits in a List.
type checked interface {
	// CheckExpired is called when its time is over, evicted, or when it has to make
	// room for another one. It may not take the list's lock.
	CheckExpired(evicted bool)
}

// Entry is a flow's place in a List; the zero value is not in it.
type Entry struct {
	flow     checked
	at       *list.Element // nil: not in the list; guarded by the list's mu
	deadline time.Time
}

// List holds the flows of one kind that are waited for, by deadline.
type List struct {
	timer            *engine.Need
	now              func() time.Time
	evicted, expired *atomic.Uint64

	Mu    sync.Mutex
	Flows list.List // of *Entry
}

func NewList(s *count.Set, timer *engine.Need, now func() time.Time, kind string) *List {
	return &List{timer: timer, now: now, evicted: s.Counter(kind + "_first_bytes_evicted"), expired: s.Counter(kind + "_first_bytes_timeout")}
}

// Enter has e's flow told when its time is over, or, if timeout is 0, only when it has to make
// room. All entries of a list have a timeout, or none has. An entry that is in the list already
// gets a new deadline.
func (c *List) Enter(e *Entry, fl checked, timeout time.Duration) {
	var evict *Entry
	c.Mu.Lock()
	if e.at != nil {
		c.Flows.Remove(e.at)
	}
	if c.Flows.Len() >= MaxChecks {
		evict = c.Flows.Remove(c.Flows.Front()).(*Entry)
		evict.at = nil
	}
	e.flow, e.deadline = fl, time.Time{}
	if timeout > 0 {
		e.deadline = c.now().Add(timeout)
	}
	// Nearly always at the end: there are only two timeouts.
	after := c.Flows.Back()
	for after != nil && after.Value.(*Entry).deadline.After(e.deadline) {
		after = after.Prev()
	}
	if after == nil {
		e.at = c.Flows.PushFront(e)
	} else {
		e.at = c.Flows.InsertAfter(e, after)
	}
	c.Mu.Unlock()
	if timeout > 0 {
		c.timer.Raise()
	}
	if evict != nil {
		c.evicted.Add(1)
		evict.flow.CheckExpired(true)
	}
}

func (c *List) Leave(e *Entry) {
	c.Mu.Lock()
	if e.at != nil {
		c.Flows.Remove(e.at)
		e.at = nil
	}
	c.Mu.Unlock()
}

// Expire tells those whose time is over, and whether there are others. Called by
// Forwarder's timer.
func (c *List) Expire(now time.Time) (pending bool) {
	var over []*Entry
	c.Mu.Lock()
	for at := c.Flows.Front(); at != nil && now.After(at.Value.(*Entry).deadline); at = c.Flows.Front() {
		e := c.Flows.Remove(at).(*Entry)
		e.at = nil
		over = append(over, e)
	}
	pending = c.Flows.Len() > 0
	c.Mu.Unlock()
	for _, e := range over {
		c.expired.Add(1)
		e.flow.CheckExpired(false)
	}
	return pending
}
