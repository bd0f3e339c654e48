package forwarder

// Limits of single rules: what all flows that one rule let in may take together. Counts
// and the volume are the flow table's to limit (nat.Budget), bandwidth is limited here,
// by two buckets of the rule's own before those of the sandbox.

import (
	"sync"
	"sync/atomic"
	"time"

	"sluice/nat"
	"sluice/policy"
)

// ruleLimits are one rule's. They last as long as rules of that name have any.
type ruleLimits struct {
	budget   nat.Budget
	up, down bucket
	queues   atomic.Value // the packet path's, which makes them when there is something to queue
}

func (l *ruleLimits) set(t *nat.Table, r policy.RuleLimits) {
	t.SetBudget(&l.budget, nat.BudgetLimits{Flows: r.Flows, NewPerSecond: r.NewFlowsPerSecond, TotalBytes: int64(r.TotalBytes)})
	l.up.setRate(int64(r.EgressBandwidth) / 8)
	l.down.setRate(int64(r.IngressBandwidth) / 8)
}

// budgetOf is the budget of limits that may be nil.
func (l *ruleLimits) budgetOf() *nat.Budget {
	if l == nil {
		return nil
	}
	return &l.budget
}

// limited is the rules that have limits.
type limited struct {
	mu    sync.RWMutex
	rules map[string]*ruleLimits
}

// of returns the limits of the rule that a verdict names, nil if it has none.
func (l *limited) of(v policy.Verdict) *ruleLimits {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.rules[v.Rule()]
}

// set puts the limits of new rules in force. Of a rule that had limits already it
// changes them, so that what was used stays used.
func (l *limited) set(t *nat.Table, r *policy.Rules) {
	l.mu.Lock()
	defer l.mu.Unlock()
	rules := make(map[string]*ruleLimits)
	for name, limits := range r.RuleLimits() {
		old := l.rules[name]
		if old == nil {
			old = new(ruleLimits)
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

// has reports whether l are the limits of some rule in force.
func (l *limited) has(of *ruleLimits) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, r := range l.rules {
		if r == of {
			return true
		}
	}
	return false
}

// admitBoth reports whether a datagram of n bytes may pass by the rule, whose bucket may be
// nil, and by the sandbox. What one refuses costs the other nothing.
func admitBoth(rule, sandbox *bucket, n int, now time.Time) bool {
	if rule != nil && !rule.admit(n, now) {
		return false
	}
	if !sandbox.admit(n, now) {
		if rule != nil {
			rule.untake(n)
		}
		return false
	}
	return true
}

// take returns how many of want bytes may move now, by the rule, which may be nil, and by
// the sandbox. When there are none, t is queued on q as soon as that changes.
func take(rule, sandbox *bucket, want int, now time.Time, t *task, q *runQueue) int {
	if rule == nil {
		return sandbox.take(want, now, t, q)
	}
	n := rule.take(want, now, t, q)
	if n == 0 {
		return 0
	}
	granted := sandbox.take(n, now, t, q)
	rule.untake(n - granted)
	return granted
}

// untake gives back what was not used.
func untake(rule, sandbox *bucket, n int) {
	if rule != nil {
		rule.untake(n)
	}
	sandbox.untake(n)
}

// ruleUp and ruleDown are the buckets of the flow's rule, nil if it has no limits.
func (p *pass) ruleUp() *bucket {
	if s := p.shape.Load(); s != nil {
		return &s.up
	}
	return nil
}

func (p *pass) ruleDown() *bucket {
	if s := p.shape.Load(); s != nil {
		return &s.down
	}
	return nil
}
