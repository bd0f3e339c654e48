package sandbox

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sluice/forwarder"
	"sluice/forwarder/dns"
	"sluice/forwarder/sandbox/api"
	"sluice/nat"
	"sluice/policy"
)

// What becomes of a flow when it is over.
//
//	nat.Table, forwarder ──► queue (bounded) ──► one goroutine ──► ring of the last
//	  ended, refused          full: counted                        └► flow log, one
//	                                                                  JSON line each
//
// The packet path only puts a small value on the queue, or counts a loss. All
// else, encoding and a disk that is slow or full, is felt by that goroutine
// alone.
//
// A refused flow leaves one record at once. Its repeats (a SYN's
// retransmissions, a client that tries again from the same port) are counted
// and told in one more record when foldFor has passed.

const (
	flowQueue  = 8192
	endedFlows = 4096 // what `flows --ended` and --show-flows can look back on
	foldFor    = 10 * time.Second
	maxFolds   = 1024 // refusals being counted; beyond it each has its own record
	// flowLogRest is how long the queue is left alone after it was emptied, so that
	// flows which end in quick succession do not wake a goroutine each.
	flowLogRest = 20 * time.Millisecond
)

// flowEnd is a flow that is over: ended, or refused if it has no ID. Or it is a
// question that the resolver decided.
type flowEnd struct {
	flow     nat.Flow
	fate     fate
	because  policy.Reason // forwarder.Refusal.Because
	told     bool          // whoever began it was told that it is refused
	question *dns.Event
}

// foldKey identifies repeats of one refusal.
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

// flowLog turns ended flows into records.
type flowLog struct {
	sink   *flowSink
	logged bool // there is a flow log
	now    func() time.Time
	// Set before run, if at all.
	names     func(netip.Addr) []string // under which an address is granted
	policy    func() string             // the name of the one in force
	resolvers []netip.Addr              // whom the sandbox asks; the first of a family counts

	queue chan flowEnd
	stop  chan struct{} // closed by close
	done  chan struct{} // closed by run
	lost  atomic.Uint64 // no room in the queue

	mu      sync.Mutex // guards the ring
	ring    []api.FlowRecord
	next    int
	dropped uint64

	// The goroutine's own.
	folds map[foldKey]*fold
}

func newFlowLog(out io.Writer, now func() time.Time, log *slog.Logger) *flowLog {
	return &flowLog{
		sink: newFlowSink(out, now, log), logged: out != nil, now: now,
		queue: make(chan flowEnd, flowQueue), stop: make(chan struct{}), done: make(chan struct{}),
		folds: make(map[foldKey]*fold),
	}
}

// onEvent is nat.Config.OnEvent.
func (l *flowLog) onEvent(e nat.Event) {
	if e.Type != nat.Destroy {
		return
	}
	end := flowEnd{flow: e.Flow, fate: fateOf(&e.Flow)}
	if end.fate == refused && e.Flow.Reason != nat.ReasonPolicy {
		return // for its first bytes, of which there is a record
	}
	l.put(end)
}

// refused is forwarder.Config.Refused.
func (l *flowLog) refused(r forwarder.Refusal) {
	now, v := l.now(), r.Verdict
	l.put(flowEnd{fate: refused, because: r.Because, told: r.Told, flow: nat.Flow{
		Orig: nat.NewTuple(r.Proto, r.Src, r.Dst), Ingress: r.Ingress, Rule: v.Rule(), Reason: r.Reason, Start: now, End: now,
		About: forwarder.About{Verdict: v, Seen: r.Seen},
	}})
}

func (l *flowLog) put(e flowEnd) {
	select {
	case l.queue <- e:
	default:
		l.lost.Add(1)
	}
}

// close waits until everything put before it is written.
func (l *flowLog) close() {
	l.sink.hurry()
	close(l.stop)
	<-l.done
}

// run is the goroutine; it ends with close.
func (l *flowLog) run() {
	defer close(l.done)
	// Runs only while refusals are folded: an idle worker does not wake up.
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	tick.Stop()
	rest := time.NewTimer(0)
	defer rest.Stop()
	resting := false
	for {
		queue := l.queue
		if resting || l.sink.full() {
			queue = nil
		}
		select {
		case e := <-queue:
			before := len(l.folds)
			l.take(e)
			if before == 0 && len(l.folds) > 0 {
				tick.Reset(time.Second)
			}
			if len(l.queue) == 0 || len(l.sink.buf) >= sinkSize {
				l.sink.flush()
			}
			if len(l.queue) == 0 {
				resting = true
				rest.Reset(flowLogRest)
			}
		case <-rest.C:
			resting = false
		case <-l.sink.came:
			l.sink.flush()
		case <-l.sink.wait.C:
			l.sink.impatient()
		case <-tick.C:
			l.unfold(l.now())
			l.sink.flush()
			if len(l.folds) == 0 {
				tick.Stop()
			}
		case <-l.stop:
			for len(l.queue) > 0 { // this goroutine alone takes from it
				l.take(<-l.queue)
				if len(l.sink.buf) >= sinkSize {
					l.sink.settle()
				}
			}
			l.unfold(time.Time{})
			l.sink.end()
			return
		}
	}
}

func (l *flowLog) take(e flowEnd) {
	if e.question != nil {
		r := l.questionRecord(e.question, e.flow.End)
		if e.question.Forwarded {
			l.write(r)
		} else {
			l.add(r)
		}
		return
	}
	r := l.record(e)
	if e.flow.ID != 0 {
		l.add(r)
		return
	}
	key := foldKey{e.flow.Orig, e.flow.Ingress}
	if f := l.folds[key]; f != nil && f.record.Rule == r.Rule && f.record.Reason == r.Reason {
		f.more++
		return
	}
	l.add(r)
	if len(l.folds) < maxFolds {
		l.folds[key] = &fold{record: r, until: l.now().Add(foldFor)}
	}
}

// unfold tells the repeats of refusals that were due before now; the zero time
// means all.
func (l *flowLog) unfold(now time.Time) {
	for key, f := range l.folds {
		if !now.IsZero() && now.Before(f.until) {
			continue
		}
		delete(l.folds, key)
		if f.more > 0 {
			f.record.Time, f.record.Count = l.now(), f.more
			f.record.Duration = f.record.Time.Sub(f.record.Start).Seconds()
			l.add(f.record)
		}
	}
}

// add puts a record in the ring and in the log.
func (l *flowLog) add(r api.FlowRecord) {
	l.mu.Lock()
	if len(l.ring) < endedFlows {
		l.ring = append(l.ring, r)
	} else {
		l.ring[l.next] = r
		l.next = (l.next + 1) % endedFlows
		l.dropped++
	}
	l.mu.Unlock()
	l.write(r)
}

// write puts a record in the log's buffer.
func (l *flowLog) write(r api.FlowRecord) {
	if !l.logged {
		return
	}
	line, err := json.Marshal(r)
	if err != nil {
		l.sink.unwritten.Add(1)
		return
	}
	l.sink.add(line)
}

// logStats are a worker's counters of its flow log. Each record that is made is lost,
// written or unwritten, or still in the buffer.
type logStats struct {
	Lost      uint64 `json:"lost"`      // ends of flows that no record was made of: the queue was full
	Written   uint64 `json:"written"`   // records
	Unwritten uint64 `json:"unwritten"` // records that could not be written
	Files     uint64 `json:"files"`     // times that the next file was begun
	Unrotated uint64 `json:"unrotated"` // times that it could not be
}

func (l *flowLog) stats() logStats {
	s := l.sink
	return logStats{l.lost.Load(), s.written.Load(), s.unwritten.Load(), s.files.Load(), s.unrotated.Load()}
}

// ended returns the ring's records, oldest first.
func (l *flowLog) ended() ([]api.FlowRecord, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]api.FlowRecord, 0, len(l.ring))
	out = append(out, l.ring[l.next:]...)
	return append(out, l.ring[:l.next]...), l.dropped + l.lost.Load()
}
