package nat

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// maxEvictions bounds the evictions of one Acquire. One is enough unless other goroutines take the
// room first, or Max was lowered below the current count.
const maxEvictions = 8

// Config configures a Table. The zero Config is useful.
type Config struct {
	Limits   Limits
	Timeouts Timeouts
	Now      func() time.Time // nil: time.Now

	// OnEvent is called for every event, in order for each flow. Unlike a subscriber it loses none,
	// which a flow log needs. It must not block for long and must not call the methods of Lease:
	// the event contains the flow.
	OnEvent func(Event)
}

// Spec describes a new flow.
type Spec struct {
	Orig    Tuple
	Rule    string   // the policy rule that admitted it
	Names   []string // names of the far side, if known
	About   any      // opaque data of the owner; returned in Flow
	Owner   any      // who began the flow; returned by Lease.Owner
	Ingress bool     // a flow towards the container: Orig.Src is the far side
	// Forwarded means that the flow's packets pass through, and both ends are elsewhere. The ends
	// bound the handshake themselves: it is not charged to Limits.HalfOpen. As in the kernel, such
	// a flow may be evicted until it is ASSURED, answered or not; otherwise a flood from outside
	// could fill the table.
	Forwarded bool
	Budget    *Budget // in addition to the table's limits; may be nil
	Short     bool    // UDP with one question and one answer: Timeouts.UDPShort, never ASSURED, until Lease.Outlast

	// Pending is called before the table ends the flow for being idle. The owner accounts for
	// traffic not yet accounted for, and reports whether it holds bytes that one side has yet to
	// take; if so, the timeout restarts. It is called without locks held. A nil Pending returns
	// false.
	Pending func() bool

	// Expire is called once when the table ends the flow (timeout, early drop, byte budget, Kill),
	// without locks held and after its budgets are repaid. It is not called after Release. It may
	// run on any goroutine that calls the table.
	Expire func(reason Reason)
}

// Table is the flow table of a sandbox. Its methods may be called from any goroutine.
type Table struct {
	epoch   time.Time
	nowFunc func() time.Time // nil: the monotonic clock since epoch
	cached  atomic.Int64     // see Run; 0: ask the clock
	busy    atomic.Bool      // some flow saw a packet since the last expire
	wake    chan struct{}    // holds one token: Run must look again

	timeouts  atomic.Pointer[Timeouts]
	budget    atomic.Int64 // Limits.TotalBytes
	overspent atomic.Bool  // some Budget's bytes were used up since the last expire
	used      atomic.Int64 // bytes charged to budget; maintained only while there is one
	onEvent   func(Event)
	subs      subscribers

	mu       sync.RWMutex // the rest
	limits   Limits
	rate     bucket
	byTuple  map[Tuple]*Lease
	perDest  map[[16]byte]int
	halfOpen int
	wheel    wheel
	wakeAt   int64 // the grain at which Expire will be called again
	over     list  // evictable: TIME_WAIT and CLOSE, oldest first
	mute     list  // evictable: never answered, oldest first
	lastID   uint64
	ended    counters // totals of ended flows
	stats    Stats    // only its event counters are used
}

// NewTable returns an empty table.
func NewTable(cfg Config) *Table {
	t := &Table{
		nowFunc: cfg.Now, onEvent: cfg.OnEvent, limits: cfg.Limits.orDefault(), wakeAt: never,
		byTuple: make(map[Tuple]*Lease), perDest: make(map[[16]byte]int), wake: make(chan struct{}, 1),
	}
	if t.nowFunc != nil {
		t.epoch = t.nowFunc().Add(-1) // so that no time is 0, which cached reserves
	} else {
		t.epoch = time.Now().Add(-1)
	}
	t.over.kind, t.mute.kind = inOver, inMute
	t.rate.rate = t.limits.NewPerSecond
	t.budget.Store(t.limits.TotalBytes)
	t.timeouts.Store(cfg.Timeouts.orDefault())
	return t
}

// clock returns nanoseconds since the table was made. time.Since reads only the monotonic clock,
// which costs half of time.Now.
func (t *Table) clock() int64 {
	if t.nowFunc != nil {
		return int64(t.nowFunc().Sub(t.epoch))
	}
	return int64(time.Since(t.epoch))
}

// Acquire admits a new flow and charges the budgets, or returns the budget that is exhausted. If
// the table is full, it ends the oldest flow that is over or was never answered; if there is none,
// it refuses the new one (RFC 6888 REQ-4). Release, or the table itself, ends the lease.
func (t *Table) Acquire(s Spec) (*Lease, error) {
	now := t.clock()
	l := &Lease{table: t, spec: s, reply: s.Orig.Reverse(), began: now}
	l.short.Store(s.Short)
	l.seen.Store(now)
	l.status.Store(uint32(initialStatus(s.Orig.proto)))
	for range maxEvictions {
		l.mu.Lock() // NEW must come before any other event of l
		t.mu.Lock()
		victim, err := t.admit(l, now)
		t.mu.Unlock()
		if victim == nil {
			if err == nil {
				t.emit(New, l)
			}
			l.mu.Unlock()
			if err != nil {
				return nil, err
			}
			return l, nil
		}
		l.mu.Unlock()
		victim.end(now, ReasonEarlyDrop, true, func(s status, _ int64) bool { return victim.evictable(s) })
	}
	t.mu.Lock()
	t.stats.TableFull++
	t.mu.Unlock()
	return nil, ErrTableFull
}

func initialStatus(proto uint8) status {
	if proto == protoTCP {
		return status(SynSent)
	}
	return status(Unreplied)
}

// admit puts l into the table, or returns the flow to evict first, or an error. t.mu is held.
func (t *Table) admit(l *Lease, now int64) (victim *Lease, err error) {
	orig := l.spec.Orig
	full := len(t.byTuple) >= t.limits.Max
	halfOpen := l.load().state().halfOpen() && !l.spec.Forwarded
	switch {
	case t.byTuple[orig] != nil:
		t.stats.Exists++
		return nil, ErrExists
	case t.exhausted():
		t.stats.TotalBytesLimit++
		return nil, ErrTotalBytes
	case !l.spec.Ingress && t.limits.PerDestination > 0 && t.perDest[orig.dst] >= t.limits.PerDestination:
		t.stats.DestLimit++
		return nil, ErrDestLimit
	case halfOpen && t.halfOpen >= t.limits.HalfOpen:
		t.stats.HalfOpenLimit++
		return nil, ErrHalfOpen
	case full && t.over.first != nil:
		return t.over.first, nil
	case full && t.mute.first != nil:
		return t.mute.first, nil
	case full:
		t.stats.TableFull++
		return nil, ErrTableFull
	case !t.rate.take(now):
		t.stats.RateLimit++
		return nil, ErrRate
	}
	if err := t.room(l.spec.Budget, now); err != nil {
		return nil, err
	}
	l.recharge(l.spec.Budget)
	t.lastID++
	l.id = t.lastID
	t.byTuple[orig] = l
	if !l.spec.Ingress {
		t.perDest[orig.dst]++
	}
	t.stats.Created++
	t.place(l)
	return nil, nil
}

// place updates the wheel, the eviction lists and the half-open count for l's status. t.mu is held
// and l is in the table.
func (t *Table) place(l *Lease) {
	s := l.load()
	t.arm(l, l.deadline())
	switch {
	case s.state().closing():
		t.file(l, &t.over)
	case l.evictable(s):
		t.file(l, &t.mute)
	default:
		t.file(l, nil)
	}
	if half := l.spec.Orig.proto == protoTCP && s.state().halfOpen() && !l.spec.Forwarded; half != l.halfOpen {
		l.halfOpen = half
		if half {
			t.halfOpen++
		} else {
			t.halfOpen--
		}
	}
}

// arm sets l's timer, and wakes the owner of Expire if it would sleep past it.
func (t *Table) arm(l *Lease, deadline int64) {
	d := grainAt(deadline)
	if l.timer.armed && l.timer.due <= d {
		return // it rings early and is armed again then
	}
	t.wheel.arm(l, d)
	if d < t.wakeAt {
		t.wakeAt = d
		t.rouse()
	}
}

// rouse makes Run look again. It never blocks: one token is enough.
func (t *Table) rouse() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// file moves l to an eviction list.
func (t *Table) file(l *Lease, to *list) {
	if to != nil && l.listed == to.kind {
		return
	}
	switch l.listed {
	case inOver:
		t.over.remove(l)
	case inMute:
		t.mute.remove(l)
	}
	if to != nil {
		to.append(l)
	}
}

// remove repays everything that admit and place charged. t.mu is held.
func (t *Table) remove(l *Lease) {
	orig := l.spec.Orig
	delete(t.byTuple, orig)
	l.recharge(nil)
	if !l.spec.Ingress {
		if t.perDest[orig.dst]--; t.perDest[orig.dst] == 0 {
			delete(t.perDest, orig.dst)
		}
	}
	if l.halfOpen {
		l.halfOpen = false
		t.halfOpen--
	}
	t.file(l, nil)
	t.wheel.disarm(l)
	t.ended.add(l)
}

// exhausted reports whether the byte budget is used up.
func (t *Table) exhausted() bool {
	budget := t.budget.Load()
	return budget > 0 && t.used.Load() >= budget
}

// Lookup finds the flow that was acquired with exactly this original tuple, or nil. For a packet of
// the other direction, look up its Reverse.
func (t *Table) Lookup(orig Tuple) *Lease {
	t.mu.RLock()
	l := t.byTuple[orig]
	t.mu.RUnlock()
	return l
}

// Len returns nf_conntrack_count.
func (t *Table) Len() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.byTuple)
}

// Leases returns the current flows, oldest first, for callers that judge each again, as under a new
// policy.
func (t *Table) Leases() []*Lease {
	t.mu.RLock()
	all := make([]*Lease, 0, len(t.byTuple))
	for _, l := range t.byTuple {
		all = append(all, l)
	}
	t.mu.RUnlock()
	slices.SortFunc(all, func(a, b *Lease) int { return cmp.Compare(a.id, b.id) })
	return all
}

// List returns a snapshot of every flow, oldest first.
func (t *Table) List() []Flow {
	leases := t.Leases()
	flows := make([]Flow, len(leases))
	for i, l := range leases {
		flows[i] = l.Snapshot()
	}
	return flows
}

// Limits returns the budgets in force.
func (t *Table) Limits() Limits {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.limits
}

// SetLimits changes the budgets. Existing flows stay, whatever the new limits, except when a byte
// budget is exhausted: then they end at the next Expire.
func (t *Table) SetLimits(l Limits) {
	l = l.orDefault()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.limits, t.rate.rate = l, l.NewPerSecond
	t.used.Store(t.carried().bytes())
	t.budget.Store(l.TotalBytes)
	if t.exhausted() {
		t.rouse()
	}
}

// carried returns the totals of all flows, ended ones included. t.mu is held, at least for reading.
func (t *Table) carried() counters {
	sum := t.ended
	for _, l := range t.byTuple {
		sum.add(l)
	}
	return sum
}

// Timeouts returns the timeouts in force.
func (t *Table) Timeouts() Timeouts { return *t.timeouts.Load() }

// SetTimeouts changes the timeouts, also of existing flows. The kernel's apply from a flow's next
// packet.
func (t *Table) SetTimeouts(to Timeouts) {
	t.timeouts.Store(to.orDefault())
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.byTuple {
		t.arm(l, l.deadline())
	}
}
