package forwarder

import (
	"errors"
	"slices"
	"sync"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
)

// queuedLink has two queues, and notes what it is told of them.
type queuedLink struct {
	*channel.Endpoint
	mu       sync.Mutex
	attached int
	told     []string
	fail     error
}

func (l *queuedLink) Queues() (attached, all int) { return l.attached, 2 }
func (l *queuedLink) Spread() error               { return l.note("spread") }
func (l *queuedLink) Narrow()                     { _ = l.note("narrow") }
func (l *queuedLink) Gather() error               { return l.note("gather") }

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

func TestQueuesComeWithTheCrowdAndGoWithTheCalm(t *testing.T) {
	for _, row := range []struct {
		name     string
		attached int
		fail     error
		signals  string // of the leader: c for a crowd, - for calm
		want     []string
		width    int32
	}{
		{"a crowd, and calm", 1, nil, "c--", []string{"spread", "narrow", "gather"}, gathered},
		{"a crowd that comes back", 1, nil, "c-c--", []string{"spread", "narrow", "spread", "narrow", "gather"}, gathered},
		{"left spread by the worker before", 2, nil, "-", []string{"gather"}, gathered},
		{"the same, with a crowd", 2, nil, "c", []string{"spread"}, spread},
		{"a kernel that refuses", 1, errors.New("refused"), "c", []string{"spread"}, gathered},
	} {
		t.Run(row.name, func(t *testing.T) {
			l := &queuedLink{attached: row.attached, fail: row.fail}
			w := newWire(t, allowAll, func(c *Config) {
				l.Endpoint = c.Link.(*channel.Endpoint)
				c.Link = l
			})
			for i, s := range row.signals {
				if s == 'c' {
					signal(w.f.engine.crowded)
				} else {
					signal(w.f.engine.calm)
				}
				eventually(t, "the device is told", func() bool { return len(l.heard()) > i })
			}
			if got := l.heard(); !slices.Equal(got, row.want) {
				t.Errorf("it was told %v, want %v", got, row.want)
			}
			eventually(t, "the engine knows", func() bool { return w.f.engine.width.Load() == row.width })
			if failed := w.f.Stats()["device_spread_failed"]; (failed > 0) != (row.fail != nil) {
				t.Errorf("device_spread_failed is %d", failed)
			}
		})
	}
}
