package nat

// Stats are the table's gauges and counters. Counters only grow.
type Stats struct {
	Count        int `json:"count"` // nf_conntrack_count
	Max          int `json:"max"`   // nf_conntrack_max
	HalfOpen     int `json:"halfOpen"`
	Destinations int `json:"destinations"` // far addresses that the sandbox has a flow to

	Created   uint64 `json:"created"`
	Released  uint64 `json:"released"`  // ended by their owner
	TimedOut  uint64 `json:"timedOut"`  // ended by their timeout
	EarlyDrop uint64 `json:"earlyDrop"` // ended to make room for a new flow
	OverBytes uint64 `json:"overBytes"` // ended because a byte budget was used up
	Killed    uint64 `json:"killed"`    // ended by Kill, for another reason

	TableFull       uint64 `json:"tableFull"` // refused, by reason
	DestLimit       uint64 `json:"destLimit"`
	RateLimit       uint64 `json:"rateLimit"`
	HalfOpenLimit   uint64 `json:"halfOpenLimit"`
	TotalBytesLimit uint64 `json:"totalBytesLimit"`
	BudgetLimit     uint64 `json:"budgetLimit"` // by a rule's limits
	Exists          uint64 `json:"exists"`

	EventsLost uint64 `json:"eventsLost"`

	OrigPackets  int64 `json:"origPackets"` // of all flows, ended ones included
	OrigBytes    int64 `json:"origBytes"`
	ReplyPackets int64 `json:"replyPackets"`
	ReplyBytes   int64 `json:"replyBytes"`
}

func (s *Stats) count(reason Reason, byTable bool) {
	if !byTable {
		s.Released++
		return
	}
	switch reason {
	case ReasonTimeout:
		s.TimedOut++
	case ReasonEarlyDrop:
		s.EarlyDrop++
	case ReasonTotalBytes, ReasonBudgetBytes:
		s.OverBytes++
	default:
		s.Killed++
	}
}

// Stats returns the current statistics. It visits every flow, for the bytes carried.
func (t *Table) Stats() Stats {
	t.mu.RLock()
	defer t.mu.RUnlock()
	s := t.stats
	s.Count, s.Max, s.HalfOpen, s.Destinations = len(t.byTuple), t.limits.Max, t.halfOpen, len(t.perDest)
	s.EventsLost = t.subs.lost.Load()
	sum := t.carried()
	s.OrigPackets, s.OrigBytes = sum[Original].packets, sum[Original].bytes
	s.ReplyPackets, s.ReplyBytes = sum[Reply].packets, sum[Reply].bytes
	return s
}
