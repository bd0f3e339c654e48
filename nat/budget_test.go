package nat

import (
	"errors"
	"testing"
	"time"
)

func TestABudgetBoundsItsFlowsOnly(t *testing.T) {
	clock := newFakeClock()
	table := NewTable(Config{Now: clock.now})
	b := new(Budget)
	table.SetBudget(b, BudgetLimits{Flows: 2})
	one := acquire(t, table, Spec{Orig: numbered(protoUDP, 1), Budget: b})
	two := acquire(t, table, Spec{Orig: numbered(protoUDP, 2), Budget: b})
	if _, err := table.Acquire(Spec{Orig: numbered(protoUDP, 3), Budget: b}); !errors.Is(err, ErrBudgetFlows) {
		t.Errorf("a third: %v", err)
	}
	free := acquire(t, table, Spec{Orig: numbered(protoUDP, 4)})
	if err := free.Charge(b, false); !errors.Is(err, ErrBudgetFlows) {
		t.Errorf("a flow that wants to come under it: %v", err)
	}
	if err := free.Charge(b, true); err != nil {
		t.Errorf("a flow that was let in already: %v", err)
	}
	if err := one.Charge(nil, true); err != nil {
		t.Error(err)
	}
	two.Release("closed")
	if _, err := table.Acquire(Spec{Orig: numbered(protoUDP, 5), Budget: b}); err != nil {
		t.Errorf("after two have left: %v", err)
	}
	if n := table.Stats().BudgetLimit; n != 2 {
		t.Errorf("BudgetLimit is %d", n)
	}
	for _, l := range table.Leases() {
		l.Release("closed")
	}
	if wantEmpty(t, table); b.flows != 0 {
		t.Errorf("%d flows are still charged", b.flows)
	}
}

func TestABudgetsRate(t *testing.T) {
	clock := newFakeClock()
	table := NewTable(Config{Now: clock.now})
	b := new(Budget)
	table.SetBudget(b, BudgetLimits{NewPerSecond: 10})
	began := 0
	try := func() {
		if _, err := table.Acquire(Spec{Orig: numbered(protoUDP, began), Budget: b}); err == nil {
			began++
		} else if !errors.Is(err, ErrBudgetRate) {
			t.Fatal(err)
		}
	}
	for range 30 {
		try()
	}
	if began != 10 {
		t.Errorf("%d at once, want 10", began)
	}
	clock.advance(500 * time.Millisecond)
	for range 30 {
		try()
	}
	if began != 15 {
		t.Errorf("%d after half a second, want 15", began)
	}
}

func TestABudgetThatIsUsedUpEndsItsFlowsOnly(t *testing.T) {
	clock := newFakeClock()
	table := NewTable(Config{Now: clock.now})
	b := new(Budget)
	table.SetBudget(b, BudgetLimits{TotalBytes: 1000})
	var reason Reason
	in := acquire(t, table, Spec{Orig: numbered(protoUDP, 1), Budget: b, Expire: func(r Reason) { reason = r }})
	other := acquire(t, table, Spec{Orig: numbered(protoUDP, 2)})
	other.Account(Original, 1, 5000)
	in.Account(Original, 1, 600)
	table.Expire(clock.now())
	if in.Ended() {
		t.Fatal("it ended too early")
	}
	in.Account(Reply, 1, 400)
	table.Expire(clock.now())
	if !in.Ended() || other.Ended() || reason != ReasonBudgetBytes {
		t.Errorf("ended %v, the other %v, by %q", in.Ended(), other.Ended(), reason)
	}
	if _, err := table.Acquire(Spec{Orig: numbered(protoUDP, 3), Budget: b}); !errors.Is(err, ErrBudgetBytes) {
		t.Errorf("one more: %v", err)
	}
	table.SetBudget(b, BudgetLimits{TotalBytes: 2000})
	if _, err := table.Acquire(Spec{Orig: numbered(protoUDP, 3), Budget: b}); err != nil {
		t.Errorf("with more bytes: %v", err)
	}
}
