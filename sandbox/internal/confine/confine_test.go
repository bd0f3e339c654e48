package confine

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestEveryThreadHasNothingLeft(t *testing.T) {
	h := start(t, "wait", nil)
	t.Log(h.line())
	h.want("confined")
	h.wantConfined(8)
	limits, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(h.cmd.Process.Pid), "limits"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if strings.HasPrefix(line, "Max core file size") && !slices.Equal(strings.Fields(line)[4:6], []string{"0", "0"}) {
			t.Errorf("core files are allowed: %s", line)
		}
	}
	if mounts, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(h.cmd.Process.Pid), "mountinfo")); err == nil {
		if n := strings.Count(string(mounts), "\n"); n != 1 || !strings.Contains(string(mounts), "tmpfs") {
			t.Errorf("it has %d mounts:\n%s", n, mounts)
		}
	}
	h.proceed()
	if ws := h.end(); !ws.Exited() || ws.ExitStatus() != 0 {
		t.Errorf("it ended with %v", ws)
	}
}

// TestNoThreadIsMissedAmongThoseThatComeAndGo: each thread inherits from one that made the calls,
// or makes them itself.
func TestNoThreadIsMissedAmongThoseThatComeAndGo(t *testing.T) {
	h := start(t, "churn", nil)
	h.want("fine")
	for file, status := range h.threads() {
		if status["NoNewPrivs"] != "1" {
			t.Errorf("%s: NoNewPrivs is %q", file, status["NoNewPrivs"])
		}
	}
	h.proceed()
	if ws := h.end(); !ws.Exited() || ws.ExitStatus() != 0 {
		t.Errorf("it ended with %#x", ws)
	}
}

func TestForbiddenCallsKill(t *testing.T) {
	for name := range forbidden {
		t.Run(name, func(t *testing.T) {
			h := start(t, "forbidden", nil, name)
			h.want("confined")
			if ws := h.end(); !ws.Signaled() || ws.Signal() != syscall.SIGSYS {
				t.Errorf("it was not killed: status %#x", ws)
			}
		})
	}
}

func TestPathsLeadNowhere(t *testing.T) {
	h := start(t, "answered", nil)
	h.want("fine")
}

func TestStagesHoldByThemselves(t *testing.T) {
	h := start(t, "stages", nil)
	switch line := h.line(); {
	case strings.HasPrefix(line, "no Landlock"):
		t.Skip("the rest needs Landlock: ", line)
	case line != "fine":
		t.Error(line)
	}
}

func TestOnlyListedDescriptorsStayOpen(t *testing.T) {
	var files []*os.File
	for range 4 {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	h := start(t, "fds", files)
	var open []int
	for _, s := range strings.Fields(strings.Trim(h.line(), "[]")) {
		fd, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, fd)
	}
	if len(open) < 4 || !slices.Equal(open[:4], []int{0, 1, 2, 4}) || len(open) > 6 || len(open) > 4 && open[4] < 7 {
		t.Errorf("descriptors %v are open", open)
	}
	h.want("confined")
	if os.Getuid() != 0 {
		return // what the other descriptors are is not ours to read
	}
	for _, fd := range open[4:] {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", h.cmd.Process.Pid, fd))
		if err != nil || link != "anon_inode:[eventpoll]" && link != "anon_inode:[eventfd]" {
			t.Errorf("descriptor %d is %s, %v", fd, link, err)
		}
	}
}

func TestUnlistedStandardDescriptorsAreNull(t *testing.T) {
	h := start(t, "null", nil)
	fmt.Fprintln(h.in, "not for the helper")
	h.want("fine")
}

func TestAbstractSocketsOutsideAreOutOfReach(t *testing.T) {
	abi, err := createRuleset(nil, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if err != nil || abi < 6 {
		t.Skipf("needs Landlock's ABI 6: this kernel has %d, %v", abi, err)
	}
	name := fmt.Sprintf("@sluice-confine-test-%d", os.Getpid())
	l, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	sock := os.NewFile(uintptr(fd), "socket")
	defer sock.Close()
	h := start(t, "abstract", []*os.File{sock}, name)
	h.want(unix.EPERM.Error())
}

func TestABusyProgramRunsOn(t *testing.T) {
	h := start(t, "busy", nil)
	h.want("fine")
	h.wantConfined(4)
	h.proceed()
	if ws := h.end(); !ws.Exited() || ws.ExitStatus() != 0 {
		t.Errorf("it ended with %#x", ws)
	}
}

// TestABugIsToldOf: a confined worker that panics or faults ends with the Go runtime's status and
// trace, not by the filter.
func TestABugIsToldOf(t *testing.T) {
	for name, words := range map[string]string{"panic": "panic: last words", "fault": "SIGSEGV"} {
		t.Run(name, func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			h := startTo(t, w, name, nil)
			w.Close()
			trace, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			if ws := h.end(); !ws.Exited() || ws.ExitStatus() != 2 {
				t.Errorf("it ended with %#x", ws)
			}
			if !strings.Contains(string(trace), words) || !strings.Contains(string(trace), "goroutine 1 [running]") {
				t.Errorf("it says\n%s", trace)
			}
		})
	}
}

// TestAsAnOrdinaryUser runs the other tests again, as nobody.
func TestAsAnOrdinaryUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("this is run as an ordinary user already")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^Test", "-test.v")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "SKIP") && !strings.Contains(line, "TestAsAnOrdinaryUser") {
			t.Log(line)
		}
	}
}

func TestLandlockRulesetOfEachABI(t *testing.T) {
	for _, tt := range []struct {
		name           string
		abi, errata    int
		rights, scoped uint64
		size           uintptr
	}{
		{"1: the first thirteen rights", 1, 0, 0x1fff, 0, 8},
		{"2: rename and link between directories", 2, 0, 0x3fff, 0, 8},
		{"3: truncate", 3, 0, 0x7fff, 0, 8},
		{"4: the network, which is not handled", 4, 0, 0x7fff, 0, 16},
		{"5: ioctl on devices", 5, 0, 0xffff, 0, 16},
		{"6: scopes, signals not, as sibling threads could not be signalled", 6, 0, 0xffff, unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, 24},
		{"6 with its erratum mended", 6, 3, 0xffff, unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL, 24},
		{"7: audit, nothing new to deny", 7, 3, 0xffff, unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL, 24},
	} {
		t.Run(tt.name, func(t *testing.T) {
			attr, size := landlockRuleset(tt.abi, tt.errata)
			if attr.Handled_access_fs != tt.rights || attr.Scoped != tt.scoped || size != tt.size || attr.Handled_access_net != 0 {
				t.Errorf("%#x, scoped %#x, %d bytes", attr.Handled_access_fs, attr.Scoped, size)
			}
		})
	}
}

func TestFilterIsAValidProgram(t *testing.T) {
	const maxInstructions = 4096 // BPF_MAXINSNS
	p := program(1)
	instructions, stats, err := p.Build()
	if err != nil {
		t.Fatal(err)
	}
	if len(instructions) > maxInstructions {
		t.Errorf("the filter has %d instructions", len(instructions))
	}
	t.Logf("%d instructions, built in %v", len(instructions), stats.BuildDuration+stats.RuleOptimizeDuration+stats.BPFOptimizeDuration)
}
