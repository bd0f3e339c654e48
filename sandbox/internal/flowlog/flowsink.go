package flowlog

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/channel"
)

// Where the worker's records go.
//
//	records ─► buffer ─► FILE, as many whole records as fit
//	                       └ full: ask the monitor ─► it renames, and hands over the next FILE
//
// The worker cannot open files, so the monitor gives it the next one (flowfile.go). Until the
// answer comes, records wait here, and behind them in the flow log's queue. Both are bounded, and
// records that find no room are counted. If there is no next file, or no answer, the worker
// continues in the file it has and asks again after SinkRetry.
//
// A record is in one file, whole. A record that a full disk has cut in two is completed before
// anything else is written.

const (
	// SinkSize is how much is written at once, and how much may wait for the next file.
	SinkSize = 32 << 10
	// SinkPatience is how long the sink waits for the next file.
	SinkPatience = 2 * time.Second
	// SinkRetry is how long the sink continues in a full file if there is no next one.
	SinkRetry = 10 * time.Second
)

// FlowSink writes records. All methods except Hand belong to the flow log's goroutine.
type FlowSink struct {
	Out  io.Writer // nil without a flow log
	Max  int64     // bytes in a file; 0 means it is never full
	Want func()    // asks for the next file, which comes through Hand
	Now  func() time.Time
	log  *slog.Logger

	Buf    []byte      // whole records, after the rest of one that was cut
	cut    int         // length of that rest
	fresh  bool        // the file was just handed over and has none of our records yet
	asked  bool        // waiting for the next file
	wait   *time.Timer // runs for SinkPatience
	late   time.Time   // until then, a full file is still written to
	Failed bool        // the last write failed

	came chan struct{} // holds a token after Hand was called

	mu      sync.Mutex // guards next and refused, and changes of Out
	next    *os.File
	refused bool // there is no next file

	Written   atomic.Uint64 // records
	Unwritten atomic.Uint64 // records that failed to be written
	Files     atomic.Uint64 // files handed over after the first
	Unrotated atomic.Uint64 // times that there was no next file
}

func NewFlowSink(out io.Writer, now func() time.Time, log *slog.Logger) *FlowSink {
	s := &FlowSink{Out: out, Now: now, log: log, came: make(chan struct{}, 1), wait: time.NewTimer(0)}
	s.wait.Stop()
	return s
}

// Add puts a line into the buffer.
func (s *FlowSink) Add(line []byte) { s.Buf = append(append(s.Buf, line...), '\n') }

// full reports whether nothing more may be added until the next file arrives.
func (s *FlowSink) full() bool { return s.asked && len(s.Buf) >= SinkSize }

// Hand gives the sink the next file and its ownership; nil means that there is no next file. It
// never blocks, so that it does not delay the goroutine that reads the monitor's messages.
func (s *FlowSink) Hand(f *os.File) {
	s.mu.Lock()
	if s.next != nil && f != nil {
		_ = s.next.Close()
	}
	if f != nil {
		s.next = f
	}
	s.refused = s.next == nil
	s.mu.Unlock()
	select {
	case s.came <- struct{}{}:
	default:
	}
}

// writeOn continues in the current file, because there is no next one.
func (s *FlowSink) writeOn() {
	s.asked = false
	s.late = s.Now().Add(SinkRetry)
	s.Unrotated.Add(1)
}

// impatient is called when wait has expired.
func (s *FlowSink) impatient() {
	if s.asked {
		s.writeOn()
		s.Flush()
	}
}

// Change takes the file that Hand left.
func (s *FlowSink) Change() {
	s.mu.Lock()
	f, refused := s.next, s.refused
	s.next, s.refused = nil, false
	s.mu.Unlock()
	if f == nil {
		if refused && s.asked {
			s.writeOn()
		}
		return
	}
	if s.cut > 0 { // its beginning is in the file being left
		s.put(s.cut)
		if s.cut > 0 {
			s.Buf, s.cut = s.Buf[s.cut:], 0
			s.Unwritten.Add(1)
		}
	}
	if old, ok := s.Out.(io.Closer); ok {
		_ = old.Close()
	}
	s.mu.Lock()
	s.Out = f
	s.mu.Unlock()
	s.fresh, s.asked, s.late = true, false, time.Time{}
	s.Files.Add(1)
}

// Flush writes what is buffered, as far as there is room. Records that cannot be written are lost
// and counted: a full disk must not make the worker grow.
func (s *FlowSink) Flush() {
	s.Change()
	for len(s.Buf) > 0 && !s.asked {
		n := s.fits()
		if n == 0 {
			s.asked = true
			s.wait.Reset(SinkPatience)
			s.Want()
			return
		}
		if s.put(n); s.Failed {
			s.Unwritten.Add(lines(s.Buf[s.cut:]))
			s.Buf = s.Buf[:s.cut]
			return
		}
	}
}

// Settle is a Flush that waits for the next files.
func (s *FlowSink) Settle() {
	for s.Flush(); s.asked; {
		select {
		case <-s.came:
			s.Flush()
		case <-s.wait.C:
			s.impatient()
		}
	}
}

// end writes everything that is left.
func (s *FlowSink) end() {
	if s.Settle(); s.cut > 0 {
		s.Unwritten.Add(1)
	}
}

// fits returns how many bytes of the buffer fit into the file, in whole records. An empty or newly
// handed file takes at least one record.
func (s *FlowSink) fits() int {
	if s.Max == 0 || s.Now().Before(s.late) {
		return len(s.Buf)
	}
	size, gone := s.stat()
	room := max(0, min(s.Max-size, int64(len(s.Buf))))
	switch n := bytes.LastIndexByte(s.Buf[:room], '\n') + 1; {
	case gone && !s.fresh:
		return 0
	case n > 0:
		return n
	case size == 0 || s.fresh || s.cut > 0:
		return bytes.IndexByte(s.Buf, '\n') + 1
	}
	return 0
}

// stat returns the file's size, and whether the file has lost its name: several sandboxes may share
// it, and each of them rotates it.
func (s *FlowSink) stat() (size int64, gone bool) {
	f, ok := s.Out.(*os.File)
	if !ok {
		return 0, false
	}
	var st unix.Stat_t
	if unix.Fstat(channel.FDOf(f), &st) != nil {
		return 0, false
	}
	return st.Size, st.Nlink == 0
}

// put writes n bytes of the buffer, which are whole records. If it fails, it keeps the rest of the
// record that was cut, and drops the ones after it.
func (s *FlowSink) put(n int) {
	part := s.Buf[:n]
	done, err := s.Out.Write(part)
	s.Written.Add(lines(part[:done]))
	rest := part[done:]
	if err != nil {
		if done > 0 && part[done-1] != '\n' || done == 0 && s.cut > 0 {
			s.cut = bytes.IndexByte(rest, '\n') + 1
		} else {
			s.cut = 0
		}
		s.Unwritten.Add(lines(rest[s.cut:]))
		if !s.Failed {
			s.log.Warn(fmt.Sprintf("the flow log cannot be written, records are lost: %v", err))
		}
		s.Buf = append(rest[:s.cut:s.cut], s.Buf[n:]...)
	} else {
		if s.Failed {
			s.log.Info("the flow log can be written again")
		}
		s.cut, s.fresh = 0, false
		s.Buf = append(s.Buf[:0], s.Buf[n:]...)
	}
	s.Failed = err != nil
}

// hurry bounds the time for the remaining writes; it is called from another goroutine. A pipe that
// nobody reads must not keep alive a worker that was told to end.
func (s *FlowSink) hurry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.Out.(*os.File); ok {
		_ = f.SetWriteDeadline(time.Now().Add(SinkPatience)) // files have no deadline
	}
}

func lines(b []byte) uint64 { return uint64(bytes.Count(b, []byte{'\n'})) }
