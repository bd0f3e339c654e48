package nat

import (
	"fmt"
	"sync"
	"testing"
	"time"
)

func TestEventsTellAFlowsLife(t *testing.T) {
	clock := newFakeClock()
	var logged []string
	table := NewTable(Config{Now: clock.now, OnEvent: func(ev Event) {
		logged = append(logged, fmt.Sprint(ev.Type, " ", ev.Flow.State))
	}})
	events, cancel := table.Subscribe(100)
	tcp := acquire(t, table, Spec{Orig: numbered(6, 1), Rule: "egress[0] web", Names: []string{"example.org"}})
	tcp.Account(Original, 1, 60)
	tcp.SetState(SynRecv)
	tcp.SetState(Established)
	tcp.SetState(Established)
	tcp.Account(Reply, 1, 60)
	tcp.SetState(TimeWait)
	tcp.Release("closed")
	udp := acquire(t, table, Spec{Orig: numbered(17, 1)})
	udp.SetState(Established) // not TCP: ignored
	udp.Account(Original, 1, 60)
	udp.Account(Reply, 1, 60)
	udp.Account(Reply, 1, 60)
	clock.advance(3 * time.Second)
	udp.Account(Original, 1, 60)
	udp.Account(Original, 1, 60)
	clock.advance(time.Hour)
	table.Expire(clock.t)
	cancel()
	cancel()

	want := []string{
		"NEW SYN_SENT", "UPDATE SYN_RECV", "UPDATE ESTABLISHED", "UPDATE TIME_WAIT", "DESTROY TIME_WAIT",
		"NEW UNREPLIED", "UPDATE REPLIED", "UPDATE ASSURED", "DESTROY ASSURED",
	}
	var got []string
	var last Event
	for last = range events {
		got = append(got, fmt.Sprint(last.Type, " ", last.Flow.State))
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("told\n%q, want\n%q", got, want)
	}
	if fmt.Sprint(logged) != fmt.Sprint(want) {
		t.Errorf("OnEvent was told\n%q, want\n%q", logged, want)
	}
	if f := last.Flow; f.Reason != ReasonTimeout || f.OrigPackets != 3 || f.ReplyBytes != 120 || !last.Time.Equal(clock.t) {
		t.Errorf("the last record is %+v", f)
	}
}

func TestASlowSubscriberLosesEventsAndIsToldHowMany(t *testing.T) {
	table := NewTable(Config{Now: newFakeClock().now})
	events, cancel := table.Subscribe(2)
	defer cancel()
	for n := range 5 {
		acquire(t, table, Spec{Orig: numbered(17, n)})
	}
	<-events
	acquire(t, table, Spec{Orig: numbered(17, 5)})
	<-events
	if ev := <-events; ev.Lost != 3 || ev.Flow.ID != 6 {
		t.Errorf("after three lost events came %+v", ev)
	}
	if s := table.Stats(); s.EventsLost != 3 {
		t.Errorf("%d lost events are counted", s.EventsLost)
	}
}

func TestSubscribersComeAndGoWhileFlowsDo(t *testing.T) {
	table := NewTable(Config{})
	var wg sync.WaitGroup
	for g := range 2 {
		wg.Go(func() {
			for n := range 2000 {
				acquire(t, table, Spec{Orig: numbered(17, g<<16|n)}).Release("done")
			}
		})
		wg.Go(func() {
			for range 200 {
				events, cancel := table.Subscribe(4)
				select {
				case <-events:
				default:
				}
				cancel()
			}
		})
	}
	wg.Wait()
	wantEmpty(t, table)
}
