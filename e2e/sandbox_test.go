package e2e

// Driving sluice: a sandbox whose command is the agent, commands inside it, and what the control
// commands say about it.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

type sandbox struct {
	name string
	host *netns
	run  *proc // sluice run, the monitor

	mu      sync.Mutex // guards all below
	line    []byte
	ready   chan struct{}
	isReady bool
	next    int
	procs   map[int]*proc
	noise   []string // lines on stdout that are not the agent's

	before usage
}

var sandboxes int

// sandbox starts a sandbox with the given flags and waits until its command runs.
func (n *netns) sandbox(t *testing.T, flags ...string) *sandbox {
	t.Helper()
	sb := n.launch(t, flags...)
	select {
	case <-sb.ready:
	case <-sb.run.done:
		t.Fatalf("the sandbox ended before its command ran\n%s", sb.run.result(""))
	case <-time.After(20 * time.Second):
		t.Fatalf("the sandbox's command did not run within 20 s\n%s", sb.run.result("still running"))
	}
	sb.before = sb.settled(t)
	t.Cleanup(func() {
		if !t.Failed() {
			sb.end(t)
		} else if r := n.sluiceRun(t, "logs", sb.name); r.status == 0 {
			t.Logf("what %s has to say:\n%s", sb, r.out)
		}
	})
	return sb
}

// launch starts a sandbox without waiting and without checks at its end.
func (n *netns) launch(t *testing.T, flags ...string) *sandbox {
	t.Helper()
	sandboxes++
	sb := &sandbox{name: fmt.Sprintf("t%d", sandboxes), host: n, ready: make(chan struct{}), procs: map[int]*proc{}}
	argv := append([]string{"run", "--name", sb.name}, flags...)
	cmd := exec.Command(sluiceBin(), append(argv, "--", peerBin(), "agent")...)
	cmd.Stdout = sb
	sb.run = n.startCmd(t, n.plain, cmd)
	return sb
}

func (sb *sandbox) String() string {
	return "sandbox " + sb.name + " (" + shellQuote(sb.run.argv[1:]) + ")"
}

// Write receives the agent's events.
func (sb *sandbox) Write(b []byte) (int, error) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.line = append(sb.line, b...)
	for {
		i := bytes.IndexByte(sb.line, '\n')
		if i < 0 {
			return len(b), nil
		}
		line := sb.line[:i]
		sb.line = sb.line[i+1:]
		var e struct {
			Ready  bool
			ID     int
			Stream string
			Data   []byte
			Pid    int
			Exit   *int
			Error  string
		}
		if err := json.Unmarshal(line, &e); err != nil {
			sb.noise = append(sb.noise, string(line))
			sb.run.stream(&sb.run.out).Write(append(line, '\n'))
			continue
		}
		if e.Ready && !sb.isReady {
			sb.isReady = true
			close(sb.ready)
		}
		p := sb.procs[e.ID]
		if p == nil {
			continue
		}
		switch {
		case e.Exit != nil:
			if e.Error != "" {
				p.stream(&p.err).Write([]byte(e.Error + "\n"))
			}
			p.finish(*e.Exit)
			delete(sb.procs, e.ID)
		case e.Stream == "stdout":
			p.stream(&p.out).Write(e.Data)
		case e.Stream == "stderr":
			p.stream(&p.err).Write(e.Data)
		}
	}
}

func (sb *sandbox) ask(v map[string]any) {
	line, _ := json.Marshal(v)
	sb.run.write(append(line, '\n'))
}

// start runs a command inside.
func (sb *sandbox) start(t *testing.T, argv ...string) *proc {
	t.Helper()
	p := newProc(sb.String(), argv)
	sb.mu.Lock()
	sb.next++
	id := sb.next
	sb.procs[id] = p
	sb.mu.Unlock()
	p.write = func(b []byte) { sb.ask(map[string]any{"id": id, "op": "stdin", "data": b}) }
	p.closeInput = func() { sb.ask(map[string]any{"id": id, "op": "eof"}) }
	p.signal = func(s syscall.Signal) { sb.ask(map[string]any{"id": id, "op": "signal", "sig": int(s)}) }
	sb.ask(map[string]any{"id": id, "op": "start", "argv": argv})
	t.Cleanup(func() { p.show(t) })
	go func() { // the sandbox's end ends everything in it
		<-sb.run.done
		time.Sleep(100 * time.Millisecond)
		sb.mu.Lock()
		defer sb.mu.Unlock()
		if sb.procs[id] == p {
			delete(sb.procs, id)
			p.finish(-1)
		}
	}()
	return p
}

// end closes the sandbox as its user would, by ending its command, after checking that it gave back
// what it used.
func (sb *sandbox) end(t *testing.T) {
	t.Helper()
	select {
	case <-sb.run.done:
		return
	default:
	}
	sb.checkGivenBack(t)
	sb.close(t)
}

// close ends the command and expects the whole to succeed.
func (sb *sandbox) close(t *testing.T) {
	t.Helper()
	sb.run.closeInput()
	sb.run.wait(t, 10*time.Second).wantStatus(t, 0)
}

// sluice runs a control command as the sandbox's user.
func (n *netns) sluice(t *testing.T, args ...string) *proc {
	t.Helper()
	return n.startPlain(t, append([]string{sluiceBin()}, args...)...)
}

func (n *netns) sluiceOK(t *testing.T, args ...string) result {
	t.Helper()
	return n.sluiceRun(t, args...).wantStatus(t, 0)
}

func (n *netns) sluiceRun(t *testing.T, args ...string) result {
	t.Helper()
	p := n.sluice(t, args...)
	p.closeInput()
	return p.wait(t, 20*time.Second)
}

// flows returns the sandbox's flows, in conntrack's words.
func (sb *sandbox) flows(t *testing.T) []ctFlow {
	t.Helper()
	r := sb.host.sluiceOK(t, "flows", "-o", "conntrack", sb.name)
	flows, err := parseConntrack(r.out)
	if err != nil {
		t.Fatalf("%v\n%s", err, r)
	}
	return flows
}

// stats returns the output of `sluice stats -o json`.
func (sb *sandbox) stats(t *testing.T) any {
	t.Helper()
	r := sb.host.sluiceOK(t, "stats", "-o", "json", sb.name)
	var v any
	if err := json.Unmarshal([]byte(r.out), &v); err != nil {
		t.Fatalf("stats are not JSON: %v\n%s", err, r)
	}
	return v
}

// number returns the first number under a key of that name, at any depth.
func number(v any, key string) (float64, bool) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			if f, ok := x.(float64); ok && strings.EqualFold(k, key) {
				return f, true
			}
		}
		for _, x := range v {
			if f, ok := number(x, key); ok {
				return f, true
			}
		}
	case []any:
		for _, x := range v {
			if f, ok := number(x, key); ok {
				return f, true
			}
		}
	}
	return 0, false
}

// worker returns the process that handles packets: the descendant of the monitor whose first
// argument says so.
func (sb *sandbox) worker() int {
	for _, pid := range descendants(sb.run.pid) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		argv := strings.Split(string(cmdline), "\x00")
		if len(argv) > 1 && strings.Contains(argv[1], "worker") {
			return pid
		}
	}
	return 0
}

// waitWorker waits for a worker other than old.
func (sb *sandbox) waitWorker(t *testing.T, old int, timeout time.Duration) (pid int) {
	t.Helper()
	testutil.Within(t, timeout, func() (bool, string) {
		pid = sb.worker()
		return pid != 0 && pid != old, fmt.Sprintf("no new worker; processes below the monitor: %v", describe(descendants(sb.run.pid)))
	})
	if t.Failed() {
		t.FailNow()
	}
	return pid
}

// descendants lists the processes below root, children first.
func descendants(root int) []int {
	below := []int{}
	parents := map[int]int{}
	for _, pid := range processes() {
		parents[pid] = parentOf(pid)
	}
	queue := []int{root}
	for len(queue) > 0 {
		at := queue[0]
		queue = queue[1:]
		for pid, parent := range parents {
			if parent == at {
				below = append(below, pid)
				queue = append(queue, pid)
			}
		}
	}
	return below
}

func processes() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// stat returns the fields of /proc/PID/stat after the name: state, parent …
func stat(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	i := bytes.LastIndexByte(b, ')')
	if err != nil || i < 0 {
		return nil
	}
	return strings.Fields(string(b[i+1:]))
}

func parentOf(pid int) int {
	if f := stat(pid); len(f) > 1 {
		ppid, _ := strconv.Atoi(f[1])
		return ppid
	}
	return 0
}

func describe(pids []int) []string {
	var all []string
	for _, pid := range pids {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		state := "gone"
		if f := stat(pid); len(f) > 0 {
			state = f[0]
		}
		all = append(all, fmt.Sprintf("%d[%s] %s", pid, state, strings.ReplaceAll(strings.TrimRight(string(cmdline), "\x00"), "\x00", " ")))
	}
	return all
}

// status reads the fields of /proc/PID/status.
func status(pid int) map[string]string { return statusAt(fmt.Sprintf("/proc/%d", pid)) }

// statusAt is status for the directory of a process or a thread.
func statusAt(dir string) map[string]string {
	b, _ := os.ReadFile(filepath.Join(dir, "status"))
	fields := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			fields[k] = strings.TrimSpace(v)
		}
	}
	return fields
}

// write puts a file into the test's own directory.
func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}
