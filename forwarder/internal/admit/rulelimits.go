package admit

// Limits of single rules: what all flows that one rule let in may take together. Counts
// and the volume are the flow table's to limit (nat.Budget), bandwidth is limited here,
// by two buckets of the rule's own before those of the sandbox.

import (
	"sync"
	"sync/atomic"
	"time"

	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// RuleLimits are one rule's. They last as long as rules of that name have any.
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

// BudgetOf is the budget of limits that may be nil.
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

// set puts the limits of new rules in force. Of a rule that had limits already it
// changes them, so that what was used stays used.
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

// AdmitBoth reports whether a datagram of n bytes may pass by the rule, whose bucket may be
// nil, and by the sandbox. What one refuses costs the other nothing.
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

// Take returns how many of want bytes may move now, by the rule, which may be nil, and by
// the sandbox. When there are none, t is queued on q as soon as that changes.
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

// Untake gives back what was not used.
func Untake(rule, sandbox *Bucket, n int) {
	if rule != nil {
		rule.untake(n)
	}
	sandbox.untake(n)
}

// RuleUp and RuleDown are the buckets of the flow's rule, nil if it has no limits.
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
