package forwarder

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/link/channel"

	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/internal/testutil"
)

// queuedLink has two queues, and records what it is told about them.
type queuedLink struct {
	*channel.Endpoint
	mu       sync.Mutex
	attached int
	received uint64
	looks    int  // how often it was asked that
	busy     bool // a frame comes whenever it is asked
	told     []string
	fail     error
}

func (l *queuedLink) Queues() (attached, all int) { return l.attached, 2 }

func (l *queuedLink) Spread() error { return l.note("spread") }

func (l *queuedLink) Narrow() { _ = l.note("narrow") }

func (l *queuedLink) Gather() error { return l.note("gather") }

func (l *queuedLink) Received() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.looks++
	if l.busy {
		l.received++
	}
	return l.received
}

func (l *queuedLink) note(what string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told = append(l.told, what)
	return l.fail
}

func (l *queuedLink) heard() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.told)
}

func (l *queuedLink) looked() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.looks
}

func (l *queuedLink) setBusy(busy bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busy = busy
}

func TestQueuesComeWithTheCrowdAndGoWithTheCalm(t *testing.T) {
	const calmAfter, quietFor = 20 * time.Millisecond, 2 * time.Millisecond
	crowd := func(w *wire) {
		w.f.engine.CrowdAt.Store(int64(time.Since(w.f.engine.Start)))
		if !w.f.engine.Spread.Load() {
			engine.Signal(w.f.engine.Crowded)
		}
	}
	all := []string{"spread", "narrow", "gather"}
	for _, row := range []struct {
		name     string
		attached int
		busy     bool
		patience time.Duration
		fail     error
		do       func(t *testing.T, w *wire, l *queuedLink)
		want     []string
	}{
		{"a crowd, and calm", 1, false, time.Hour, nil, func(t *testing.T, w *wire, _ *queuedLink) { crowd(w) }, all},
		{"no pause, then one", 1, true, time.Hour, nil, func(t *testing.T, w *wire, l *queuedLink) {
			crowd(w)
			testutil.Eventually(t, "it is narrow", func() bool { return slices.Equal(l.heard(), all[:2]) })
			enough := l.looked() + 3*int(calmAfter/quietFor)
			testutil.Eventually(t, "it was looked at for long", func() bool { return l.looked() > enough })
			if got := l.heard(); !slices.Equal(got, all[:2]) {
				t.Errorf("while frames came it was told %v", got)
			}
			l.setBusy(false)
		}, all},
		{"no pause at all", 1, true, 3 * calmAfter, nil, func(t *testing.T, w *wire, _ *queuedLink) { crowd(w) }, all},
		{"a crowd that comes back", 1, false, time.Hour, nil, func(t *testing.T, w *wire, l *queuedLink) {
			crowd(w)
			testutil.Eventually(t, "it is narrow", func() bool { return slices.Equal(l.heard(), all[:2]) })
			crowd(w)
		}, []string{"spread", "narrow", "spread", "narrow", "gather"}},
		{"left spread by the worker before", 2, false, time.Hour, nil, func(*testing.T, *wire, *queuedLink) {}, all[1:]},
		{"a kernel that refuses", 1, false, time.Hour, errors.New("refused"), func(t *testing.T, w *wire, _ *queuedLink) { crowd(w) }, all[:1]},
	} {
		t.Run(row.name, func(t *testing.T) {
			l := &queuedLink{attached: row.attached, busy: row.busy, fail: row.fail}
			w := newWire(t, allowAll, func(c *Config) {
				l.Endpoint = c.Link.(*channel.Endpoint)
				c.Link = l
				c.spread = engine.SpreadTimes{CalmAfter: calmAfter, QuietFor: quietFor, QuietWithin: row.patience}
			})
			row.do(t, w, l)
			testutil.Eventually(t, "it is told all", func() bool { return len(l.heard()) == len(row.want) })
			testutil.Eventually(t, "the engine knows", func() bool { return !w.f.engine.Spread.Load() })
			if got := l.heard(); !slices.Equal(got, row.want) {
				t.Errorf("it was told %v, want %v", got, row.want)
			}
			if failed := w.f.Stats()["device_spread_failed"]; (failed > 0) != (row.fail != nil) {
				t.Errorf("device_spread_failed is %d", failed)
			}
		})
	}
}
