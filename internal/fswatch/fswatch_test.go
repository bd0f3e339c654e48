package fswatch

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// waits reads once from a descriptor returned by Open, through Go's poller, and returns how long
// that took.
func waits(t *testing.T, fd int) time.Duration {
	t.Helper()
	f := os.NewFile(uintptr(fd), "watch")
	defer f.Close()
	begun := time.Now()
	if err := f.SetReadDeadline(begun.Add(10 * Every)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	return time.Since(begun)
}

func TestAnInstanceTellsOfChanges(t *testing.T) {
	fd, ticking, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	if ticking {
		t.Skip("no inotify instance is left on this machine (fs.inotify.max_user_instances)")
	}
	dir := t.TempDir()
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	waits(t, fd)
}

func TestATickerStandsInForAnInstance(t *testing.T) {
	for _, why := range []error{unix.EMFILE, unix.ENOSYS} {
		fd, ticking, err := open(func(int) (int, error) { return -1, why })
		if err != nil || !ticking {
			t.Fatalf("after %v: ticking %v, %v", why, ticking, err)
		}
		if took := waits(t, fd); took < Every/2 {
			t.Errorf("after %v it is readable in %v, which would keep its reader busy", why, took)
		}
	}
}
