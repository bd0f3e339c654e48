package forwarder

// What is told of flows beside the flow table: those that may not begin, requests that may not
// pass, and questions.

import (
	"errors"
	"net/netip"
	"sync/atomic"

	"sluice/nat"
	"sluice/policy"
)

// Refusal is a flow that was refused, or a request on one.
type Refusal struct {
	Proto    uint8
	Src, Dst netip.AddrPort
	Ingress  bool
	Verdict  policy.Verdict
	Seen     policy.Seen // zero where nothing was read
	// Reason is of a flow that a bound refuses, or a table that has its tuple; else it is
	// nat.ReasonPolicy.
	Reason nat.Reason
	// Because is why policy refused what the verdict does not: more than rules are asked about
	// it. Empty: the verdict says.
	Because policy.Reason
	Told    bool // whoever began it was told
}

// About is what the forwarder knows of a flow beside its tuple: nat.Flow.About.
type About struct {
	Verdict policy.Verdict
	Seen    policy.Seen
	// Questions is what became of the DNS questions on a flow to our own resolver.
	Questions policy.Outcome
}

// refusal is one of a flow that may not begin, for policy's sake.
func (j *judged) refusal(told bool) Refusal {
	q := &j.query
	return Refusal{Proto: q.Proto, Src: q.Src, Dst: q.Dst, Ingress: q.Ingress, Verdict: j.verdict, Seen: q.Seen, Reason: nat.ReasonPolicy, Told: told}
}

// refuse records that a flow may not begin, and whether who began it is told. The peer of a
// refused datagram does not begin by the same ports what the sandbox may not.
func (a *admission) refuse(j judged, told bool) {
	if j.query.Proto == protoUDP && !j.query.Ingress {
		a.tombs.bury(nat.NewTuple(protoUDP, j.query.Dst, j.query.Src))
	}
	a.noteRefused(j.refusal(told))
}

// noteLimit records that enter has failed with err, and counts it if a limit was the cause.
func (a *admission) noteLimit(limited *atomic.Uint64, j judged, err error) {
	why := limitOf(err)
	if why == "" {
		return // the flow was in the table, and has its record
	}
	if limited != nil && why != nat.ErrExists {
		limited.Add(1)
	}
	r := j.refusal(false)
	r.Reason = why
	a.noteRefused(r)
}

// limitOf is the reason that enter or hear failed for; empty if the flow ended meanwhile.
func limitOf(err error) (why nat.Reason) {
	errors.As(err, &why)
	return why
}

// noteRefused records a flow, or a request, that was refused.
func (a *admission) noteRefused(r Refusal) {
	if a.refused != nil {
		a.refused(r)
	}
}

// answered notes what became of a question on a flow to our own resolver.
func (p *pass) answered(o policy.Outcome) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.became
	if o <= was {
		return
	}
	p.became = o
	if was != policy.OutcomeNone || o != policy.OutcomeAnswered { // else the record says nothing of it
		p.lease.Describe(ruleDNS, nil, About{Verdict: p.verdict(), Questions: o})
	}
}
