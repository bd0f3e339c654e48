package admit

// The memory budget: one for a sandbox, over everything that holds its bytes.
//
// It counts the memory that the bytes occupy: the chunks that hold them, as the pool rounds them,
// and the structures around them (a byte in a segment of its own takes about a KiB). It covers both
// queues of each TCP flow in the stack, including out-of-order segments (memory_flow.go), the
// resolver's connections, the relays' pipes, and waiting datagrams and packets. The three marks are
// those of Linux's tcp_mem:
//
//	                 low           pressure          high
//	    no pressure   │               │                │
//	──────────────────┼───────────────┼────────────────┼──────
//	                  ├── pressure, once entered ──────┤ nobody enters
//
// Above pressure, and until use is below low again, receive windows shrink, and a flow may hold its
// share of what is left; one that moves may hold more. At high no flow is admitted. An admitted
// flow has paid for FlowMinimum each way and is never denied it, so it makes progress. Usage
// therefore stays below high, except for what goroutines that charge at the same moment miss of
// each other.

import (
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/forwarder/internal/netstack"
)

// MemoryMarks are the marks of the budget in bytes: net.ipv4.tcp_mem, which has pages.
type MemoryMarks struct{ Low, Pressure, High int64 }

const (
	// DefaultMemory is the high mark unless set otherwise: a full flow table's guaranteed
	// minimum (nat.DefaultMax times two of FlowMinimum) is as much.
	DefaultMemory = 256 << 20
	// LeastMemory is the least high mark: 1 024 flows and a few large segments.
	LeastMemory = 8 << 20
	// mostMemory keeps sums of it far from overflow.
	mostMemory = 1 << 50

	// FlowMinimum is what each direction of a TCP flow may always hold: a small segment and the
	// structures around it.
	FlowMinimum = 2 << 10
	// FlowPressed bounds what a direction may hold under pressure.
	FlowPressed = 256 << 10
	// movingPart is the part of the remaining budget that one moving flow may take.
	movingPart = 16
	// MostBuffered is netstack's own bound on the bytes of a direction, and FlowMost bounds the
	// memory that they occupy. FlowMost is reached first only if they come in small pieces.
	MostBuffered = 4 << 20
	FlowMost     = 2 * MostBuffered
)

// MarksBelow returns the marks for a high mark. Pressure begins earlier than tcp_mem's two thirds:
// half of the budget is for the minimum of many flows.
func MarksBelow(high int64) MemoryMarks {
	return MemoryMarks{Low: high / 8 * 3, Pressure: high / 2, High: high}
}

// valid returns why m cannot be a budget.
func (m MemoryMarks) valid() error {
	switch {
	case m.High < LeastMemory || m.High > mostMemory:
		return fmt.Errorf("the high mark %d is not between %d and %d bytes", m.High, LeastMemory, int64(mostMemory))
	case m.Low <= 0 || m.Low > m.Pressure || m.Pressure > m.High:
		return fmt.Errorf("the marks %d, %d and %d do not rise", m.Low, m.Pressure, m.High)
	}
	return nil
}

// Memory is the budget. Its methods are safe for concurrent use.
type Memory struct {
	Used                atomic.Int64
	Flows               atomic.Int64 // that share it
	low, Pressure, High atomic.Int64
	Pressed             atomic.Bool
	Starving            atomic.Bool // a flow has starved since the timer last looked (TallyAll)
	onPressure          func(bool)  // told of each change; must not block

	Entered, Refused, Cut, Dropped, compacted *atomic.Uint64
}

func NewMemory(s *count.Set, marks MemoryMarks, onPressure func(bool)) (*Memory, error) {
	m := &Memory{
		onPressure: onPressure,
		Entered:    s.Counter("memory_pressure_entered"),
		Refused:    s.Counter("memory_refused_flows"),
		Cut:        s.Counter("memory_cut_segments"),     // accepted only in part
		Dropped:    s.Counter("memory_dropped_segments"), // not accepted at all
		compacted:  s.Counter("memory_compacted_packets"),
	}
	if marks == (MemoryMarks{}) {
		marks = MarksBelow(DefaultMemory)
	}
	return m, m.SetMarks(marks)
}

func (m *Memory) SetMarks(marks MemoryMarks) error {
	if err := marks.valid(); err != nil {
		return err
	}
	m.low.Store(marks.Low)
	m.Pressure.Store(marks.Pressure)
	m.High.Store(marks.High)
	m.Add(0)
	return nil
}

// Marks returns the marks in force.
func (m *Memory) Marks() MemoryMarks {
	return MemoryMarks{m.low.Load(), m.Pressure.Load(), m.High.Load()}
}

// Add takes n bytes, or returns -n. The caller checks first how much there is to take.
func (m *Memory) Add(n int64) {
	used := m.Used.Add(n)
	switch pressed := m.Pressed.Load(); {
	case !pressed && used > m.Pressure.Load():
		m.turn(true)
	case pressed && used < m.low.Load():
		m.turn(false)
	}
}

func (m *Memory) turn(pressed bool) {
	if !m.Pressed.CompareAndSwap(!pressed, pressed) {
		return
	}
	if pressed {
		m.Entered.Add(1)
	}
	if m.onPressure != nil {
		m.onPressure(pressed)
	}
}

// Left returns how much is left below high. It may be negative.
func (m *Memory) Left() int64 { return m.High.Load() - m.Used.Load() }

// Admit reports whether a flow may begin. A flow that holds bytes is charged its guaranteed
// minimum, which Leave repays.
func (m *Memory) Admit(s *Shares) bool {
	if s != nil && s.enter(m) || s == nil && m.Left() > 0 {
		return true
	}
	m.Refused.Add(1)
	return false
}

// Compact returns a copy of a wasteful packet; the caller owns it.
func (m *Memory) Compact(pkt *stack.PacketBuffer) *stack.PacketBuffer {
	m.compacted.Add(1)
	return netstack.Compact(pkt)
}

// Limit is what one direction of a flow may hold at this moment. Between pressure and high
//
//	the first half    is for all: a flow may have an equal share of what is left of it
//	the third quarter is for flows that have shown that they move, a large part for each
//	the last quarter  is for the guaranteed minimum of flows that are still to come
//
// so that idle flows, however many, do not stop the others.
func (m *Memory) Limit(moving bool) int64 {
	if !m.Pressed.Load() {
		return FlowMost
	}
	pressure, used := m.Pressure.Load(), m.Used.Load()
	quarter := (m.High.Load() - pressure) / 4
	limit := (pressure + 2*quarter - used) / (m.Flows.Load() + 1)
	if moving {
		limit = max(limit, (pressure+3*quarter-used)/movingPart)
	}
	return min(max(limit, FlowMinimum), FlowPressed)
}

// Charge is the part of a budget that one holder has taken. Once released it takes no more.
type Charge struct {
	M    *Memory
	Held atomic.Int64 // -1: released
}

// Set makes the charge n bytes. With concurrent calls the last one counts.
func (c *Charge) Set(n int64) {
	for {
		old := c.Held.Load()
		if old < 0 || old == n {
			return
		}
		if c.Held.CompareAndSwap(old, n) {
			c.M.Add(n - old)
			return
		}
	}
}

// Try increases the charge by n bytes if they are left below high.
func (c *Charge) Try(n int64) bool {
	if c.M.Left() < n {
		return false
	}
	for {
		old := c.Held.Load()
		if old < 0 {
			return false
		}
		if c.Held.CompareAndSwap(old, old+n) {
			c.M.Add(n)
			return true
		}
	}
}

// Give decreases it by n bytes.
func (c *Charge) Give(n int64) {
	for {
		old := c.Held.Load()
		if old < 0 {
			return
		}
		if c.Held.CompareAndSwap(old, old-n) {
			c.M.Add(-n)
			return
		}
	}
}

// Release repays all of it, for good. It may be called more than once, and reports whether it
// was the first time.
func (c *Charge) Release() bool {
	old := c.Held.Swap(-1)
	if old > 0 {
		c.M.Add(-old)
	}
	return old >= 0
}

// Shares is a flow's part of the budget, in each direction.
type Shares struct {
	M        *Memory
	Up, Down Charge
}

// enter charges the guaranteed minimum, or reports that there is no room. Leave repays it.
func (s *Shares) enter(m *Memory) bool {
	s.M, s.Up.M, s.Down.M = m, m, m
	m.Flows.Add(1)
	if !s.Up.Try(FlowMinimum) || !s.Down.Try(FlowMinimum) {
		s.Leave()
		return false
	}
	return true
}

// Leave repays everything. It may be called more than once.
func (s *Shares) Leave() {
	if s.M != nil && s.Up.Release() {
		s.Down.Release()
		s.M.Flows.Add(-1)
	}
}

// MemorySysctl is the budget's name among the settings.
const MemorySysctl = "net.ipv4.tcp_mem"

// memoryPage is the page of net.ipv4.tcp_mem, whatever the machine's.
const memoryPage = 4096

// ParseMemory parses the marks in net.ipv4.tcp_mem's form: low, pressure and high in pages of 4
// KiB.
func ParseMemory(value string) (m MemoryMarks, err error) {
	fields := strings.Fields(value)
	if len(fields) != 3 {
		return m, fmt.Errorf("setting %s: %q is not three numbers of pages: low, pressure, high", MemorySysctl, value)
	}
	var n [3]int64
	for i, f := range fields {
		if n[i], err = strconv.ParseInt(f, 10, 64); err != nil || n[i] < 0 || n[i] > mostMemory/memoryPage {
			return m, fmt.Errorf("setting %s: %q is not a number of pages", MemorySysctl, f)
		}
	}
	m = MemoryMarks{n[0] * memoryPage, n[1] * memoryPage, n[2] * memoryPage}
	if err := m.valid(); err != nil {
		return MemoryMarks{}, fmt.Errorf("setting %s: %w", MemorySysctl, err)
	}
	return m, nil
}

// String returns the form that ParseMemory reads.
func (m MemoryMarks) String() string {
	return fmt.Sprintf("%d %d %d", m.Low/memoryPage, m.Pressure/memoryPage, m.High/memoryPage)
}
