package admit

// Admission: the one way to a flow.
//
// A flow of any kind (TCP, UDP and ICMP echo of the sandbox, connections and datagrams to
// published ports, relayed connections, packets from outside to a pod) begins by the same
// two steps, which are nowhere else:
//
//	decide   the rules in force judge what is known about it
//	enter    the memory budget is asked for room (memory.go), then
//	         the flow table charges its budgets and, with that, holds the flow; if the rules
//	         were replaced meanwhile, the new ones are asked before enter returns
//
// Both leave their result in the pass that every flow embeds. Without a pass a flow has no lease to
// account to and no verdict to dial with; the zero pass has neither.

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// ruleDNS is the rule name of flows to our own resolver.
const ruleDNS = "builtin:dns"

var (
	ErrFlowEnded = errors.New("the flow ended while it was set up")
	ErrStopped   = errors.New("the forwarder has stopped")
)

// Config is what admission needs.
type Config struct {
	Table   *nat.Table
	Granted *policy.Names // may be nil
	Memory  *Memory
	Now     func() time.Time
	// Resolver reports whether our own Resolver answers at dst.
	Resolver func(r *policy.Rules, dst netip.AddrPort) bool
	Refused  func(Refusal) // may be nil
}

// Gate judges the flows of one forwarder.
type Gate struct {
	Config
	Rules     atomic.Pointer[policy.Rules]
	Bandwidth bandwidth
	Limited   limited    // rules with limits of their own
	limits    nat.Limits // the table's own limits, before any policy's
	Tombs     *Tombs     // nil without a second link

	RuleMu sync.Mutex // serialises SetRules
	halted reaping
}

// Judged is a flow's question and its answer. Only admission makes one that allows.
type Judged struct {
	Query   policy.Query
	Verdict policy.Verdict
	Local   bool          // for our own resolver, which policy does not judge
	Rules   *policy.Rules // the rules that answered
}

// Waits reports whether the verdict asks for the flow's first bytes, which may get it allowed.
func (j *Judged) Waits() bool {
	return j.Verdict.Verify() != policy.VerifyNone && j.Verdict.Contact().IsValid()
}

// MayBegin reports whether the flow may enter.
func (j *Judged) MayBegin() bool { return j.Local || j.Verdict.Allowed() || j.Waits() }

// admitted is admission's view of a flow. The methods may be called from any goroutine, and more
// than once.
type admitted interface {
	// Halt stops the flow in both directions. It must not wait for the sandbox: it neither writes
	// to the device nor takes a lock that a writer holds.
	Halt()
	// Abort ends the flow, tells both sides, and releases the lease.
	Abort(reason nat.Reason)
	// Expire is called by the flow table when the flow is over: it is Abort without the release.
	Expire(reason nat.Reason)
	// UnderWay returns the questions about the flow, other than its own question q, that must be
	// asked again: those of unanswered requests and of the connections inside it.
	UnderWay(q policy.Query) []policy.Query
}

// How far a pass has come.
const (
	passEntering uint32 = iota
	passAlive
	passOver // ended before enter returned
)

// Pass is a flow's permission to move data. Its fields except revoked and shape are set when Enter
// returns.
type Pass struct {
	a     *Gate
	flow  admitted
	Lease *nat.Lease
	life  atomic.Uint32
	Shape atomic.Pointer[RuleLimits] // of the rule that admitted the flow; may hold nil
	// Revoked means that new rules refuse the flow. From then on no data moves.
	Revoked atomic.Bool

	mu     sync.Mutex // serialises judging; no lock of the flow's is held when it is taken
	Answer atomic.Pointer[Judged]
	became policy.Outcome // the outcome of the questions of a flow to our own resolver; guarded by mu

	holdMu sync.Mutex // guards the rest; nothing but the grants' lock is taken under it
	hold   policy.Hold
	heldBy string // the name that hold is for; empty until the flow has spoken
	over   bool
}

// Entry describes a flow to the table.
type Entry struct {
	Orig      nat.Tuple
	Short     bool        // nat.Spec.Short
	Forwarded bool        // nat.Spec.Forwarded
	Memory    *Shares     // of a flow that holds bytes; nil for others
	Pending   func() bool // nat.Spec.Pending; may be nil
}

func NewGate(parts Config) *Gate {
	a := &Gate{Config: parts, limits: parts.Table.Limits()}
	a.halted.wake = make(chan struct{}, 1)
	a.Rules.Store(new(policy.Rules))
	return a
}

// Decide asks the rules in force.
func (a *Gate) Decide(q policy.Query) Judged {
	rules := a.Rules.Load()
	if !q.Ingress && a.Resolver(rules, q.Dst) {
		return Judged{Query: q, Local: true, Rules: rules}
	}
	return Judged{Query: q, Verdict: a.Judge(rules, q), Rules: rules}
}

// Together reports whether two answers may share a flow: both allow, to the same target, within the
// same limits.
func (a *Gate) Together(j, other *Judged) bool {
	return j.Verdict.Allowed() && j.Verdict.Target() == other.Verdict.Target() && a.Limited.of(j.Verdict) == a.Limited.of(other.Verdict)
}

// Judge asks rules, with the names that the sandbox was told if the rules need them.
func (a *Gate) Judge(rules *policy.Rules, q policy.Query) policy.Verdict {
	if rules.GatesNames() {
		q.Names, q.Now = a.Granted, a.Now()
	}
	return rules.Decide(q)
}

// Enter charges the flow table for fl, whose pass p is. When it returns nil the flow is in the
// table, and the rules in force allow it; fl must be ready for its methods before the call, because
// it can be halted and aborted as soon as it is in. After an error the flow is not in the table and
// holds no part of the memory budget.
func (a *Gate) Enter(p *Pass, fl admitted, j Judged, e Entry) error {
	if !j.MayBegin() {
		return ErrFlowEnded
	}
	if !a.Memory.Admit(e.Memory) {
		return nat.ErrMemory
	}
	err := a.enterTable(p, fl, j, e)
	if err != nil && e.Memory != nil {
		e.Memory.Leave()
	}
	return err
}

// EnterAnew is Enter for a flow whose tuple may belong to another flow that is over for the peer.
func (a *Gate) EnterAnew(p *Pass, fl admitted, j Judged, e Entry) error {
	err := a.Enter(p, fl, j, e)
	if errors.Is(err, nat.ErrExists) && a.supersede(e.Orig) {
		err = a.Enter(p, fl, j, e)
	}
	return err
}

// supersede ends a flow whose client has begun another one on the same ports, which the host's
// kernel allows only once the earlier connection is over: the client has reset it, and the poller
// has not seen that yet. A flow that still delivers stays.
func (a *Gate) supersede(tuple nat.Tuple) bool {
	l := a.Table.Lookup(tuple)
	if l == nil {
		return true
	}
	if p, ok := l.Owner().(*Pass); ok {
		if fl, ok := p.flow.(delivering); ok && fl.Delivers() {
			return false
		}
	}
	return l.Kill(nat.ReasonReplaced)
}

// delivering is a flow that may still have bytes to deliver after both sides have closed it.
type delivering interface {
	Delivers() bool
}

func (a *Gate) enterTable(p *Pass, fl admitted, j Judged, e Entry) error {
	if !j.Waits() {
		j.Query.Held = j.Verdict.Name()
	}
	p.a, p.flow = a, fl
	p.Answer.Store(&j)
	shape := a.Limited.of(j.Verdict)
	p.Shape.Store(shape)
	rule := j.Verdict.Rule()
	if j.Local {
		rule = ruleDNS
	}
	lease, err := a.Table.Acquire(nat.Spec{
		Orig: e.Orig, Rule: rule, Names: a.namesOf(&j), About: About{Verdict: j.Verdict, Seen: j.Query.Seen},
		Ingress: j.Query.Ingress, Forwarded: e.Forwarded, Short: e.Short,
		Budget: shape.BudgetOf(), Owner: p, Pending: e.Pending, Expire: p.expire,
	})
	if err != nil {
		return err
	}
	p.Lease = lease
	if !p.life.CompareAndSwap(passEntering, passAlive) {
		return ErrFlowEnded
	}
	// Rules that arrived meanwhile may have been applied to the table before it contained the flow.
	if now := a.Rules.Load(); now != j.Rules && !p.reconsider(lease, now) || p.Revoked.Load() {
		p.Revoked.Store(true)
		p.letGo()
		lease.Release(nat.ReasonPolicy)
		return ErrFlowEnded
	}
	p.keep(p.Answer.Load())
	return nil
}

// expire is called by the flow table when it ends the flow.
func (p *Pass) expire(reason nat.Reason) {
	p.letGo()
	if !p.life.CompareAndSwap(passEntering, passOver) {
		p.flow.Expire(reason)
	}
}

// Release releases the lease, if Enter got that far.
func (p *Pass) Release(reason nat.Reason) {
	if p.Lease != nil {
		p.letGo()
		p.Lease.Release(reason)
	}
}

// Verdict returns the answer that governs the flow.
func (p *Pass) Verdict() policy.Verdict { return p.Answer.Load().Verdict }

// Question returns the question by which the flow was last judged.
func (p *Pass) Question() policy.Query { return p.Answer.Load().Query }

// reconsider asks r about the flow. From then on the flow belongs to the rule that allows it, with
// its name, budget and bandwidth. It reports whether the flow may continue.
func (p *Pass) reconsider(lease *nat.Lease, r *policy.Rules) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	j := *p.Answer.Load()
	if j.Local {
		return p.a.Resolver(r, j.Query.Dst)
	}
	was := j.Verdict
	j.Verdict, j.Rules = p.a.Judge(r, j.Query), r
	if waiting := was.Verify() != policy.VerifyNone; !waiting {
		if !j.Verdict.Allowed() || !j.Query.Ingress && j.Verdict.Target() != was.Target() {
			return false
		}
		if j.Verdict.EachRequest() && !was.EachRequest() {
			return false // there is no gate for later requests
		}
		for _, q := range p.flow.UnderWay(j.Query) {
			if !p.a.Judge(r, q).Allowed() {
				return false
			}
		}
		p.Answer.Store(&j)
	} else if !j.Verdict.Allowed() && !j.Waits() || j.Verdict.Contact() != was.Contact() {
		return false // else it is decided once it has spoken
	}
	p.describe(lease, &j)
	shape := p.a.Limited.of(j.Verdict)
	_ = lease.Charge(shape.BudgetOf(), true) // cannot fail
	p.Shape.Store(shape)
	return true
}

// Also makes the flow subject to another answer as well, about a connection inside it. The answer
// has the same target and limits as the flow's own, and UnderWay must return its question by now.
// It reports whether the flow may continue.
func (p *Pass) Also(j Judged) bool {
	p.mu.Lock()
	p.Answer.Store(&j)
	p.describe(p.Lease, &j)
	p.mu.Unlock()
	p.keep(&j)
	if now := p.a.Rules.Load(); now != j.Rules && !p.reconsider(p.Lease, now) {
		p.Revoked.Store(true)
	}
	return !p.Revoked.Load()
}

// Hear judges a waiting flow by its first bytes. If the answer allows it, the flow may continue; an
// error means that a limit or a new policy forbids it all the same.
func (p *Pass) Hear(seen policy.Seen) (Judged, error) {
	j, err := p.listen(seen)
	if err != nil || !j.Verdict.Allowed() {
		return j, err
	}
	// Rules that arrived meanwhile may have been applied before these bytes were visible.
	if now := p.a.Rules.Load(); now != j.Rules && !p.reconsider(p.Lease, now) {
		p.Revoked.Store(true)
	}
	if p.Revoked.Load() {
		return j, ErrFlowEnded
	}
	return j, nil
}

func (p *Pass) listen(seen policy.Seen) (Judged, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	j := Judged{Query: p.Answer.Load().Query, Rules: p.a.Rules.Load()}
	j.Query.Seen, j.Query.Held = seen, ""
	was := p.Verdict().Contact()
	j.Verdict = p.a.Judge(j.Rules, j.Query)
	p.describe(p.Lease, &j)
	switch {
	case !j.Verdict.Allowed():
		return j, nil
	case !j.Verdict.Permits(was):
		return j, ErrFlowEnded // it is connected to another target
	}
	shape := p.a.Limited.of(j.Verdict)
	if err := p.Lease.Charge(shape.BudgetOf(), false); err != nil {
		return j, err
	}
	p.Shape.Store(shape)
	j.Query.Held = j.Verdict.Name()
	p.Answer.Store(&j)
	p.keep(&j)
	return j, nil
}

// describe tells the table which rule the flow is under.
func (p *Pass) describe(lease *nat.Lease, j *Judged) {
	names := p.a.namesOf(j)
	for _, q := range p.flow.UnderWay(j.Query) {
		if q.Held != "" && !slices.Contains(names, q.Held) {
			names = append(names, q.Held)
		}
	}
	lease.Describe(j.Verdict.Rule(), names, About{Verdict: j.Verdict, Seen: j.Query.Seen})
}

// namesOf returns the names of the far side: the one that the verdict matched by, or else all names
// under which its address is granted now.
func (a *Gate) namesOf(j *Judged) []string {
	switch {
	case j.Local:
		return nil
	case j.Verdict.Name() != "":
		return []string{j.Verdict.Name()}
	case a.Granted == nil || !a.Rules.Load().GatesNames():
		return nil
	}
	far := j.Query.Dst
	if j.Query.Ingress {
		far = j.Query.Src
	}
	return a.Granted.Of(far.Addr(), a.Now(), nil)
}

// Set puts rules and their limits in force. The limits come first, so that a flow judged by the
// rules finds them.
func (a *Gate) Set(r *policy.Rules) {
	l := r.Limits()
	a.Bandwidth.set(l)
	a.Limited.set(a.Table, r)
	a.Table.SetLimits(tableLimits(a.limits, l))
	a.Rules.Store(r)
}

// Stop releases the flows that wait for bandwidth. From then on flows are not limited.
func (a *Gate) Stop() {
	a.Bandwidth.stop()
	a.Limited.set(a.Table, nil)
}

// tableLimits merges the policy's limits with those that the table was made with, which apply where
// the policy sets none.
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
