package fork

import (
	"testing"

	"golang.org/x/sys/unix"
)

// The process killed after a failure must not be -1, which means every process.
func TestACloneThatFailsNamesNobody(t *testing.T) {
	l := &laid{flags: unix.CLONE_NEWUSER | unix.CLONE_FS | uintptr(unix.SIGCHLD), waitFD: -1}
	if pid, errno := l.fork(); pid != 0 || errno != unix.EINVAL {
		t.Errorf("fork: %d, %v, want 0, %v", pid, errno, unix.EINVAL)
	}
}
