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
// The worker can open nothing, so the monitor changes the file under it (flowfile.go).
// Until the answer comes the records wait here, and behind them in the flow log's queue:
// both are bounded, and what finds no room is counted. A worker that is told that there
// is no next file, or that hears nothing, writes on in the one it has and asks again
// after SinkRetry.
//
// A record is in one file, whole. What a full disk has cut in two is completed before
// anything else is written.

const (
	// SinkSize is how much is written at once, and how much waits for the next file.
	SinkSize = 32 << 10
	// SinkPatience is how long the next file is waited for.
	SinkPatience = 2 * time.Second
	// SinkRetry is how long a file that is full is written on when there was no next one.
	SinkRetry = 10 * time.Second
)

// FlowSink writes records. Its methods are the flow log's goroutine's, but for hand.
type FlowSink struct {
	Out  io.Writer // nil without a flow log
	Max  int64     // bytes of a file; 0: it is never full
	Want func()    // asks for the next file; it is given to hand
	Now  func() time.Time
	log  *slog.Logger

	Buf    []byte      // whole records, behind the rest of one that was cut
	cut    int         // bytes of that rest
	fresh  bool        // the file was handed over and has none of our records yet
	asked  bool        // the next file is awaited
	wait   *time.Timer // for as long as SinkPatience
	late   time.Time   // until then a full file is written on
	Failed bool        // the last write did

	came chan struct{} // holds a token when hand was called

	mu      sync.Mutex // guards next and refused, and changes of out
	next    *os.File
	refused bool // there is no next file

	Written   atomic.Uint64 // records
	Unwritten atomic.Uint64 // records that could not be
	Files     atomic.Uint64 // that were handed over after the first
	Unrotated atomic.Uint64 // times that there was no next file
}

func NewFlowSink(out io.Writer, now func() time.Time, log *slog.Logger) *FlowSink {
	s := &FlowSink{Out: out, Now: now, log: log, came: make(chan struct{}, 1), wait: time.NewTimer(0)}
	s.wait.Stop()
	return s
}

// Add puts a line into the buffer.
func (s *FlowSink) Add(line []byte) { s.Buf = append(append(s.Buf, line...), '\n') }

// full says that nothing more is to be added before the next file is there.
func (s *FlowSink) full() bool { return s.asked && len(s.Buf) >= SinkSize }

// Hand gives the next file, which is the sink's from here on; nil means that there is
// none. It never waits, so that whoever reads the monitor's messages does not.
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

// writeOn is for want of a next file.
func (s *FlowSink) writeOn() {
	s.asked = false
	s.late = s.Now().Add(SinkRetry)
	s.Unrotated.Add(1)
}

// impatient is called when wait is over.
func (s *FlowSink) impatient() {
	if s.asked {
		s.writeOn()
		s.Flush()
	}
}

// Change takes over what hand left.
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
	if s.cut > 0 { // its beginning is in the file that we leave
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

// Flush writes what is buffered, as far as there is room. What cannot be written is lost
// and counted: a full disk must not grow the worker.
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

// Settle is flush that waits for the next files.
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

// end writes all that is left.
func (s *FlowSink) end() {
	if s.Settle(); s.cut > 0 {
		s.Unwritten.Add(1)
	}
}

// fits says how many bytes of the buffer the file has room for, in whole records. A file
// that was just handed over, or is empty, takes one in any case.
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

// stat tells the file's size, and whether it has no name any more: several sandboxes may
// share it, and each of them rotates it.
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

// put writes n bytes of the buffer, whole records. If it cannot, it keeps the rest of the
// record that was cut, and drops those after it.
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

// hurry bounds what is still to be written, from another goroutine: a pipe that nobody
// reads must not keep a worker that has been told to end.
func (s *FlowSink) hurry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.Out.(*os.File); ok {
		_ = f.SetWriteDeadline(time.Now().Add(SinkPatience)) // files have none
	}
}

func lines(b []byte) uint64 { return uint64(bytes.Count(b, []byte{'\n'})) }
