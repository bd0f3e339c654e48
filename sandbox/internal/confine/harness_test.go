package confine

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The tests start this test binary again, cloned as the monitor clones a worker, with the name of a
// helper in the environment. A helper prints each finding on a line of its standard output. Where
// the test is to look at it from outside, it waits for a line on its standard input.
//
//	test ──clone(NEWUSER|NEWNS|NEWPID|NEWIPC|NEWUTS)──► helper: Apply, then try things
//	  └─ reads /proc/PID/task/*/status, waits for the exit status

const helperEnv = "SLUICE_CONFINE_HELPER"

func TestMain(m *testing.M) {
	if name := os.Getenv(helperEnv); name != "" {
		if err := helpers[name](); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// nobody is the uid of a worker that root starts.
const nobody = 65534

// helper is a running helper process.
type helper struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func start(t *testing.T, name string, extra []*os.File, args ...string) *helper {
	t.Helper()
	return startTo(t, os.Stderr, name, extra, args...)
}

func startTo(t *testing.T, stderr *os.File, name string, extra []*os.File, args ...string) *helper {
	t.Helper()
	who, root := os.Getuid(), os.Getuid() == 0
	if root {
		who = nobody
	}
	// Not by its path, which the helper's user may be unable to reach.
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), helperEnv+"="+name)
	cmd.ExtraFiles = extra
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: who, Size: 1}},
		GidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: who, Size: 1}},
		GidMappingsEnableSetgroups: root,
		Credential:                 &syscall.Credential{NoSetGroups: !root},
	}
	h := &helper{t: t, cmd: cmd}
	var err error
	if h.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	h.out = bufio.NewReader(out)
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
			t.Skipf("needs user namespaces: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return h
}

// line returns the next line that the helper prints.
func (h *helper) line() string {
	h.t.Helper()
	s, err := h.out.ReadString('\n')
	if err != nil && s == "" {
		h.t.Fatalf("the helper says nothing more: %v; it ended with %v", err, h.cmd.Wait())
	}
	return strings.TrimSuffix(s, "\n")
}

func (h *helper) want(line string) {
	h.t.Helper()
	if got := h.line(); got != line {
		h.t.Fatalf("the helper says %q, not %q", got, line)
	}
}

// proceed lets a waiting helper go on.
func (h *helper) proceed() { fmt.Fprintln(h.in) }

// end waits for the helper's end.
func (h *helper) end() syscall.WaitStatus {
	h.t.Helper()
	rest, _ := io.ReadAll(h.out)
	_ = h.cmd.Wait()
	if len(rest) > 0 {
		h.t.Logf("the helper's last words: %s", rest)
	}
	return h.cmd.ProcessState.Sys().(syscall.WaitStatus)
}

// threads reads the status file of each of the helper's threads.
func (h *helper) threads() map[string]map[string]string {
	h.t.Helper()
	files, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(h.cmd.Process.Pid), "task/*/status"))
	if err != nil || len(files) == 0 {
		h.t.Fatalf("no threads: %v", err)
	}
	all := map[string]map[string]string{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // the thread is gone
		}
		fields := map[string]string{}
		for line := range strings.Lines(string(data)) {
			key, value, _ := strings.Cut(line, ":")
			fields[key] = strings.TrimSpace(value)
		}
		all[f] = fields
	}
	return all
}

// wantConfined checks every thread from outside.
func (h *helper) wantConfined(atLeast int) {
	h.t.Helper()
	threads := h.threads()
	if len(threads) < atLeast {
		h.t.Errorf("only %d threads to look at", len(threads))
	}
	for file, status := range threads {
		for key, want := range map[string]string{
			"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
			"CapBnd": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
		} {
			if status[key] != want {
				h.t.Errorf("%s: %s is %s, not %s", file, key, status[key], want)
			}
		}
		if os.Getuid() == 0 && !strings.HasPrefix(status["Uid"], strconv.Itoa(nobody)) {
			h.t.Errorf("%s: its uid is %s", file, status["Uid"])
		}
	}
}

// pause is a helper's side of proceed.
func pause(say string) error {
	fmt.Println(say)
	_, err := os.Stdin.Read(make([]byte, 1))
	return err
}
