package forwarder

// Admission: the one way to a flow.
//
// A flow of any kind (TCP, UDP and ICMP echo of the sandbox, connections and datagrams to
// published ports, relayed connections, packets from outside to a pod) begins by the same
// two steps, which are nowhere else:
//
//	decide   the rules in force judge what is known of it
//	enter    the memory budget is asked for room (memory.go), then
//	         the flow table charges its budgets and, with that, holds the flow; if the rules
//	         were replaced meanwhile, the new ones are asked before enter returns
//
// Both leave their result in the pass that every flow embeds. Without one a flow has no
// lease to account to and no verdict to dial with, and the zero pass has neither.

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sluice/nat"
	"sluice/policy"
)

// ruleDNS is the rule name of flows to our own resolver.
const ruleDNS = "builtin:dns"

var (
	errFlowEnded = errors.New("the flow ended while it was set up")
	errStopped   = errors.New("the forwarder has stopped")
)

// admissionParts are what admission is made of.
type admissionParts struct {
	table   *nat.Table
	granted *policy.Names // may be nil
	memory  *memory
	now     func() time.Time
	// resolver reports whether our own resolver answers at dst.
	resolver func(r *policy.Rules, dst netip.AddrPort) bool
	refused  func(Refusal) // may be nil
}

// admission judges the flows of one forwarder.
type admission struct {
	admissionParts
	rules     atomic.Pointer[policy.Rules]
	bandwidth bandwidth
	limited   limited    // rules with limits of their own
	limits    nat.Limits // the table's own, before any policy's
	tombs     *tombs     // nil without a second link

	ruleMu sync.Mutex // serialises SetRules
	halted reaping
}

// judged is a flow's question, and the answer to it. Only admission makes one that allows.
type judged struct {
	query   policy.Query
	verdict policy.Verdict
	local   bool          // for our own resolver: policy has no say
	rules   *policy.Rules // which answered
}

// waits reports whether the verdict asks for the flow's first bytes, which may have it allowed.
func (j *judged) waits() bool {
	return j.verdict.Verify() != policy.VerifyNone && j.verdict.Contact().IsValid()
}

// mayBegin reports whether the flow may enter.
func (j *judged) mayBegin() bool { return j.local || j.verdict.Allowed() || j.waits() }

// admitted is a flow as admission sees it. The methods may be called from any goroutine,
// and more than once.
type admitted interface {
	// halt stops the flow in both directions. It must not wait for the sandbox: it neither
	// writes to the device nor takes a lock that is held by who does.
	halt()
	// abort ends the flow, tells both sides, and releases the lease.
	abort(reason nat.Reason)
	// expire is the flow table's word that the flow is over: abort without the release.
	expire(reason nat.Reason)
	// underWay is the questions that were asked about the flow beside its own, q, and that
	// must be asked again: of the requests that are not answered yet, of the connections
	// inside it.
	underWay(q policy.Query) []policy.Query
}

// How far a pass has come.
const (
	passEntering uint32 = iota
	passAlive
	passOver // ended before enter returned
)

// pass is a flow's leave to move. Its fields but revoked and shape are set when enter returns.
type pass struct {
	a     *admission
	flow  admitted
	lease *nat.Lease
	life  atomic.Uint32
	shape atomic.Pointer[ruleLimits] // of the rule that let the flow in; may hold nil
	// revoked: new rules refuse the flow. Nothing moves from then on.
	revoked atomic.Bool

	mu     sync.Mutex // serialises judging; no lock of the flow's is held when it is taken
	answer atomic.Pointer[judged]
	became policy.Outcome // of the questions of a flow to our own resolver; guarded by mu

	holdMu sync.Mutex // guards the rest; nothing but the grants' lock is taken under it
	hold   policy.Hold
	heldBy string // the name that hold is for; empty while the flow has not spoken
	over   bool
}

// entry is how a flow stands in the table.
type entry struct {
	orig      nat.Tuple
	short     bool        // nat.Spec.Short
	forwarded bool        // nat.Spec.Forwarded
	memory    *shares     // of a flow that holds bytes; nil for others
	pending   func() bool // nat.Spec.Pending; may be nil
}

func newAdmission(parts admissionParts) *admission {
	a := &admission{admissionParts: parts, limits: parts.table.Limits()}
	a.halted.wake = make(chan struct{}, 1)
	a.rules.Store(new(policy.Rules))
	return a
}

// decide asks the rules in force.
func (a *admission) decide(q policy.Query) judged {
	rules := a.rules.Load()
	if !q.Ingress && a.resolver(rules, q.Dst) {
		return judged{query: q, local: true, rules: rules}
	}
	return judged{query: q, verdict: a.judge(rules, q), rules: rules}
}

// together reports whether an answer allows what may share a flow with another answer: to
// the same target, within the same limits.
func (a *admission) together(j, other *judged) bool {
	return j.verdict.Allowed() && j.verdict.Target() == other.verdict.Target() && a.limited.of(j.verdict) == a.limited.of(other.verdict)
}

// judge asks rules, and tells them what the sandbox was told of names if they care.
func (a *admission) judge(rules *policy.Rules, q policy.Query) policy.Verdict {
	if rules.GatesNames() {
		q.Names, q.Now = a.granted, a.now()
	}
	return rules.Decide(q)
}

// enter charges the flow table for fl, whose pass p is. When it returns nil the flow is in
// the table, and the rules in force allow it; fl must be complete by then as far as its
// methods need it, because it may be halted and aborted from the moment it is in. After an
// error the flow is not in the table, and holds nothing of the memory budget.
func (a *admission) enter(p *pass, fl admitted, j judged, e entry) error {
	if !j.mayBegin() {
		return errFlowEnded
	}
	if !a.memory.admit(e.memory) {
		return nat.ErrMemory
	}
	err := a.enterTable(p, fl, j, e)
	if err != nil && e.memory != nil {
		e.memory.leave()
	}
	return err
}

// enterAnew is enter for a flow whose tuple another one may have, which is over for their peer.
func (a *admission) enterAnew(p *pass, fl admitted, j judged, e entry) error {
	err := a.enter(p, fl, j, e)
	if errors.Is(err, nat.ErrExists) && a.supersede(e.orig) {
		err = a.enter(p, fl, j, e)
	}
	return err
}

// supersede ends the flow whose client has begun another one by the same ports, as the
// host's kernel allows only when the connection before is over: the client has reset it,
// and the poller has not come to that yet. A flow that still delivers stays.
func (a *admission) supersede(tuple nat.Tuple) bool {
	l := a.table.Lookup(tuple)
	if l == nil {
		return true
	}
	if p, ok := l.Owner().(*pass); ok {
		if fl, ok := p.flow.(delivering); ok && fl.delivers() {
			return false
		}
	}
	return l.Kill(nat.ReasonReplaced)
}

// delivering is a flow that may have bytes to deliver after both sides have closed it.
type delivering interface {
	delivers() bool
}

func (a *admission) enterTable(p *pass, fl admitted, j judged, e entry) error {
	if !j.waits() {
		j.query.Held = j.verdict.Name()
	}
	p.a, p.flow = a, fl
	p.answer.Store(&j)
	shape := a.limited.of(j.verdict)
	p.shape.Store(shape)
	rule := j.verdict.Rule()
	if j.local {
		rule = ruleDNS
	}
	lease, err := a.table.Acquire(nat.Spec{
		Orig: e.orig, Rule: rule, Names: a.namesOf(&j), About: About{Verdict: j.verdict, Seen: j.query.Seen},
		Ingress: j.query.Ingress, Forwarded: e.forwarded, Short: e.short,
		Budget: shape.budgetOf(), Owner: p, Pending: e.pending, Expire: p.expire,
	})
	if err != nil {
		return err
	}
	p.lease = lease
	if !p.life.CompareAndSwap(passEntering, passAlive) {
		return errFlowEnded
	}
	// Rules that came meanwhile may have been applied to the table before the flow was there.
	if now := a.rules.Load(); now != j.rules && !p.reconsider(lease, now) || p.revoked.Load() {
		p.revoked.Store(true)
		p.letGo()
		lease.Release(nat.ReasonPolicy)
		return errFlowEnded
	}
	p.keep(p.answer.Load())
	return nil
}

// expire is called by the flow table when it ended the flow.
func (p *pass) expire(reason nat.Reason) {
	p.letGo()
	if !p.life.CompareAndSwap(passEntering, passOver) {
		p.flow.expire(reason)
	}
}

// release gives the lease back, if enter came that far.
func (p *pass) release(reason nat.Reason) {
	if p.lease != nil {
		p.letGo()
		p.lease.Release(reason)
	}
}

// verdict is the answer that the flow goes by.
func (p *pass) verdict() policy.Verdict { return p.answer.Load().verdict }

// question is what the flow was judged by last.
func (p *pass) question() policy.Query { return p.answer.Load().query }

// reconsider asks r about the flow, which from then on is the rule's that allows it, with
// its name, its budget and its bandwidth. It reports whether the flow may go on.
func (p *pass) reconsider(lease *nat.Lease, r *policy.Rules) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	j := *p.answer.Load()
	if j.local {
		return p.a.resolver(r, j.query.Dst)
	}
	was := j.verdict
	j.verdict, j.rules = p.a.judge(r, j.query), r
	if waiting := was.Verify() != policy.VerifyNone; !waiting {
		if !j.verdict.Allowed() || !j.query.Ingress && j.verdict.Target() != was.Target() {
			return false
		}
		if j.verdict.EachRequest() && !was.EachRequest() {
			return false // there is no gate for the requests to come
		}
		for _, q := range p.flow.underWay(j.query) {
			if !p.a.judge(r, q).Allowed() {
				return false
			}
		}
		p.answer.Store(&j)
	} else if !j.verdict.Allowed() && !j.waits() || j.verdict.Contact() != was.Contact() {
		return false // else it is decided when it has spoken
	}
	p.describe(lease, &j)
	shape := p.a.limited.of(j.verdict)
	_ = lease.Charge(shape.budgetOf(), true) // cannot fail
	p.shape.Store(shape)
	return true
}

// also has the flow go by another answer, which was given about a connection inside it: of
// the same target and limits as its own, and among what underWay returns by now. It reports
// whether the flow may go on.
func (p *pass) also(j judged) bool {
	p.mu.Lock()
	p.answer.Store(&j)
	p.describe(p.lease, &j)
	p.mu.Unlock()
	p.keep(&j)
	if now := p.a.rules.Load(); now != j.rules && !p.reconsider(p.lease, now) {
		p.revoked.Store(true)
	}
	return !p.revoked.Load()
}

// hear judges a flow that waits by what it said first. The flow may go on if the answer
// allows it; an error says that a limit, or a new policy, forbids it all the same.
func (p *pass) hear(seen policy.Seen) (judged, error) {
	j, err := p.listen(seen)
	if err != nil || !j.verdict.Allowed() {
		return j, err
	}
	// Rules that came meanwhile may have been applied before what was said could be seen.
	if now := p.a.rules.Load(); now != j.rules && !p.reconsider(p.lease, now) {
		p.revoked.Store(true)
	}
	if p.revoked.Load() {
		return j, errFlowEnded
	}
	return j, nil
}

func (p *pass) listen(seen policy.Seen) (judged, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	j := judged{query: p.answer.Load().query, rules: p.a.rules.Load()}
	j.query.Seen, j.query.Held = seen, ""
	was := p.verdict().Contact()
	j.verdict = p.a.judge(j.rules, j.query)
	p.describe(p.lease, &j)
	switch {
	case !j.verdict.Allowed():
		return j, nil
	case !j.verdict.Permits(was):
		return j, errFlowEnded // it was set up to somewhere else
	}
	shape := p.a.limited.of(j.verdict)
	if err := p.lease.Charge(shape.budgetOf(), false); err != nil {
		return j, err
	}
	p.shape.Store(shape)
	j.query.Held = j.verdict.Name()
	p.answer.Store(&j)
	p.keep(&j)
	return j, nil
}

// describe tells the table by which rule the flow goes on.
func (p *pass) describe(lease *nat.Lease, j *judged) {
	names := p.a.namesOf(j)
	for _, q := range p.flow.underWay(j.query) {
		if q.Held != "" && !slices.Contains(names, q.Held) {
			names = append(names, q.Held)
		}
	}
	lease.Describe(j.verdict.Rule(), names, About{Verdict: j.verdict, Seen: j.query.Seen})
}

// namesOf are the far side's: the one that the verdict matched by, else all those under
// which its address is granted now.
func (a *admission) namesOf(j *judged) []string {
	switch {
	case j.local:
		return nil
	case j.verdict.Name() != "":
		return []string{j.verdict.Name()}
	case a.granted == nil || !a.rules.Load().GatesNames():
		return nil
	}
	far := j.query.Dst
	if j.query.Ingress {
		far = j.query.Src
	}
	return a.granted.Of(far.Addr(), a.now(), nil)
}

// set puts rules and their limits in force. A flow that is judged by them finds their
// limits, so the limits come first.
func (a *admission) set(r *policy.Rules) {
	l := r.Limits()
	a.bandwidth.set(l)
	a.limited.set(a.table, r)
	a.table.SetLimits(tableLimits(a.limits, l))
	a.rules.Store(r)
}

// stop lets go of what waits for bandwidth. Flows are not limited from then on.
func (a *admission) stop() {
	a.bandwidth.stop()
	a.limited.set(a.table, nil)
}

// tableLimits lays the policy's limits over those that the table was made with;
// what the policy leaves open stays as it was made.
func tableLimits(base nat.Limits, l policy.Limits) nat.Limits {
	if l.Flows > 0 {
		base.Max = l.Flows
	}
	if l.HalfOpen > 0 {
		base.HalfOpen = l.HalfOpen
	}
	if l.FlowsPerDestination > 0 {
		base.PerDestination = l.FlowsPerDestination
	}
	if l.NewFlowsPerSecond > 0 {
		base.NewPerSecond = l.NewFlowsPerSecond
	}
	if l.TotalBytes > 0 {
		base.TotalBytes = int64(l.TotalBytes)
	}
	return base
}
