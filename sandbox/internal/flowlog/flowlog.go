package flowlog

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
)

// What becomes of a flow when it is over.
//
//	nat.Table, forwarder ──► queue (bounded) ──► one goroutine ──► ring of the last
//	  ended, refused          full: counted                        └► flow log, one
//	                                                                  JSON line each
//
// The packet path only puts a small value on the queue, or counts a loss. Only that goroutine feels
// the rest: encoding, and a slow or full disk.
//
// A refused flow leaves one record at once. Its repeats (a SYN's retransmissions, a client that
// tries again from the same port) are counted, and reported in one more record after foldFor.

const (
	FlowQueue  = 8192
	EndedFlows = 4096 // how far `flows --ended` and --show-flows can look back
	foldFor    = 10 * time.Second
	maxFolds   = 1024 // refusals being counted; any more get a record each
	// flowLogRest is how long the queue is left alone after it was emptied, so that flows that end
	// in quick succession do not each wake a goroutine.
	flowLogRest = 20 * time.Millisecond
)

// FlowEnd is a flow that ended, one that was refused (it has no ID), or a question that the
// resolver decided.
type FlowEnd struct {
	Flow     nat.Flow
	fate     fate
	because  policy.Reason // from forwarder.Refusal.Because
	told     bool          // the side that began it was told of the refusal
	question *dns.Event
}

// foldKey identifies the repeats of one refusal.
type foldKey struct {
	tuple   nat.Tuple
	ingress bool
}

// fold is a refusal whose repeats are being counted.
type fold struct {
	record api.FlowRecord
	more   uint64
	until  time.Time
}

// FlowLog turns ended flows into records.
type FlowLog struct {
	Sink   *FlowSink
	Logged bool // whether there is a flow log
	Now    func() time.Time
	// Set before Run, if at all.
	Names     func(netip.Addr) []string // the names that an address is granted under
	Policy    func() string             // the name of the policy in force
	Resolvers []netip.Addr              // the servers that the sandbox asks; only the first of each family is used

	queue chan FlowEnd
	stop  chan struct{} // closed by Close
	done  chan struct{} // closed by Run
	Lost  atomic.Uint64 // the queue was full

	mu      sync.Mutex // guards the ring
	ring    []api.FlowRecord
	next    int
	dropped uint64

	// Owned by Run.
	folds map[foldKey]*fold
}

func NewFlowLog(out io.Writer, now func() time.Time, log *slog.Logger) *FlowLog {
	return &FlowLog{
		Sink: NewFlowSink(out, now, log), Logged: out != nil, Now: now,
		queue: make(chan FlowEnd, FlowQueue), stop: make(chan struct{}), done: make(chan struct{}),
		folds: make(map[foldKey]*fold),
	}
}

// OnEvent implements nat.Config.OnEvent.
func (l *FlowLog) OnEvent(e nat.Event) {
	if e.Type != nat.Destroy {
		return
	}
	end := FlowEnd{Flow: e.Flow, fate: fateOf(&e.Flow)}
	if end.fate == refused && e.Flow.Reason != nat.ReasonPolicy {
		return // its first bytes were refused, and recorded then
	}
	l.put(end)
}

// Refused implements forwarder.Config.Refused.
func (l *FlowLog) Refused(r forwarder.Refusal) {
	now, v := l.Now(), r.Verdict
	l.put(FlowEnd{fate: refused, because: r.Because, told: r.Told, Flow: nat.Flow{
		Orig: nat.NewTuple(r.Proto, r.Src, r.Dst), Ingress: r.Ingress, Rule: v.Rule(), Reason: r.Reason, Start: now, End: now,
		About: forwarder.About{Verdict: v, Seen: r.Seen},
	}})
}

func (l *FlowLog) put(e FlowEnd) {
	select {
	case l.queue <- e:
	default:
		l.Lost.Add(1)
	}
}

// Close waits until everything queued before is written.
func (l *FlowLog) Close() {
	l.Sink.hurry()
	close(l.stop)
	<-l.done
}

// Run writes the records until Close. It runs in a goroutine of its own.
func (l *FlowLog) Run() {
	defer close(l.done)
	// Ticks only while refusals are folded, so that an idle worker does not wake up.
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	tick.Stop()
	rest := time.NewTimer(0)
	defer rest.Stop()
	resting := false
	for {
		queue := l.queue
		if resting || l.Sink.full() {
			queue = nil
		}
		select {
		case e := <-queue:
			before := len(l.folds)
			l.Take(e)
			if before == 0 && len(l.folds) > 0 {
				tick.Reset(time.Second)
			}
			if len(l.queue) == 0 || len(l.Sink.Buf) >= SinkSize {
				l.Sink.Flush()
			}
			if len(l.queue) == 0 {
				resting = true
				rest.Reset(flowLogRest)
			}
		case <-rest.C:
			resting = false
		case <-l.Sink.came:
			l.Sink.Flush()
		case <-l.Sink.wait.C:
			l.Sink.impatient()
		case <-tick.C:
			l.unfold(l.Now())
			l.Sink.Flush()
			if len(l.folds) == 0 {
				tick.Stop()
			}
		case <-l.stop:
			for len(l.queue) > 0 { // only this goroutine takes from it
				l.Take(<-l.queue)
				if len(l.Sink.Buf) >= SinkSize {
					l.Sink.Settle()
				}
			}
			l.unfold(time.Time{})
			l.Sink.end()
			return
		}
	}
}

func (l *FlowLog) Take(e FlowEnd) {
	if e.question != nil {
		r := l.questionRecord(e.question, e.Flow.End)
		if e.question.Forwarded {
			l.write(r)
		} else {
			l.add(r)
		}
		return
	}
	r := l.record(e)
	if e.Flow.ID != 0 {
		l.add(r)
		return
	}
	key := foldKey{e.Flow.Orig, e.Flow.Ingress}
	if f := l.folds[key]; f != nil && f.record.Rule == r.Rule && f.record.Reason == r.Reason {
		f.more++
		return
	}
	l.add(r)
	if len(l.folds) < maxFolds {
		l.folds[key] = &fold{record: r, until: l.Now().Add(foldFor)}
	}
}

// unfold reports the repeats of refusals that were due before now. A zero time means all of them.
func (l *FlowLog) unfold(now time.Time) {
	for key, f := range l.folds {
		if !now.IsZero() && now.Before(f.until) {
			continue
		}
		delete(l.folds, key)
		if f.more > 0 {
			f.record.Time, f.record.Count = l.Now(), f.more
			f.record.Duration = f.record.Time.Sub(f.record.Start).Seconds()
			l.add(f.record)
		}
	}
}

// add adds a record to the ring and to the log.
func (l *FlowLog) add(r api.FlowRecord) {
	l.mu.Lock()
	if len(l.ring) < EndedFlows {
		l.ring = append(l.ring, r)
	} else {
		l.ring[l.next] = r
		l.next = (l.next + 1) % EndedFlows
		l.dropped++
	}
	l.mu.Unlock()
	l.write(r)
}

// write adds a record to the log's buffer.
func (l *FlowLog) write(r api.FlowRecord) {
	if !l.Logged {
		return
	}
	line, err := json.Marshal(r)
	if err != nil {
		l.Sink.Unwritten.Add(1)
		return
	}
	l.Sink.Add(line)
}

// logStats are a worker's counters of its flow log. Each record is either lost, written or
// unwritten, or still in the buffer.
type logStats struct {
	Lost      uint64 `json:"lost"`      // ends of flows that left no record, because the queue was full
	Written   uint64 `json:"written"`   // records
	Unwritten uint64 `json:"unwritten"` // records that failed to be written
	Files     uint64 `json:"files"`     // times that the next file was begun
	Unrotated uint64 `json:"unrotated"` // times that there was no next file
}

func (l *FlowLog) Stats() logStats {
	s := l.Sink
	return logStats{l.Lost.Load(), s.Written.Load(), s.Unwritten.Load(), s.Files.Load(), s.Unrotated.Load()}
}

// Ended returns the records in the ring, oldest first.
func (l *FlowLog) Ended() ([]api.FlowRecord, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]api.FlowRecord, 0, len(l.ring))
	out = append(out, l.ring[l.next:]...)
	return append(out, l.ring[:l.next]...), l.dropped + l.Lost.Load()
}
