package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/sandbox/internal/logring"
)

// openTestLog opens dir/flows as a monitor does; said holds its warnings.
func openTestLog(t *testing.T, name string, size int64, files int) (l *flowlog.FlowFile, said *logring.LogRing) {
	t.Helper()
	said = logring.NewLogRing(time.Now, nil)
	l, err := flowlog.OpenFlowFile(name, size, files, said)
	testutil.Must(t, err)
	t.Cleanup(l.Close)
	return l, said
}

func warnings(r *logring.LogRing) (out []string) {
	lines, _ := r.Last(0)
	for _, l := range lines {
		if l.Level == "warning" {
			out = append(out, l.Text)
		}
	}
	return out
}

// fill fills the log's file with a text by which it can be recognized.
func fill(t *testing.T, l *flowlog.FlowFile, text string) {
	t.Helper()
	_, err := l.F.WriteString(text + strings.Repeat(" ", int(l.MaxSize)-len(text)-1) + "\n")
	testutil.Must(t, err)
}

// contents returns the beginning of each file of a log, newest first.
func contents(t *testing.T, name string) string {
	t.Helper()
	var out []string
	for i := range 12 {
		file := name
		if i > 0 {
			file += "." + strconv.Itoa(i)
		}
		b, err := os.ReadFile(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			out = append(out, "-")
		case err != nil:
			out = append(out, "?")
		default:
			out = append(out, strings.TrimSpace(string(b)))
		}
	}
	return strings.TrimRight(strings.Join(out, "|"), "|-")
}

func TestFlowLogFilesAreShiftedAndBounded(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	l, said := openTestLog(t, name, flowlog.MinFlowLogSize, 3)
	testutil.Must(t, os.Chmod(name, 0o640))
	for _, row := range []struct{ text, want string }{
		{"a", "|a"}, {"b", "|b|a"}, {"c", "|c|b"}, {"d", "|d|c"},
	} {
		fill(t, l, row.text)
		testutil.Must(t, l.Rotate())
		if got := contents(t, name); got != row.want {
			t.Errorf("after %s there is %s, want %s", row.text, got, row.want)
		}
	}
	if fi, err := os.Stat(name); err != nil || fi.Mode().Perm() != 0o640 {
		t.Errorf("the new file: %v, %v; want the mode that its forerunner had", fi.Mode(), err)
	}
	// A hole is filled before anything is dropped.
	testutil.Must(t, os.Remove(name+".1"))
	fill(t, l, "e")
	testutil.Must(t, l.Rotate())
	if got := contents(t, name); got != "|e|c" {
		t.Errorf("with a hole: %s", got)
	}
	// A file that is not nearly full stays: a worker's word is not enough.
	_, err := l.F.WriteString("f")
	testutil.Must(t, err)
	testutil.Must(t, l.Rotate())
	if got := contents(t, name); got != "f|e|c" || len(warnings(said)) != 0 {
		t.Errorf("one that is not full: %s; %q", got, warnings(said))
	}
}

func TestOnlyAFileOfItsOwnNameIsRotated(t *testing.T) {
	dir := t.TempDir()
	file, link, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	testutil.Must(t, os.WriteFile(file, nil, 0o600))
	testutil.Must(t, os.Symlink(file, link))
	testutil.Must(t, unix.Mkfifo(fifo, 0o600))
	r, err := os.OpenFile(fifo, os.O_RDWR, 0)
	testutil.Must(t, err)
	defer r.Close()
	for _, row := range []struct {
		name  string
		warns int
	}{{link, 1}, {fifo, 0}, {"/dev/null", 0}, {"/dev/stdout", 0}, {"-", 0}} {
		l, said := openTestLog(t, row.name, flowlog.MinFlowLogSize, 2)
		if err := l.Rotate(); !errors.Is(err, flowlog.ErrNoFlowFile) {
			t.Errorf("%s is rotated: %v", row.name, err)
		}
		if err := l.Reopen(); !errors.Is(err, flowlog.ErrNoFlowFile) {
			t.Errorf("%s is opened again: %v", row.name, err)
		}
		if l.MaxSize != 0 || len(warnings(said)) != row.warns {
			t.Errorf("%s has a largest size of %d; warned %q", row.name, l.MaxSize, warnings(said))
		}
	}
	l, _ := openTestLog(t, file, flowlog.FlowLogUnbounded, 0)
	if err := l.Rotate(); !errors.Is(err, flowlog.ErrNoFlowFile) {
		t.Errorf("a file without a largest size is rotated: %v", err)
	}
}

func TestWhatIsInTheWayOfARotation(t *testing.T) {
	for _, row := range []struct {
		name string
		do   func(t *testing.T, name string, l *flowlog.FlowFile)
		want string // of the warning; empty if it is rotated
		left string
	}{
		{"a symbolic link at FILE.1 is renamed, and not followed", func(t *testing.T, name string, _ *flowlog.FlowFile) {
			testutil.Must(t, os.WriteFile(name+".target", []byte("mine"), 0o600))
			testutil.Must(t, os.Symlink(name+".target", name+".1"))
		}, "", "|a|mine"},
		{"a directory at FILE.1", func(t *testing.T, name string, _ *flowlog.FlowFile) { testutil.Must(t, os.Mkdir(name+".1", 0o700)) },
			"flows.1 is a directory: remove it", "a|?"},
		{"a directory at the last name, before anything is renamed", func(t *testing.T, name string, _ *flowlog.FlowFile) {
			testutil.Must(t, os.WriteFile(name+".1", []byte("x"), 0o600))
			testutil.Must(t, os.Mkdir(name+".2", 0o700))
		}, "flows.2 is a directory: remove it", "a|x|?"},
		{"a directory that is gone", func(t *testing.T, name string, _ *flowlog.FlowFile) {
			testutil.Must(t, os.RemoveAll(filepath.Dir(name)))
		}, "no such file or directory", ""},
		{"a directory that may not be written", func(t *testing.T, name string, _ *flowlog.FlowFile) {
			if os.Geteuid() == 0 {
				t.Skip("root may write everywhere")
			}
			testutil.Must(t, os.Chmod(filepath.Dir(name), 0o500))
			t.Cleanup(func() { _ = os.Chmod(filepath.Dir(name), 0o700) })
		}, "permission denied", "a"},
		{"a link put in the place of FILE while it is renamed", func(t *testing.T, name string, l *flowlog.FlowFile) {
			l.Rename = func(from, to string) error {
				err := os.Rename(from, to)
				testutil.Must(t, os.WriteFile(name+".target", nil, 0o600))
				testutil.Must(t, os.Symlink(name+".target", name))
				return err
			}
		}, "too many levels of symbolic links", "|a"},
		{"another name of a file that is somebody's", func(t *testing.T, name string, l *flowlog.FlowFile) {
			l.Rename = func(from, to string) error {
				err := os.Rename(from, to)
				testutil.Must(t, os.WriteFile(name+".other", []byte("theirs"), 0o600))
				testutil.Must(t, os.Link(name+".other", name))
				return err
			}
		}, "no file of ours", "theirs|a"},
		{"a lock that nobody gives back", func(t *testing.T, name string, _ *flowlog.FlowFile) {
			f, err := os.Open(name)
			testutil.Must(t, err)
			t.Cleanup(func() { f.Close() })
			testutil.Must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
		}, "locked by another process", "a"},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "log")
			testutil.Must(t, os.Mkdir(dir, 0o700))
			name := filepath.Join(dir, "flows")
			l, said := openTestLog(t, name, flowlog.MinFlowLogSize, 3)
			fill(t, l, "a")
			row.do(t, name, l)
			err1, err2 := l.Rotate(), error(nil)
			if row.want != "" {
				err2 = l.Rotate()
			}
			got := warnings(said)
			if row.want == "" && (err1 != nil || len(got) != 0) || row.want != "" && (err1 == nil || err2 == nil || len(got) != 1 || !strings.Contains(got[0], row.want)) {
				t.Errorf("%v, %v; said %q, want one warning of %q", err1, err2, got, row.want)
			}
			if _, err := l.F.WriteString("more\n"); err != nil {
				t.Errorf("the log cannot be written on: %v", err)
			}
			if got := strings.ReplaceAll(contents(t, name), "more", ""); strings.Join(strings.Fields(got), "") != row.left {
				t.Errorf("there is %s, want %s", got, row.left)
			}
		})
	}
}

// TestAFailedRotationIsUndone: the new file cannot be made, and the old one keeps its name.
func TestAFailedRotationIsUndone(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	l, said := openTestLog(t, name, flowlog.MinFlowLogSize, 3)
	fill(t, l, "a")
	var limit unix.Rlimit
	testutil.Must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	l.Rename = func(from, to string) error {
		testutil.Must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Max: limit.Max})) // no descriptor can be had
		return os.Rename(from, to)
	}
	err := l.Rotate()
	testutil.Must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	if !errors.Is(err, unix.EMFILE) || len(warnings(said)) != 1 || contents(t, name) != "a" {
		t.Fatalf("%v; said %q; there is %s", err, warnings(said), contents(t, name))
	}
	l.Rename = os.Rename
	testutil.Must(t, l.Rotate())
	if lines, _ := said.Last(0); contents(t, name) != "|a" || !strings.Contains(lines[len(lines)-1].Text, "again") {
		t.Errorf("there is %s; said %v", contents(t, name), lines)
	}
}

// TestSandboxesThatShareAFlowLogRotateItOnce checks that, and that none continues in a file without
// a name.
func TestSandboxesThatShareAFlowLogRotateItOnce(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	var logs []*flowlog.FlowFile
	for range 5 {
		l, _ := openTestLog(t, name, flowlog.MinFlowLogSize, 3)
		logs = append(logs, l)
	}
	for round := range 20 {
		fill(t, logs[round%len(logs)], fmt.Sprint("round ", round))
		var wg sync.WaitGroup
		for _, l := range logs {
			wg.Go(func() { testutil.Must(t, l.Rotate()) })
		}
		wg.Wait()
		for i, l := range logs {
			if named, err := l.Named(name); err != nil || !named {
				t.Fatalf("round %d: log %d has a file that is not at the path: %v", round, i, err)
			}
		}
		want := fmt.Sprint("|round ", round)
		if round > 0 {
			want += fmt.Sprint("|round ", round-1)
		}
		if got := contents(t, name); got != want {
			t.Fatalf("there is %s, want %s", got, want)
		}
	}
}

// TestRotationSurvivesAKill kills a process by SIGKILL right after each rename of a rotation. The
// next process loses nothing that it need not.
func TestRotationSurvivesAKill(t *testing.T) {
	for kill := 1; kill <= 3; kill++ {
		t.Run(fmt.Sprint("after rename ", kill), func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "flows")
			for i, text := range []string{"new", "older", "oldest"} {
				file := name
				if i > 0 {
					file += "." + strconv.Itoa(i)
				}
				testutil.Must(t, os.WriteFile(file, []byte(text+strings.Repeat(" ", flowlog.MinFlowLogSize)+"\n"), 0o600))
			}
			cmd := exec.Command("/proc/self/exe", "test-rotate", name, strconv.Itoa(kill))
			err := cmd.Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("the process: %v, want its death", err)
			}
			dead := contents(t, name)
			for _, text := range []string{"new", "older", "oldest"} {
				if strings.Count(dead, text+"|") != 1 && !strings.HasSuffix(dead, text) {
					t.Errorf("after the kill there is %s: %s is lost", dead, text)
				}
			}
			l, said := openTestLog(t, name, flowlog.MinFlowLogSize, 4)
			if st, err := l.F.Stat(); err == nil && st.Size() == 0 {
				fill(t, l, "next")
			}
			testutil.Must(t, l.Rotate())
			if got := contents(t, name); !strings.HasPrefix(got, "|") || !strings.Contains(got, "|new|") || len(warnings(said)) != 0 {
				t.Errorf("then there is %s; %q", got, warnings(said))
			}
		})
	}
}

// killedRotation is the process of the test above.
func killedRotation(name, after string) int {
	l, err := flowlog.OpenFlowFile(name, flowlog.MinFlowLogSize, 4, logring.NewLogRing(time.Now, nil))
	if err != nil {
		return 1
	}
	n, _ := strconv.Atoi(after)
	l.Rename = func(from, to string) error {
		err := os.Rename(from, to)
		if n--; n == 0 {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
		return err
	}
	_ = l.Rotate()
	return 0
}

func TestFlowLogIsReopened(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	l, _ := openTestLog(t, name, flowlog.FlowLogUnbounded, 0)
	testutil.Must(t, os.Rename(name, name+".old"))
	testutil.Must(t, l.Reopen())
	_, err := l.F.WriteString("new\n")
	testutil.Must(t, err)
	if b, err := os.ReadFile(name); string(b) != "new\n" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	testutil.Must(t, os.Remove(name))
	testutil.Must(t, os.Mkdir(name, 0o700))
	if err := l.Reopen(); err == nil {
		t.Error("a directory is opened as the flow log")
	}
	if _, err := l.F.WriteString("on\n"); err != nil {
		t.Errorf("after a failure it is not written on: %v", err)
	}
}

func TestATornRecordIsEndedForTheNextWorker(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	testutil.Must(t, os.WriteFile(name, []byte("{}\n{\"ti"), 0o600))
	l, _ := openTestLog(t, name, 0, 0)
	for range 2 {
		l.Mend()
	}
	if b, _ := os.ReadFile(name); string(b) != "{}\n{\"ti\n" {
		t.Errorf("mended to %q", b)
	}
}

func TestFlowLogBounds(t *testing.T) {
	for text, want := range map[string]int64{"0": flowlog.FlowLogUnbounded, "4Ki": 4096, "100Mi": flowlog.DefaultFlowLogMaxSize, "1.5M": 1500000} {
		if got, err := flowlog.ParseFlowLogSize(text); got != want || err != nil {
			t.Errorf("%s is %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "-1", "4095", "many", "100MiB"} {
		if got, err := flowlog.ParseFlowLogSize(text); err == nil {
			t.Errorf("%q is taken as %d", text, got)
		}
	}
	for n, ok := range map[int]bool{-1: false, 0: false, 1: false, 2: true, 1000: true, 1001: false} {
		if err := flowlog.CheckFlowLogFiles(n); (err == nil) != ok {
			t.Errorf("%d files: %v", n, err)
		}
	}
}
