package worker

// The worker's memory: the marks of the budget for the memory that the sandbox's bytes take
// (forwarder/internal/admit/memory.go), and the Go runtime's heap around it. By default the heap
// grows to twice the memory in use before it is collected.

import (
	"context"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/nat"
)

const (
	// easyGC and pressedGC are the heap's growth between two collections, in per cent of the memory
	// in use: Go's default, and the value while the budget is under pressure. Under pressure,
	// nearly all of the memory in use is chunks without pointers, which cost a collection nothing.
	easyGC, pressedGC = 100, 25
	// After pressure ends, memory is returned to the system giveBackTimes times, every
	// giveBackEvery. The runtime alone would take longer: the pools keep chunks over two
	// collections, and flows go on ending.
	giveBackEvery = 5 * time.Second
	giveBackTimes = 6
	// limitShare bounds the default high mark: it is at most the cgroup's memory limit divided by
	// limitShare. The rest is for the cgroup's processes, the kernel's socket buffers and the heap's
	// growth.
	limitShare = 4
)

// MemoryMarks returns the budget's marks. limit is the memory limit of the worker's cgroup; 0 means
// none.
func MemoryMarks(limit int64) forwarder.MemoryMarks {
	high := int64(forwarder.DefaultMemory)
	if limit > 0 {
		high = max(min(high, limit/limitShare), forwarder.LeastMemory)
	}
	return forwarder.MarksBelow(high)
}

// collector tunes the Go runtime's garbage collector when pressure begins and ends.
type collector struct {
	turned  chan struct{} // capacity 1
	pressed atomic.Bool
}

// collect starts a collector and returns the function that reports pressure to it.
func collect(ctx context.Context) func(pressed bool) {
	c := &collector{turned: make(chan struct{}, 1)}
	go c.run(ctx) // owned by the worker; ends with ctx
	return c.turn
}

// turn records the pressure for run. It does not block.
func (c *collector) turn(pressed bool) {
	c.pressed.Store(pressed)
	select {
	case c.turned <- struct{}{}:
	default:
	}
}

func (c *collector) run(ctx context.Context) {
	again := time.NewTimer(0)
	<-again.C
	left := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		case <-c.turned:
			left = giveBackTimes
		}
		if c.pressed.Load() {
			debug.SetGCPercent(pressedGC)
			continue
		}
		debug.SetGCPercent(easyGC)
		debug.FreeOSMemory()
		if left--; left > 0 {
			again.Reset(giveBackEvery)
		}
	}
}

// isMemoryTunable reports whether name, as returned by trimSysctl, is the budget's tunable.
func isMemoryTunable(name string) bool {
	return name == forwarder.MemorySysctl || name == strings.TrimPrefix(forwarder.MemorySysctl, "net.ipv4.")
}

// SetTunable sets a tunable of the flow table, of the memory budget or of keepalive.
func (w *Worker) SetTunable(name, value string) error {
	name = trimSysctl(name)
	switch {
	case forwarder.IsKeepaliveSysctl(name):
		return w.setKeepalive(name, value)
	case !isMemoryTunable(name):
		return w.Table.SetSysctl(name, value)
	}
	marks, err := forwarder.ParseMemory(value)
	if err != nil {
		return err
	}
	if w.fwd != nil {
		return w.fwd.SetMemory(marks)
	}
	w.Marks = marks
	return nil
}

// setKeepalive sets a tunable of keepalive.
func (w *Worker) setKeepalive(name, value string) error {
	k := w.keepalive
	if err := k.SetSysctl(name, value); err != nil {
		return err
	}
	w.keepalive = k
	if w.fwd != nil {
		w.fwd.SetKeepalive(k)
	}
	return nil
}

// tunable returns the value of one tunable.
func (w *Worker) tunable(name string) (string, error) {
	switch {
	case forwarder.IsKeepaliveSysctl(name):
		return w.fwd.Keepalive().Sysctl(name), nil
	case isMemoryTunable(name):
		return w.fwd.Memory().String(), nil
	}
	v, err := w.Table.Sysctl(name)
	return strconv.FormatInt(v, 10), err
}

// tunables returns the names of all tunables.
func tunables() []string {
	names := append(nat.SysctlNames(), forwarder.KeepaliveSysctls()...)
	return append(names, forwarder.MemorySysctl)
}
