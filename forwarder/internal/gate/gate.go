package gate

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// Chunk is roughly the most that one write hands to the client's side.
const Chunk = 256 << 10

// Flow is the connection that a gate judges. Its methods are not called for every packet.
type Flow interface {
	// Question and Verdict are those that let the connection in.
	Question() policy.Query
	Verdict() policy.Verdict

	// Queued returns how many bytes from the client have not passed yet, and Peek copies the first
	// of them. gone is why there is no connection to the client any more.
	Queued() (n int, gone nat.Reason)
	Peek(to []byte) (n int, gone nat.Reason)
	// Ended reports whether the client sends nothing more than that.
	Ended() bool
	// LookAgain has Admit called again even if nothing new is queued.
	LookAgain()

	// PeekFar copies the first bytes from the far side that have not passed yet. SkipFar discards
	// as many, and reports whether it could. down.mu is held.
	PeekFar(to []byte) (n int)
	SkipFar(p []byte) bool
	// FarEnded reports whether the far side may have ended its stream, or the connection.
	FarEnded() bool
}

// Gate judges what follows the first bytes of one connection.
type Gate interface {
	// Admit decides what to do with the gathered bytes. It may be called again with bytes that it
	// let through but that have not passed. up.mu is held.
	Admit(g *Gather) Step
	// Passed notes that the first n of the gathered bytes were passed on. up.mu is held.
	Passed(g *Gather, n int)
	// Room returns how many of the far side's bytes may pass now; with end, the connection ends
	// here. Answered reads the bytes that have passed. down.mu is held.
	Room() (n int, end *Ending)
	Answered(p []byte)
	// UnderWay returns the requests that have not been answered yet.
	UnderWay() []policy.Seen
}

// Step is what to do with the bytes that a client has queued. The zero Step waits for more of them,
// or for LookAgain.
type Step struct {
	Pass  int        // how many may pass now
	Drop  int        // how many to discard instead
	Abort nat.Reason // the connection ends by a reset
	End   *Ending    // the connection ends by an answer
	// Refusing is set while Room is to end the connection, at the next boundary between two of the
	// server's messages. If that takes too long, or the server has ended its stream, the connection
	// is reset for this reason.
	Refusing nat.Reason
}

// Ending is how a connection ends as its client sees it.
type Ending struct {
	Answer string     // empty: the end of the stream alone
	Reset  bool       // instead of both
	Why    nat.Reason // empty: by the client's will
}

// Shared holds what the gates of one sandbox share.
type Shared struct {
	admit *admit.Gate

	refusedFirst, refusedRequest, refusedHello, malformed *atomic.Uint64
}

// NewShared has the gates judge by a's rules and count into stats.
func NewShared(a *admit.Gate, stats *count.Set) *Shared {
	return &Shared{
		admit:          a,
		refusedFirst:   stats.Counter("tcp_refused_by_first_bytes"),
		refusedRequest: stats.Counter("tcp_refused_request"),
		refusedHello:   stats.Counter("tcp_refused_hello"),
		malformed:      stats.Counter("tcp_first_bytes_malformed"),
	}
}

// of is the connection that a gate judges, and the state shared with other gates.
type of struct {
	flow   Flow
	shared *Shared
}

// policyName is the name of the policy in force.
func (s *Shared) policyName() string { return s.admit.Rules.Load().Name() }

// noteRefused records that a request, or the connection for its first bytes, was refused. The
// sandbox learns of it by an answer or a reset.
func (s *Shared) noteRefused(q *policy.Query, v policy.Verdict, because policy.Reason) {
	s.admit.NoteRefused(admit.Refusal{
		Proto: unix.IPPROTO_TCP, Src: q.Src, Dst: q.Dst, Verdict: v, Seen: q.Seen, Reason: nat.ReasonPolicy, Because: because, Told: true,
	})
}

// asked is a request and the rules' answer.
type asked struct {
	policy.Query
	policy.Verdict
	rules   *policy.Rules
	refused bool
}

// ask judges a request on a connection that was let in. A refused one is counted and recorded.
func (s *Shared) ask(flow Flow, said sniff.Seen, upgrade bool) asked {
	a := asked{Query: flow.Question(), rules: s.admit.Rules.Load()}
	a.Seen = seenOf(said)
	a.Verdict = s.admit.Judge(a.rules, a.Query)
	a.refused = !a.Allowed() || upgrade || a.Target() != flow.Verdict().Target()
	if a.refused {
		s.refusedRequest.Add(1)
		s.noteRefused(&a.Query, a.Verdict, beside(a.Verdict, upgrade))
	}
	return a
}

// stillInForce refuses a request by rules that arrived while it was judged, in case the check of
// requests under way has missed it.
func (s *Shared) stillInForce(a *asked) (abort nat.Reason) {
	if now := s.admit.Rules.Load(); now != a.rules && !s.admit.Judge(now, a.Query).Allowed() {
		return nat.ReasonPolicy
	}
	return ""
}

// beside returns why a request with verdict v is refused, if v is not the reason.
func beside(v policy.Verdict, upgrade bool) policy.Reason {
	switch {
	case !v.Allowed():
		return ""
	case upgrade:
		return policy.ReasonUpgrade
	}
	return policy.ReasonAnotherTarget
}

// looks holds buffers for a look at a stream.
var looks = sync.Pool{New: func() any { return new(look) }}

type look [sniff.MaxHead]byte
