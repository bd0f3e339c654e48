package nat

import (
	"errors"
	"net/netip"
	"testing"
)

// A flow whose packets pass has both ends elsewhere: it may be half-open beside the
// budget, and gives way until it is ASSURED, answered or not.
func TestForwardedFlowsGiveWayUntilAssured(t *testing.T) {
	tb := NewTable(Config{Limits: Limits{Max: 4, HalfOpen: 1}})
	flow := func(port uint16, forwarded bool) Spec {
		return Spec{
			Orig:    NewTuple(protoTCP, netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port), netip.MustParseAddrPort("10.0.2.100:80")),
			Ingress: true, Forwarded: forwarded,
		}
	}
	acquire := func(port uint16) *Lease {
		t.Helper()
		l, err := tb.Acquire(flow(port, true))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	assured := acquire(1)
	assured.SetState(Established)
	var answered []*Lease
	for port := uint16(2); port < 5; port++ {
		l := acquire(port)
		l.SetState(SynRecv)
		l.Account(Reply, 1, 60)
		answered = append(answered, l)
	}
	if s := tb.Stats(); s.HalfOpen != 0 || s.Count != 4 {
		t.Errorf("%d half-open flows are charged of %d", s.HalfOpen, s.Count)
	}
	for port := uint16(5); port < 8; port++ {
		acquire(port)
	}
	for i, l := range answered {
		if !l.Ended() {
			t.Errorf("flow %d, answered but not assured, is still there", i)
		}
	}
	if assured.Ended() {
		t.Error("an assured flow gave way")
	}
	// One that ends here keeps its place once it was answered.
	tb = NewTable(Config{Limits: Limits{Max: 1}})
	l, err := tb.Acquire(flow(1, false))
	if err != nil {
		t.Fatal(err)
	}
	l.SetState(SynRecv)
	if _, err := tb.Acquire(flow(2, true)); !errors.Is(err, ErrTableFull) {
		t.Errorf("a flow that was answered gave way: %v", err)
	}
}
