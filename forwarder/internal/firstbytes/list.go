package firstbytes

// Verification: a flow's first bytes are judged before any of its bytes pass.
//
// A rule by domain lets a flow through to an address that the sandbox was given for a name, if the
// flow itself carries that name: in a ClientHello, an HTTP request or a QUIC Initial packet. The
// verdict on its first segment then asks for the first bytes (policy.Verdict.Verify). verify.go and
// quic_hold.go read them, bounded in bytes and in time, and policy is asked again with their
// content:
//
//	Decide ──► Verify: first bytes ──► read, nothing passes ──► Decide with Seen ──► pass, or refuse
//
// A TCP connection is set up before they are read, if some content of theirs would be allowed
// (policy.Verdict.Contact); a datagram is held. The address is the flow's own destination, which is
// the one that was judged: no name is resolved in between. Clear-text HTTP is judged further,
// request by request (package gate).
//
// Only the sandbox pays for a flow that waits. At most MaxChecks flows wait, each for CheckTimeout;
// the oldest makes room for another, and their bytes stay where they are queued.

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
	// MaxChecks bounds the flows of each kind whose first bytes are awaited, and those whose
	// refusal is still being sent.
	MaxChecks = 1024
	// CheckTimeout is how long the first bytes may take.
	CheckTimeout = 10 * time.Second
	// RefusalTimeout is how long a client may take to read a refusal.
	RefusalTimeout = 5 * time.Second
)

// SeenOf converts a whole, well-formed reading to policy's type.
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
	// CheckExpired is called when its time is up or, with evicted, when it has to make room for
	// another flow. It may not take the list's lock.
	CheckExpired(evicted bool)
}

// Entry is a flow's place in a List; the zero value is in none.
type Entry struct {
	flow     checked
	at       *list.Element // nil: not in the list; guarded by the list's mu
	deadline time.Time
}

// List holds the waiting flows of one kind, by deadline.
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

// Enter has CheckExpired called on e's flow when its time is up or, if timeout is 0, only when it
// has to make room. Either all entries of a list have a timeout, or none has. An entry that is
// already in the list gets a new deadline.
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

// Expire notifies the flows whose time is up, and reports whether others remain. Forwarder's timer
// calls it.
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
