// Package testutil holds helpers that the tests of many packages share. It imports "testing" and is
// for tests alone: the import table's test fails if other code imports it. It imports no other
// package of ours, so that the tests of every package can use it.
package testutil

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// patience is how long Eventually waits. It allows for a slow machine and measures nothing.
const patience = 15 * time.Second

// Must ends the test if err is not nil.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Eventually polls until ok holds, and ends the test if it does not within 15 s. It is for states
// that the kernel or another goroutine brings about without an event to wait for.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !poll(patience, time.Millisecond, ok) {
		t.Fatalf("not within %v: %s", patience, what)
	}
}

// Within is Eventually with its own limit, and with an ok that describes the state. If the test
// fails, the last state is reported, and the test goes on to report what else it finds.
func Within(t testing.TB, limit time.Duration, ok func() (bool, string)) {
	t.Helper()
	var state string
	held := poll(limit, 20*time.Millisecond, func() (good bool) {
		good, state = ok()
		return good
	})
	if !held {
		t.Errorf("not within %v: %s", limit, state)
	}
}

func poll(limit, pause time.Duration, ok func() bool) bool {
	for end := time.Now().Add(limit); !ok(); time.Sleep(pause) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// Run runs a command and returns its output. It ends the test if the command fails.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// ShortDir returns a temporary directory, mode 0700, whose path leaves room for a socket's name.
// The path of T.TempDir includes the test's name, and a unix socket's path ends at 107 bytes.
func ShortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sl")
	Must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// RuntimeDir returns a ShortDir in which the test and its children keep the state of sandboxes.
func RuntimeDir(t *testing.T) string {
	t.Helper()
	dir := ShortDir(t)
	t.Setenv("XDG_RUNTIME_DIR", dir)
	return dir
}

// PublicDir returns a temporary directory that other users may enter and read.
func PublicDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	Must(t, os.Chmod(dir, 0o755))
	Must(t, os.Chmod(filepath.Dir(dir), 0o755))
	return dir
}
