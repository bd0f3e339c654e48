package admit

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

	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// ruleDNS is the rule name of flows to our own resolver.
const ruleDNS = "builtin:dns"

var (
	ErrFlowEnded = errors.New("the flow ended while it was set up")
	ErrStopped   = errors.New("the forwarder has stopped")
)

// Config are what admission is made of.
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
	limits    nat.Limits // the table's own, before any policy's
	Tombs     *Tombs     // nil without a second link

	RuleMu sync.Mutex // serialises SetRules
	halted reaping
}

// Judged is a flow's question, and the answer to it. Only admission makes one that allows.
type Judged struct {
	Query   policy.Query
	Verdict policy.Verdict
	Local   bool          // for our own resolver: policy has no say
	Rules   *policy.Rules // which answered
}

// Waits reports whether the verdict asks for the flow's first bytes, which may have it allowed.
func (j *Judged) Waits() bool {
	return j.Verdict.Verify() != policy.VerifyNone && j.Verdict.Contact().IsValid()
}

// MayBegin reports whether the flow may enter.
func (j *Judged) MayBegin() bool { return j.Local || j.Verdict.Allowed() || j.Waits() }

// admitted is a flow as admission sees it. The methods may be called from any goroutine,
// and more than once.
type admitted interface {
	// Halt stops the flow in both directions. It must not wait for the sandbox: it neither
	// writes to the device nor takes a lock that is held by who does.
	Halt()
	// Abort ends the flow, tells both sides, and releases the lease.
	Abort(reason nat.Reason)
	// Expire is the flow table's word that the flow is over: abort without the release.
	Expire(reason nat.Reason)
	// UnderWay is the questions that were asked about the flow beside its own, q, and that
	// must be asked again: of the requests that are not answered yet, of the connections
	// inside it.
	UnderWay(q policy.Query) []policy.Query
}

// How far a pass has come.
const (
	passEntering uint32 = iota
	passAlive
	passOver // ended before enter returned
)

// Pass is a flow's leave to move. Its fields but revoked and shape are set when enter returns.
type Pass struct {
	a     *Gate
	flow  admitted
	Lease *nat.Lease
	life  atomic.Uint32
	Shape atomic.Pointer[RuleLimits] // of the rule that let the flow in; may hold nil
	// Revoked: new rules refuse the flow. Nothing moves from then on.
	Revoked atomic.Bool

	mu     sync.Mutex // serialises judging; no lock of the flow's is held when it is taken
	Answer atomic.Pointer[Judged]
	became policy.Outcome // of the questions of a flow to our own resolver; guarded by mu

	holdMu sync.Mutex // guards the rest; nothing but the grants' lock is taken under it
	hold   policy.Hold
	heldBy string // the name that hold is for; empty while the flow has not spoken
	over   bool
}

// Entry is how a flow stands in the table.
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

// Together reports whether an answer allows what may share a flow with another answer: to
// the same target, within the same limits.
func (a *Gate) Together(j, other *Judged) bool {
	return j.Verdict.Allowed() && j.Verdict.Target() == other.Verdict.Target() && a.Limited.of(j.Verdict) == a.Limited.of(other.Verdict)
}

// Judge asks rules, and tells them what the sandbox was told of names if they care.
func (a *Gate) Judge(rules *policy.Rules, q policy.Query) policy.Verdict {
	if rules.GatesNames() {
		q.Names, q.Now = a.Granted, a.Now()
	}
	return rules.Decide(q)
}

// Enter charges the flow table for fl, whose pass p is. When it returns nil the flow is in
// the table, and the rules in force allow it; fl must be complete by then as far as its
// methods need it, because it may be halted and aborted from the moment it is in. After an
// error the flow is not in the table, and holds nothing of the memory budget.
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

// EnterAnew is enter for a flow whose tuple another one may have, which is over for their peer.
func (a *Gate) EnterAnew(p *Pass, fl admitted, j Judged, e Entry) error {
	err := a.Enter(p, fl, j, e)
	if errors.Is(err, nat.ErrExists) && a.supersede(e.Orig) {
		err = a.Enter(p, fl, j, e)
	}
	return err
}

// supersede ends the flow whose client has begun another one by the same ports, as the
// host's kernel allows only when the connection before is over: the client has reset it,
// and the poller has not come to that yet. A flow that still delivers stays.
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

// delivering is a flow that may have bytes to deliver after both sides have closed it.
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
	// Rules that came meanwhile may have been applied to the table before the flow was there.
	if now := a.Rules.Load(); now != j.Rules && !p.reconsider(lease, now) || p.Revoked.Load() {
		p.Revoked.Store(true)
		p.letGo()
		lease.Release(nat.ReasonPolicy)
		return ErrFlowEnded
	}
	p.keep(p.Answer.Load())
	return nil
}

// expire is called by the flow table when it ended the flow.
func (p *Pass) expire(reason nat.Reason) {
	p.letGo()
	if !p.life.CompareAndSwap(passEntering, passOver) {
		p.flow.Expire(reason)
	}
}

// Release gives the lease back, if enter came that far.
func (p *Pass) Release(reason nat.Reason) {
	if p.Lease != nil {
		p.letGo()
		p.Lease.Release(reason)
	}
}

// Verdict is the answer that the flow goes by.
func (p *Pass) Verdict() policy.Verdict { return p.Answer.Load().Verdict }

// Question is what the flow was judged by last.
func (p *Pass) Question() policy.Query { return p.Answer.Load().Query }

// reconsider asks r about the flow, which from then on is the rule's that allows it, with
// its name, its budget and its bandwidth. It reports whether the flow may go on.
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
			return false // there is no gate for the requests to come
		}
		for _, q := range p.flow.UnderWay(j.Query) {
			if !p.a.Judge(r, q).Allowed() {
				return false
			}
		}
		p.Answer.Store(&j)
	} else if !j.Verdict.Allowed() && !j.Waits() || j.Verdict.Contact() != was.Contact() {
		return false // else it is decided when it has spoken
	}
	p.describe(lease, &j)
	shape := p.a.Limited.of(j.Verdict)
	_ = lease.Charge(shape.BudgetOf(), true) // cannot fail
	p.Shape.Store(shape)
	return true
}

// Also has the flow go by another answer, which was given about a connection inside it: of
// the same target and limits as its own, and among what UnderWay returns by now. It reports
// whether the flow may go on.
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

// Hear judges a flow that waits by what it said first. The flow may go on if the answer
// allows it; an error says that a limit, or a new policy, forbids it all the same.
func (p *Pass) Hear(seen policy.Seen) (Judged, error) {
	j, err := p.listen(seen)
	if err != nil || !j.Verdict.Allowed() {
		return j, err
	}
	// Rules that came meanwhile may have been applied before what was said could be seen.
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
		return j, ErrFlowEnded // it was set up to somewhere else
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

// describe tells the table by which rule the flow goes on.
func (p *Pass) describe(lease *nat.Lease, j *Judged) {
	names := p.a.namesOf(j)
	for _, q := range p.flow.UnderWay(j.Query) {
		if q.Held != "" && !slices.Contains(names, q.Held) {
			names = append(names, q.Held)
		}
	}
	lease.Describe(j.Verdict.Rule(), names, About{Verdict: j.Verdict, Seen: j.Query.Seen})
}

// namesOf are the far side's: the one that the verdict matched by, else all those under
// which its address is granted now.
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

// Set puts rules and their limits in force. A flow that is judged by them finds their
// limits, so the limits come first.
func (a *Gate) Set(r *policy.Rules) {
	l := r.Limits()
	a.Bandwidth.set(l)
	a.Limited.set(a.Table, r)
	a.Table.SetLimits(tableLimits(a.limits, l))
	a.Rules.Store(r)
}

// Stop lets go of what waits for bandwidth. Flows are not limited from then on.
func (a *Gate) Stop() {
	a.Bandwidth.stop()
	a.Limited.set(a.Table, nil)
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
