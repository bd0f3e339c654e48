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

	"sluice/forwarder/sandbox/fork"
)

// fake is a worker that ends when told to.
type fake struct {
	done chan struct{}
	why  string
}

func (f *fake) ended() <-chan struct{} { return f.done }
func (f *fake) reason() string         { return f.why }

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
			[]time.Duration{0, 0, 0, stableAfter, 0},
			[]time.Duration{0, 50 * ms, 100 * ms, 0, 50 * ms}},
	} {
		var b backoff
		var waits []time.Duration
		for _, lived := range row.lived {
			waits = append(waits, b.after(lived))
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
	s := supervisor{
		start: func(context.Context) (supervised, error) {
			switch starts++; starts {
			case 1:
				return dead("second"), nil
			case 2:
				return nil, errors.New("no memory")
			}
			cancel()
			return last, nil
		},
		lost:   func(why string, wait time.Duration) { log = append(log, "lost "+why+" "+wait.String()) },
		failed: func(err error, wait time.Duration) { log = append(log, "failed "+err.Error()+" "+wait.String()) },
		now:    func() time.Time { return time.Unix(0, 0) },
		sleep:  func(_ context.Context, d time.Duration) { log = append(log, "slept "+d.String()) },
	}
	if got := s.run(ctx, dead("first")); got != supervised(last) {
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
	s := supervisor{now: time.Now, sleep: sleepContext}
	got := make(chan supervised)
	go func() { got <- s.run(ctx, alive) }()
	cancel()
	if w := <-got; w != supervised(alive) {
		t.Errorf("got %v, want the worker that was alive", w)
	}
}

// fakeWorker is the worker process of the tests below.
func fakeWorker(fate string) int {
	ch := newChannel(os.NewFile(workerChannelFD, "channel"), true)
	m, _, err := ch.Receive()
	if err != nil || m.Type != msgConfig {
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
		ch.f.Write([]byte("not a message"))
		select {}
	}
	if m, ok := strings.CutPrefix(fate, "grants "); ok {
		_ = ch.Send(msgGrant, 0, json.RawMessage(m))
	}
	_ = ch.Send(msgReady, 0, nil)
	for {
		m, fds, err := ch.Receive()
		if err != nil {
			return 0
		}
		closeAll(fds)
		ack := message{Type: msgAck, Seq: m.Seq}
		switch m.Type {
		case msgSysctl:
			ack.Error = "no such\x1b setting"
		case msgStop:
			return 0
		case msgRules:
			continue // never acknowledged
		}
		if ch.send(ack, nil) != nil {
			return 0
		}
	}
}

func startFake(t *testing.T, fate string) (*workerLink, *[]string) {
	t.Helper()
	s := newSpawner()
	t.Cleanup(s.close)
	lines := new([]string)
	p, err := s.start(fork.Plan{Args: []string{"test", "test-worker", fate}}, func(l string) { *lines = append(*lines, l) })
	must(t, err)
	t.Cleanup(p.kill)
	l := newWorkerLink(p, func(*workerLink, bool) {}, nil, newKeptGrants())
	must(t, l.post(msgConfig, workerConfig{Rules: noPolicy}))
	return l, lines
}

func TestWorkerLink(t *testing.T) {
	before := openFDs(t)
	t.Run("requests are acknowledged, with the worker's reason made printable", func(t *testing.T) {
		l, _ := startFake(t, "serves")
		<-l.ready
		if err := l.request(msgUpstreams, nil); err != nil {
			t.Errorf("upstreams: %v", err)
		}
		if err := l.request(msgSysctl, nil); err == nil || err.Error() != "no such� setting" {
			t.Errorf("sysctl: %q", err)
		}
	})
	t.Run("a request that the worker does not live to answer fails", func(t *testing.T) {
		l, _ := startFake(t, "serves")
		<-l.ready
		got := make(chan error)
		go func() { got <- l.request(msgRules, nil) }()
		for { // until it is under way
			l.mu.Lock()
			n := len(l.acks)
			l.mu.Unlock()
			if n > 0 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		must(t, l.p.cmd.Kill())
		if err := <-got; !errors.Is(err, errWorkerGone) {
			t.Errorf("got %v", err)
		}
		if err := l.request(msgRules, nil); err == nil {
			t.Error("a request to a dead worker succeeded")
		}
		<-l.ended()
		if why := l.reason(); !strings.Contains(why, "SIGKILL") {
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
			<-l.ended()
			if why := l.reason(); !strings.Contains(why, want) {
				t.Errorf("reason %q, want %q in it; it said %q", why, want, *lines)
			}
		})
	}
	t.Run("a worker ends with its channel", func(t *testing.T) {
		l, _ := startFake(t, "serves")
		<-l.ready
		must(t, l.p.ch.Close())
		<-l.ended()
		if why := l.reason(); why != "exit status 0" {
			t.Errorf("reason %q", why)
		}
	})
	if after := openFDs(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
