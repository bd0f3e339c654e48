package logring

import (
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode"

	"sluice.dev/sluice/sandbox/api"
)

// MaxLogFollowers bounds how many clients follow the log, so that some control connections stay
// free.
const MaxLogFollowers = 16

// The sandbox's own log: the last lines, kept in the monitor so that a worker that died cannot take
// its last words with it. Lines from the worker come from a less trusted process: they are cut and
// cleaned of control characters. Like all lines, they are overwritten when the ring is full.

const (
	LogLines      = 1000
	LogLineLength = 1024
	// LogFollowerQueue bounds the lines queued for a slow `logs -f`. Beyond it, that follower loses
	// lines.
	LogFollowerQueue = 256
	// EchoQueue bounds the lines that wait for a standard error that accepts none. EchoPatience is
	// how long a caller that adds a line waits for it to be written.
	EchoQueue    = 64
	EchoPatience = 100 * time.Millisecond
)

type LogRing struct {
	now func() time.Time
	// echo, if set, gets every line at its level or above (standard error).
	echo func(api.LogLine)

	mu        sync.Mutex
	Lines     []api.LogLine // a ring, oldest at next once full
	next      int
	dropped   uint64
	followers map[chan api.LogLine]struct{}
	echoing   echoing
}

// echoing is the queue of lines for standard error. A stopped terminal, or a pipe that nobody
// reads, may accept nothing for any length of time, and callers add lines while holding locks. So
// they wait for EchoPatience, and then not again until it accepts lines.
type echoing struct {
	mu    sync.Mutex
	lines []api.LogLine
	done  chan struct{} // closed when lines is empty; nil while no goroutine writes
	stuck bool
}

func NewLogRing(now func() time.Time, echo func(api.LogLine)) *LogRing {
	return &LogRing{now: now, echo: echo, followers: make(map[chan api.LogLine]struct{})}
}

func (l *LogRing) Infof(source, format string, args ...any) {
	l.Add("info", source, fmt.Sprintf(format, args...))
}

func (l *LogRing) Warnf(source, format string, args ...any) {
	l.Add("warning", source, fmt.Sprintf(format, args...))
}

func (l *LogRing) Add(level, source, text string) {
	line := api.LogLine{Time: l.now(), Level: level, Source: source, Text: CleanLine(text)}
	l.mu.Lock()
	if len(l.Lines) < LogLines {
		l.Lines = append(l.Lines, line)
	} else {
		l.Lines[l.next] = line
		l.next = (l.next + 1) % LogLines
		l.dropped++
	}
	for ch := range l.followers {
		select {
		case ch <- line:
		default:
		}
	}
	l.mu.Unlock()
	if l.echo != nil {
		l.echoing.add(line, l.echo)
	}
}

// add queues line to be written, and waits a while until it is. Beyond EchoQueue a line is kept
// only in the ring.
func (e *echoing) add(line api.LogLine, write func(api.LogLine)) {
	e.mu.Lock()
	if len(e.lines) < EchoQueue {
		e.lines = append(e.lines, line)
	}
	if e.done == nil {
		e.done = make(chan struct{})
		go e.drain(write) // ends when all lines are written, or with the process
	}
	done, stuck := e.done, e.stuck
	e.mu.Unlock()
	if stuck {
		return
	}
	t := time.NewTimer(EchoPatience)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		e.mu.Lock()
		e.stuck = e.done == done
		e.mu.Unlock()
	}
}

func (e *echoing) drain(write func(api.LogLine)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.lines) > 0 {
		line := e.lines[0]
		e.lines = e.lines[1:]
		e.mu.Unlock()
		write(line)
		e.mu.Lock()
	}
	close(e.done)
	e.lines, e.done, e.stuck = nil, nil, false
}

// Last returns the newest n lines, oldest first; 0 means all lines kept.
func (l *LogRing) Last(n int) ([]api.LogLine, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastLocked(n), l.dropped
}

func (l *LogRing) lastLocked(n int) []api.LogLine {
	if n <= 0 || n > len(l.Lines) {
		n = len(l.Lines)
	}
	out := make([]api.LogLine, 0, n)
	for i := len(l.Lines) - n; i < len(l.Lines); i++ {
		out = append(out, l.Lines[(l.next+i)%len(l.Lines)])
	}
	return out
}

// Follow returns the newest n lines and a channel of the lines to come, with no gap between them.
// cancel ends it; the channel is never closed. If there are MaxLogFollowers already, cancel is nil.
func (l *LogRing) Follow(n int) (lines []api.LogLine, ch <-chan api.LogLine, cancel func()) {
	c := make(chan api.LogLine, LogFollowerQueue)
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.followers) >= MaxLogFollowers {
		return nil, nil, nil
	}
	l.followers[c] = struct{}{}
	return l.lastLocked(n), c, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.followers, c)
	}
}

// CleanLine returns s as one printable line of at most LogLineLength bytes.
func CleanLine(s string) string {
	s = strings.ReplaceAll(strings.TrimRight(s, "\r\n"), "\n", "; ")
	if len(s) > LogLineLength {
		s = strings.ToValidUTF8(s[:LogLineLength], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
