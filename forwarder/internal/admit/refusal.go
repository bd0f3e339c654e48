package admit

// Reports beside the flow table: flows that may not begin, requests that may not pass, and
// questions.

import (
	"errors"
	"net/netip"
	"sync/atomic"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// Refusal is a flow that was refused, or a request on one.
type Refusal struct {
	Proto    uint8
	Src, Dst netip.AddrPort
	Ingress  bool
	Verdict  policy.Verdict
	Seen     policy.Seen // zero where nothing was read
	// Reason is the bound that refused the flow, or that its tuple is in use; otherwise
	// nat.ReasonPolicy.
	Reason nat.Reason
	// Because is why policy refused when the verdict does not say: more than the rules is asked. It
	// is empty if the verdict says.
	Because policy.Reason
	Told    bool // the flow's initiator was told
}

// About is what the forwarder knows about a flow besides its tuple: nat.Flow.About.
type About struct {
	Verdict policy.Verdict
	Seen    policy.Seen
	// Questions counts the outcomes of the DNS questions on a flow to our own resolver.
	Questions policy.Outcome
}

// refusal returns the Refusal of a flow that policy does not let begin.
func (j *Judged) refusal(told bool) Refusal {
	q := &j.Query
	return Refusal{Proto: q.Proto, Src: q.Src, Dst: q.Dst, Ingress: q.Ingress, Verdict: j.Verdict, Seen: q.Seen, Reason: nat.ReasonPolicy, Told: told}
}

// Refuse records that a flow may not begin, and whether its initiator is told. The peer of a
// refused datagram may not begin a flow on the same ports, since the sandbox may not.
func (a *Gate) Refuse(j Judged, told bool) {
	if j.Query.Proto == packet.ProtoUDP && !j.Query.Ingress {
		a.Tombs.Bury(nat.NewTuple(packet.ProtoUDP, j.Query.Dst, j.Query.Src))
	}
	a.NoteRefused(j.refusal(told))
}

// NoteLimit records that Enter failed with err, and counts it if a limit was the cause.
func (a *Gate) NoteLimit(limited *atomic.Uint64, j Judged, err error) {
	why := LimitOf(err)
	if why == "" {
		return // the flow was in the table, and has its record
	}
	if limited != nil && why != nat.ErrExists {
		limited.Add(1)
	}
	r := j.refusal(false)
	r.Reason = why
	a.NoteRefused(r)
}

// LimitOf returns the reason that Enter or Hear failed for; it is empty if the flow ended
// meanwhile.
func LimitOf(err error) (why nat.Reason) {
	errors.As(err, &why)
	return why
}

// NoteRefused records a flow, or a request, that was refused.
func (a *Gate) NoteRefused(r Refusal) {
	if a.Refused != nil {
		a.Refused(r)
	}
}

// Answered records the outcome of a question on a flow to our own resolver.
func (p *Pass) Answered(o policy.Outcome) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.became
	if o <= was {
		return
	}
	p.became = o
	if was != policy.OutcomeNone || o != policy.OutcomeAnswered { // else the record says nothing of it
		p.Lease.Describe(ruleDNS, nil, About{Verdict: p.Verdict(), Questions: o})
	}
}
