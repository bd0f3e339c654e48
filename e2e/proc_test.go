package e2e

// A running command of a test, wherever it runs, and its outcome.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// place is where commands can be started: a namespace or the inside of a sandbox.
type place interface {
	start(t *testing.T, argv ...string) *proc
	String() string
}

type proc struct {
	where string
	argv  []string
	pid   int
	begun time.Time

	write      func([]byte)
	closeInput func()
	signal     func(syscall.Signal) // to the whole process group
	done       chan struct{}

	mu       sync.Mutex // guards all below
	out, err bytes.Buffer
	changed  chan struct{} // closed and renewed at each output
	status   int
	took     time.Duration
	shown    bool
}

func newProc(where string, argv []string) *proc {
	return &proc{where: where, argv: argv, begun: time.Now(), done: make(chan struct{}), changed: make(chan struct{}),
		write: func([]byte) {}, closeInput: func() {}, signal: func(syscall.Signal) {}}
}

type streamTo struct {
	p *proc
	b *bytes.Buffer
}

func (s streamTo) Write(b []byte) (int, error) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if s.b.Len() < 64<<20 {
		s.b.Write(b)
	}
	close(s.p.changed)
	s.p.changed = make(chan struct{})
	return len(b), nil
}

func (p *proc) stream(b *bytes.Buffer) streamTo { return streamTo{p, b} }

func (p *proc) finish(status int) {
	p.mu.Lock()
	p.status, p.took = status, time.Since(p.begun)
	p.mu.Unlock()
	close(p.done)
}

// result is a command that ended (or was given up on: status -1).
type result struct {
	where    string
	argv     []string
	status   int
	out, err string
	took     time.Duration
	note     string
}

func (p *proc) result(note string) result {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := result{p.where, p.argv, p.status, p.out.String(), p.err.String(), p.took, note}
	select {
	case <-p.done:
	default:
		r.status, r.took = -1, time.Since(p.begun)
	}
	return r
}

// String shows everything that a reader of a failure needs.
func (r result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "  ran:    %s\n  in:     %s\n  status: %d after %v", shellQuote(r.argv), r.where, r.status, r.took.Round(time.Millisecond))
	if r.note != "" {
		fmt.Fprintf(&b, " (%s)", r.note)
	}
	for _, s := range []struct{ name, text string }{{"stdout", r.out}, {"stderr", r.err}} {
		if text := strings.TrimRight(s.text, "\n"); text != "" {
			fmt.Fprintf(&b, "\n  %s: %s", s.name, strings.ReplaceAll(clip(text, 4000), "\n", "\n          "))
		} else {
			fmt.Fprintf(&b, "\n  %s: (empty)", s.name)
		}
	}
	return b.String()
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n/2] + fmt.Sprintf("\n[… %d bytes …]\n", len(s)-n) + s[len(s)-n/2:]
}

func shellQuote(argv []string) string {
	quoted := make([]string, len(argv))
	for i, a := range argv {
		quoted[i] = a
		if a == "" || strings.ContainsAny(a, " \t\n'\"$&|;()<>*?#`\\") {
			quoted[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// wait waits for the end. It kills a command that takes longer, and fails the test.
func (p *proc) wait(t *testing.T, timeout time.Duration) result {
	t.Helper()
	select {
	case <-p.done:
		return p.result("")
	case <-time.After(timeout):
		r := p.result(fmt.Sprintf("did not end within %v", timeout))
		p.signal(syscall.SIGKILL)
		t.Fatalf("command hangs\n%s", r)
		return r
	}
}

// waitOutput waits until ok accepts the standard output so far.
func (p *proc) waitOutput(t *testing.T, timeout time.Duration, what string, ok func(out string) bool) string {
	t.Helper()
	return p.waitStream(t, &p.out, timeout, what, ok)
}

func (p *proc) waitStream(t *testing.T, b *bytes.Buffer, timeout time.Duration, what string, ok func(string) bool) string {
	t.Helper()
	deadline := time.After(timeout)
	for {
		p.mu.Lock()
		out, changed := b.String(), p.changed
		p.mu.Unlock()
		if ok(out) {
			return out
		}
		select {
		case <-changed:
		case <-p.done:
			p.mu.Lock()
			out = b.String()
			p.mu.Unlock()
			if ok(out) {
				return out
			}
			t.Fatalf("ended without %s\n%s", what, p.result(""))
		case <-deadline:
			t.Fatalf("no %s within %v\n%s", what, timeout, p.result("still running"))
		}
	}
}

func (p *proc) waitText(t *testing.T, text string, timeout time.Duration) string {
	t.Helper()
	return p.waitOutput(t, timeout, fmt.Sprintf("%q on stdout", text), func(out string) bool { return strings.Contains(out, text) })
}

// stop ends the command as Ctrl-C in a terminal or a supervisor's TERM would.
func (p *proc) stop(t *testing.T, s syscall.Signal) result {
	t.Helper()
	p.signal(s)
	return p.wait(t, 10*time.Second)
}

func (p *proc) show(t *testing.T) {
	if os.Getenv("SLUICE_E2E_KEEP") == "" {
		return
	}
	p.mu.Lock()
	shown := p.shown
	p.shown = true
	p.mu.Unlock()
	if !shown {
		t.Logf("command\n%s", p.result(""))
	}
}

// run runs a command to its end.
func run(t *testing.T, in place, timeout time.Duration, argv ...string) result {
	t.Helper()
	p := in.start(t, argv...)
	p.closeInput()
	return p.wait(t, timeout)
}

// ok runs a command that must succeed.
func ok(t *testing.T, in place, timeout time.Duration, argv ...string) result {
	t.Helper()
	r := run(t, in, timeout, argv...)
	r.wantStatus(t, 0)
	return r
}

func (r result) wantStatus(t *testing.T, status int) result {
	t.Helper()
	if r.status != status {
		t.Fatalf("exit status %d, not %d\n%s", r.status, status, r)
	}
	return r
}

func (r result) wantOut(t *testing.T, text string) result {
	t.Helper()
	if !strings.Contains(r.out, text) {
		t.Fatalf("no %q on stdout\n%s", text, r)
	}
	return r
}

// wantMessage checks that the error output names the cause and the cure.
func (r result) wantMessage(t *testing.T, parts ...string) result {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(strings.ToLower(r.err), strings.ToLower(part)) {
			t.Errorf("the message does not say %q\n%s", part, r)
		}
	}
	return r
}

// into decodes the last line of standard output.
func (r result) into(t *testing.T, v any) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(r.out), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), v); err != nil {
		t.Fatalf("stdout is not the JSON expected: %v\n%s", err, r)
	}
}
