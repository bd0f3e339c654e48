package admit

// Limits of single rules, which bound all flows that one rule admitted, taken together. The flow
// table limits counts and volume (nat.Budget). Bandwidth is limited here, by two buckets per rule
// before those of the sandbox.

import (
	"sync"
	"sync/atomic"
	"time"

	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// RuleLimits are the limits of one rule. They last as long as a rule of that name has any.
type RuleLimits struct {
	budget   nat.Budget
	Up, Down Bucket
	Queues   atomic.Value // the packet path's, which makes them when there is something to queue
}

func (l *RuleLimits) set(t *nat.Table, r policy.RuleLimits) {
	t.SetBudget(&l.budget, nat.BudgetLimits{Flows: r.Flows, NewPerSecond: r.NewFlowsPerSecond, TotalBytes: int64(r.TotalBytes)})
	l.Up.SetRate(int64(r.EgressBandwidth) / 8)
	l.Down.SetRate(int64(r.IngressBandwidth) / 8)
}

// BudgetOf returns the budget of limits that may be nil.
func (l *RuleLimits) BudgetOf() *nat.Budget {
	if l == nil {
		return nil
	}
	return &l.budget
}

// limited is the rules that have limits.
type limited struct {
	mu    sync.RWMutex
	rules map[string]*RuleLimits
}

// of returns the limits of the rule that a verdict names, nil if it has none.
func (l *limited) of(v policy.Verdict) *RuleLimits {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.rules[v.Rule()]
}

// set puts the limits of new rules in force. It changes the limits of a rule that had some already,
// so its use so far still counts.
func (l *limited) set(t *nat.Table, r *policy.Rules) {
	l.mu.Lock()
	defer l.mu.Unlock()
	rules := make(map[string]*RuleLimits)
	for name, limits := range r.RuleLimits() {
		old := l.rules[name]
		if old == nil {
			old = new(RuleLimits)
		}
		old.set(t, limits)
		rules[name] = old
		delete(l.rules, name)
	}
	for _, gone := range l.rules {
		gone.set(t, policy.RuleLimits{})
	}
	l.rules = rules
}

// Has reports whether l are the limits of some rule in force.
func (l *limited) Has(of *RuleLimits) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, r := range l.rules {
		if r == of {
			return true
		}
	}
	return false
}

// AdmitBoth reports whether the rule, whose bucket may be nil, and the sandbox both let a datagram
// of n bytes pass. A refusal by one costs the other nothing.
func AdmitBoth(rule, sandbox *Bucket, n int, now time.Time) bool {
	if rule != nil && !rule.Admit(n, now) {
		return false
	}
	if !sandbox.Admit(n, now) {
		if rule != nil {
			rule.untake(n)
		}
		return false
	}
	return true
}

// Take returns how many of want bytes the rule, which may be nil, and the sandbox let move now. If
// there are none, it queues t on q once that changes.
func Take(rule, sandbox *Bucket, want int, now time.Time, t *engine.Task, q *engine.RunQueue) int {
	if rule == nil {
		return sandbox.Take(want, now, t, q)
	}
	n := rule.Take(want, now, t, q)
	if n == 0 {
		return 0
	}
	granted := sandbox.Take(n, now, t, q)
	rule.untake(n - granted)
	return granted
}

// Untake returns unused tokens.
func Untake(rule, sandbox *Bucket, n int) {
	if rule != nil {
		rule.untake(n)
	}
	sandbox.untake(n)
}

// RuleUp and RuleDown return the buckets of the flow's rule, nil if it has no limits.
func (p *Pass) RuleUp() *Bucket {
	if s := p.Shape.Load(); s != nil {
		return &s.Up
	}
	return nil
}

func (p *Pass) RuleDown() *Bucket {
	if s := p.Shape.Load(); s != nil {
		return &s.Down
	}
	return nil
}
