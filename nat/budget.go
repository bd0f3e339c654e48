package nat

import "sync/atomic"

// BudgetLimits bound several flows together. A zero field sets no bound.
type BudgetLimits struct {
	Flows        int
	NewPerSecond int   // with a second's worth of burst
	TotalBytes   int64 // both ways, since the budget was made
}

// Budget limits what some flows of a table may use together, in addition to the table's Limits: the
// flows that one rule admitted. It belongs to one table.
type Budget struct {
	total atomic.Int64 // TotalBytes
	used  atomic.Int64 // bytes charged

	// Guarded by Table.mu.
	flows, max int
	rate       bucket
}

// SetBudget changes the limits of b, which start as the zero value. Existing flows stay, except
// when a byte budget is exhausted: then they end at the next Expire.
func (t *Table) SetBudget(b *Budget, l BudgetLimits) {
	t.mu.Lock()
	b.max, b.rate.rate = max(l.Flows, 0), max(l.NewPerSecond, 0)
	t.mu.Unlock()
	b.total.Store(max(l.TotalBytes, 0))
	if b.spent() {
		t.overspent.Store(true)
		t.rouse()
	}
}

// Charge charges the flow to b instead of the budget it was charged to; either may be nil. It fails
// if b has no room, unless the flow was admitted already: then b may exceed its limit.
func (l *Lease) Charge(b *Budget, admitted bool) error {
	t := l.table
	l.mu.Lock()
	defer l.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	old := l.budget.Load()
	if old == b || l.load()&dead != 0 {
		return nil
	}
	if !admitted {
		if err := t.room(b, t.clock()); err != nil {
			return err
		}
	}
	l.recharge(b)
	return nil
}

// room reports whether b has room for one more flow. Table.mu is held.
func (t *Table) room(b *Budget, now int64) (err error) {
	switch {
	case b == nil:
		return nil
	case b.spent():
		err = ErrBudgetBytes
	case b.max > 0 && b.flows >= b.max:
		err = ErrBudgetFlows
	case !b.rate.take(now):
		err = ErrBudgetRate
	}
	if err != nil {
		t.stats.BudgetLimit++
	}
	return err
}

// recharge repays the flow's budget and charges b. Table.mu is held.
func (l *Lease) recharge(b *Budget) {
	if old := l.budget.Load(); old != nil {
		old.flows--
	}
	if b != nil {
		b.flows++
	}
	l.budget.Store(b)
}

func (b *Budget) spent() bool {
	total := b.total.Load()
	return total > 0 && b.used.Load() >= total
}

// charge adds bytes, and has Expire called once they are used up.
func (b *Budget) charge(t *Table, bytes int64) {
	used := b.used.Add(bytes)
	if total := b.total.Load(); total > 0 && used >= total && used-bytes < total {
		t.overspent.Store(true)
		t.rouse()
	}
}
