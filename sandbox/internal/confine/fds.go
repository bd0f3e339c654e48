package confine

import (
	"fmt"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// closeOthers closes all descriptors except those in keep and the Go runtime's own, its epoll and
// its eventfd. It tells those by their kind and by close-on-exec: the Go runtime sets that flag on
// every descriptor it opens, and a descriptor that came from outside never has it.
func closeOthers(keep []int) error {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/null: %w", err)
	}
	defer unix.Close(null)
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			return fmt.Errorf("/proc/self/fd has %q", e.Name())
		}
		switch {
		case slices.Contains(keep, fd) || fd == null || runtimes(fd):
		case fd <= 2:
			if err := unix.Dup3(null, fd, 0); err != nil {
				return fmt.Errorf("put /dev/null at descriptor %d: %w", fd, err)
			}
		default:
			_ = unix.Close(fd) // fails for the descriptor that read the directory
		}
	}
	return nil
}

func runtimes(fd int) bool {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		return false
	}
	kind, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	return err == nil && (kind == "anon_inode:[eventpoll]" || kind == "anon_inode:[eventfd]")
}
