package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/worker"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// destroy is the end of a TCP flow of two seconds.
func destroy(id uint64) nat.Event {
	orig := nat.NewTuple(unix.IPPROTO_TCP, netip.MustParseAddrPort("10.0.2.100:40000"), netip.MustParseAddrPort("192.0.2.1:443"))
	return nat.Event{Type: nat.Destroy, Flow: nat.Flow{
		ID: id, State: nat.TimeWait, Orig: orig,
		Reply:       nat.NewTuple(unix.IPPROTO_TCP, netip.MustParseAddrPort("192.0.2.1:443"), netip.MustParseAddrPort("198.51.100.7:50000")),
		OrigPackets: 3, OrigBytes: 300, ReplyPackets: 4, ReplyBytes: 4000,
		Start: epoch, End: epoch.Add(2 * time.Second), Rule: "egress[0] web", Reason: "closed",
	}}
}

// drain runs the log over the queued events and returns its lines.
func drain(t *testing.T, l *flowlog.FlowLog, out *bytes.Buffer) []api.FlowRecord {
	t.Helper()
	go l.Run()
	l.Close()
	var got []api.FlowRecord
	for line := range strings.Lines(out.String()) {
		var r api.FlowRecord
		testutil.Must(t, json.Unmarshal([]byte(line), &r))
		got = append(got, r)
	}
	return got
}

func testFlowLog(out *bytes.Buffer) *flowlog.FlowLog {
	return flowlog.NewFlowLog(out, func() time.Time { return epoch }, slog.New(slog.DiscardHandler))
}

func TestEndedFlowLeavesOneRecord(t *testing.T) {
	var out bytes.Buffer
	l := testFlowLog(&out)
	l.OnEvent(nat.Event{Type: nat.New})
	l.OnEvent(nat.Event{Type: nat.Update})
	l.OnEvent(destroy(7))
	got := drain(t, l, &out)
	if len(got) != 1 {
		t.Fatalf("%d records, want 1: %s", len(got), out.String())
	}
	r := got[0]
	if r.ID != 7 || r.L4.TCP == nil || r.TrafficDirection != api.Egress || r.Bytes != 4300 || r.Verdict != api.VerdictForwarded || r.Duration != 2 ||
		r.Rule != "egress[0] web" || r.Reason != "closed" || r.State != "TIME_WAIT" ||
		r.Source() != netip.MustParseAddrPort("10.0.2.100:40000") || r.IP.Version != "IPv4" ||
		r.ReplyDestination != netip.MustParseAddrPort("198.51.100.7:50000") ||
		r.Orig != (api.Counter{Packets: 3, Bytes: 300}) || r.Reply != (api.Counter{Packets: 4, Bytes: 4000}) {
		t.Errorf("record %+v", r)
	}
	if ring, _ := l.Ended(); len(ring) != 1 || ring[0].ID != 7 {
		t.Errorf("ring %+v", ring)
	}
}

func TestRefusalsAreRecordedAndTheirRepeatsFolded(t *testing.T) {
	var out bytes.Buffer
	l := testFlowLog(&out)
	src, dst := netip.MustParseAddrPort("10.0.2.100:40000"), netip.MustParseAddrPort("169.254.169.254:80")
	for range 5 {
		l.Refused(forwarder.Refusal{Proto: unix.IPPROTO_TCP, Src: src, Dst: dst, Reason: nat.ReasonPolicy})
	}
	l.Refused(forwarder.Refusal{Proto: unix.IPPROTO_TCP, Src: netip.MustParseAddrPort("10.0.2.100:40001"), Dst: dst, Reason: nat.ReasonPolicy})
	l.Refused(forwarder.Refusal{Proto: unix.IPPROTO_ICMP, Src: netip.MustParseAddrPort("10.0.2.100:99"), Dst: netip.MustParseAddrPort("192.0.2.1:2048"), Reason: nat.ReasonPolicy})
	got := drain(t, l, &out)
	if len(got) != 4 {
		t.Fatalf("%d records, want 4 (two clients, one echo, one for the repeats): %s", len(got), out.String())
	}
	if r := got[0]; r.Verdict != api.VerdictDropped || r.Count != 0 || r.Source().Port() != 40000 || r.DropReasonDesc != api.PolicyDenied || r.Reason != "policy" {
		t.Errorf("first refusal %+v", r)
	}
	if r := got[2]; r.L4.ICMPv4 == nil || *r.L4.ICMPv4 != (api.ICMP{Type: 8, ID: 99}) || r.Source().Port() != 0 {
		t.Errorf("refused echo %+v", r)
	}
	if r := got[3]; r.Count != 4 || r.Source().Port() != 40000 {
		t.Errorf("repeats %+v, want a count of 4", r)
	}
}

func TestFlowLogNeverBlocksAndCountsItsLosses(t *testing.T) {
	var out bytes.Buffer
	l := testFlowLog(&out) // nothing takes from the queue yet
	for i := range flowlog.FlowQueue + 100 {
		l.OnEvent(destroy(uint64(i)))
	}
	if lost := l.Lost.Load(); lost != 100 {
		t.Errorf("%d lost, want 100", lost)
	}
	if got := drain(t, l, &out); len(got) != flowlog.FlowQueue {
		t.Errorf("%d records, want %d", len(got), flowlog.FlowQueue)
	}
	ring, dropped := l.Ended()
	if len(ring) != flowlog.EndedFlows || ring[0].ID != flowlog.FlowQueue-flowlog.EndedFlows || ring[len(ring)-1].ID != flowlog.FlowQueue-1 {
		t.Errorf("ring of %d from %d to %d", len(ring), ring[0].ID, ring[len(ring)-1].ID)
	}
	if dropped != flowlog.FlowQueue-flowlog.EndedFlows+100 {
		t.Errorf("%d dropped, want %d", dropped, flowlog.FlowQueue-flowlog.EndedFlows+100)
	}
}

// fullDisk fails until it has room.
type fullDisk struct {
	mu   sync.Mutex
	room bool
	n    int
}

func (d *fullDisk) Write(b []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.room {
		return 0, unix.ENOSPC
	}
	d.n += bytes.Count(b, []byte("\n"))
	return len(b), nil
}

func TestFlowLogOnAFullDiskSaysSoOnceAndGoesOn(t *testing.T) {
	var said bytes.Buffer
	disk := new(fullDisk)
	l := flowlog.NewFlowLog(disk, time.Now, slog.New(&worker.JournalHandler{W: &said}))
	for i := range 3 {
		l.Take(flowlog.FlowEnd{Flow: destroy(uint64(i + 1)).Flow})
		l.Sink.Flush()
	}
	if got := said.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "<4>") || !strings.Contains(got, unix.ENOSPC.Error()) {
		t.Errorf("said %q, want one warning with the cause", got)
	}
	if n := l.Sink.Unwritten.Load(); n != 3 || len(l.Sink.Buf) != 0 {
		t.Errorf("%d records counted as lost, want 3; %d bytes kept", n, len(l.Sink.Buf))
	}
	disk.room = true
	l.Take(flowlog.FlowEnd{Flow: destroy(9).Flow})
	l.Sink.Flush()
	if disk.n != 1 {
		t.Errorf("%d records written once there was room, want 1", disk.n)
	}
}

func TestLogRing(t *testing.T) {
	l := logring.NewLogRing(func() time.Time { return epoch }, nil)
	for range logring.LogLines + 5 {
		l.Infof("monitor", "line")
	}
	l.Add("error", "worker", "a\x1b[2Jb\nc\rd"+strings.Repeat("é", logring.LogLineLength))
	lines, dropped := l.Last(2)
	if len(lines) != 2 || dropped != 6 {
		t.Fatalf("%d lines, %d dropped", len(lines), dropped)
	}
	if got := lines[1].Text; !strings.HasPrefix(got, "a�[2Jb; c�dé") || !strings.HasSuffix(got, "é…") || len(got) > logring.LogLineLength+8 {
		t.Errorf("line %.20q… of %d bytes", got, len(got))
	}
	old, more, cancel := l.Follow(1)
	defer cancel()
	l.Warnf("monitor", "new")
	if line := <-more; len(old) != 1 || line.Text != "new" || line.Level != "warning" {
		t.Errorf("followed %+v after %+v", line, old)
	}
	for range logring.LogFollowerQueue + 10 { // must not block
		l.Infof("monitor", "flood")
	}
}

func TestJournalLinesAreReadBack(t *testing.T) {
	m := &monitor{log: logring.NewLogRing(time.Now, nil)}
	h := slog.New(&worker.JournalHandler{W: writerFunc(func(b []byte) { m.workerLine(strings.TrimSuffix(string(b), "\n")) })}).With("part", "dns")
	h.Info("up", "n", 1)
	h.Warn("two\nlines")
	h.Error("down")
	h.Debug("not this")
	m.workerLine("goroutine 1 [running]:")
	var got []string
	lines, _ := m.log.Last(0)
	for _, l := range lines {
		got = append(got, l.Level+" "+l.Text)
	}
	want := `info up part="dns" n="1"|warning two; lines part="dns"|error down part="dns"|error goroutine 1 [running]:`
	if strings.Join(got, "|") != want {
		t.Errorf("got  %s\nwant %s", strings.Join(got, "|"), want)
	}
}

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) { f(b); return len(b), nil }

var errTaken = errors.New("taken")

// The cost of a flow's end for the flow log's goroutine, with a log and without.
func BenchmarkEndedFlow(b *testing.B) {
	for name, out := range map[string]io.Writer{"ring": nil, "log": io.Discard} {
		b.Run(name, func(b *testing.B) {
			l := flowlog.NewFlowLog(out, func() time.Time { return epoch }, slog.New(slog.DiscardHandler))
			e := flowlog.FlowEnd{Flow: destroy(7).Flow}
			b.ReportAllocs()
			for b.Loop() {
				l.Take(e)
				if len(l.Sink.Buf) >= flowlog.SinkSize {
					l.Sink.Flush()
				}
			}
		})
	}
}
