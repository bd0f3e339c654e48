package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/fork"
	"sluice.dev/sluice/sandbox/internal/process"
)

// fake is a worker that ends when told to.
type fake struct {
	done chan struct{}
	why  string
}

func (f *fake) Ended() <-chan struct{} { return f.done }

func (f *fake) Reason() string { return f.why }

func dead(why string) *fake {
	f := &fake{done: make(chan struct{}), why: why}
	close(f.done)
	return f
}

func TestBackoff(t *testing.T) {
	const ms = time.Millisecond
	for _, row := range []struct {
		name  string
		lived []time.Duration
		waits []time.Duration
	}{
		{"one that lived is replaced at once", []time.Duration{time.Minute}, []time.Duration{0}},
		{"so is the first that dies young", []time.Duration{time.Second}, []time.Duration{0}},
		{"those that go on dying young wait ever longer, but not for ever",
			make([]time.Duration, 10),
			[]time.Duration{0, 50 * ms, 100 * ms, 200 * ms, 400 * ms, 800 * ms, 1600 * ms, 3200 * ms, 5000 * ms, 5000 * ms}},
		{"until one has lived",
			[]time.Duration{0, 0, 0, process.StableAfter, 0},
			[]time.Duration{0, 50 * ms, 100 * ms, 0, 50 * ms}},
	} {
		var b process.Backoff
		var waits []time.Duration
		for _, lived := range row.lived {
			waits = append(waits, b.After(lived))
		}
		if !slices.Equal(waits, row.waits) {
			t.Errorf("%s: waits %v, want %v", row.name, waits, row.waits)
		}
	}
}

func TestSupervisorRestartsWhatDiesAndRetriesWhatFails(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	last := &fake{done: make(chan struct{})}
	starts := 0
	var log []string
	s := process.Supervisor{
		Start: func(context.Context) (process.Supervised, error) {
			switch starts++; starts {
			case 1:
				return dead("second"), nil
			case 2:
				return nil, errors.New("no memory")
			}
			cancel()
			return last, nil
		},
		Lost:   func(why string, wait time.Duration) { log = append(log, "lost "+why+" "+wait.String()) },
		Failed: func(err error, wait time.Duration) { log = append(log, "failed "+err.Error()+" "+wait.String()) },
		Now:    func() time.Time { return time.Unix(0, 0) },
		Sleep:  func(_ context.Context, d time.Duration) { log = append(log, "slept "+d.String()) },
	}
	if got := s.Run(ctx, dead("first")); got != process.Supervised(last) {
		t.Errorf("run returned %v, want the worker that was alive", got)
	}
	want := []string{
		"lost first 0s", "slept 0s", "lost second 50ms", "slept 50ms",
		"failed no memory 100ms", "slept 100ms",
	}
	if !slices.Equal(log, want) {
		t.Errorf("got  %q\nwant %q", log, want)
	}
}

func TestSupervisorEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	alive := &fake{done: make(chan struct{})}
	s := process.Supervisor{Now: time.Now, Sleep: process.SleepContext}
	got := make(chan process.Supervised)
	go func() { got <- s.Run(ctx, alive) }()
	cancel()
	if w := <-got; w != process.Supervised(alive) {
		t.Errorf("got %v, want the worker that was alive", w)
	}
}

// fakeWorker is the worker process of the tests below.
func fakeWorker(fate string) int {
	ch := channel.New(os.NewFile(channel.WorkerChannelFD, "channel"), true)
	m, _, err := ch.Receive()
	if err != nil || m.Type != channel.MsgConfig {
		return 9
	}
	switch fate {
	case "panics":
		panic("on purpose")
	case "fails":
		os.Stderr.WriteString("<3>sluice: worker: no device\n")
		return 1
	case "hangs":
		select {}
	case "babbles":
		ch.F.Write([]byte("not a message"))
		select {}
	}
	if m, ok := strings.CutPrefix(fate, "grants "); ok {
		_ = ch.Send(channel.MsgGrant, 0, json.RawMessage(m))
	}
	_ = ch.Send(channel.MsgReady, 0, nil)
	for {
		m, fds, err := ch.Receive()
		if err != nil {
			return 0
		}
		channel.CloseAll(fds)
		ack := channel.Message{Type: channel.MsgAck, Seq: m.Seq}
		switch m.Type {
		case channel.MsgSysctl:
			ack.Error = "no such\x1b setting"
		case channel.MsgStop:
			return 0
		case channel.MsgRules:
			continue // never acknowledged
		}
		if ch.SendMessage(ack, nil) != nil {
			return 0
		}
	}
}

func startFake(t *testing.T, fate string) (*process.WorkerLink, *[]string) {
	t.Helper()
	s := process.NewSpawner()
	t.Cleanup(s.Close)
	lines := new([]string)
	p, err := s.Start(fork.Plan{Args: []string{"test", "test-worker", fate}}, func(l string) { *lines = append(*lines, l) })
	testutil.Must(t, err)
	t.Cleanup(p.Kill)
	l := process.NewWorkerLink(p, func(*process.WorkerLink, bool) {}, nil, channel.NewKeptGrants())
	testutil.Must(t, l.Post(channel.MsgConfig, channel.WorkerConfig{Rules: noPolicy}))
	return l, lines
}

func TestWorkerLink(t *testing.T) {
	before := testutil.Descriptors(t, os.Getpid())
	t.Run("requests are acknowledged, with the worker's reason made printable", func(t *testing.T) {
		l, _ := startFake(t, "serves")
		<-l.Ready
		if err := l.Request(channel.MsgUpstreams, nil); err != nil {
			t.Errorf("upstreams: %v", err)
		}
		if err := l.Request(channel.MsgSysctl, nil); err == nil || err.Error() != "no such� setting" {
			t.Errorf("sysctl: %q", err)
		}
	})
	t.Run("a request that the worker does not live to answer fails", func(t *testing.T) {
		l, _ := startFake(t, "serves")
		<-l.Ready
		got := make(chan error)
		go func() { got <- l.Request(channel.MsgRules, nil) }()
		for { // until it is under way
			l.Mu.Lock()
			n := len(l.Acks)
			l.Mu.Unlock()
			if n > 0 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		testutil.Must(t, l.P.Cmd.Kill())
		if err := <-got; !errors.Is(err, process.ErrWorkerGone) {
			t.Errorf("got %v", err)
		}
		if err := l.Request(channel.MsgRules, nil); err == nil {
			t.Error("a request to a dead worker succeeded")
		}
		<-l.Ended()
		if why := l.Reason(); !strings.Contains(why, "SIGKILL") {
			t.Errorf("reason %q", why)
		}
	})
	for fate, want := range map[string]string{
		"panics":  "exit status 2: panic: on purpose",
		"fails":   "exit status 1: sluice: worker: no device",
		"babbles": "SIGKILL", // by the monitor, for the protocol violation
	} {
		t.Run("a worker that "+fate+" is explained", func(t *testing.T) {
			l, lines := startFake(t, fate)
			<-l.Ended()
			if why := l.Reason(); !strings.Contains(why, want) {
				t.Errorf("reason %q, want %q in it; it said %q", why, want, *lines)
			}
		})
	}
	t.Run("a worker ends with its channel", func(t *testing.T) {
		l, _ := startFake(t, "serves")
		<-l.Ready
		testutil.Must(t, l.P.Ch.Close())
		<-l.Ended()
		if why := l.Reason(); why != "exit status 0" {
			t.Errorf("reason %q", why)
		}
	})
	if after := testutil.Descriptors(t, os.Getpid()); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
