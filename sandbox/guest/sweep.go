package guest

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Cleaning up: every process in the sandbox's user namespace, or in one made inside it, is killed.
// CMD may have left daemons that are no longer its descendants. A process cannot leave its user
// namespace except for one below.

// nsID identifies a namespace as long as something keeps it alive.
type nsID struct{ dev, ino uint64 }

func namespaceID(path string) (nsID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nsID{}, err
	}
	return nsID{st.Dev, st.Ino}, nil
}

func fdNamespaceID(fd int) (nsID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nsID{}, err
	}
	return nsID{st.Dev, st.Ino}, nil
}

// maxUserNamespaceDepth is the kernel's limit on nested user namespaces.
const maxUserNamespaceDepth = 33

// livesIn reports whether pid's user namespace is ns or below it.
func livesIn(pid int, ns nsID) bool {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer func() { unix.Close(fd) }()
	for range maxUserNamespaceDepth {
		id, err := fdNamespaceID(fd)
		if err != nil {
			return false
		}
		if id == ns {
			return true
		}
		up, err := unix.IoctlRetInt(fd, unix.NS_GET_PARENT)
		if err != nil {
			return false // we may not see the parent, so it is not ns
		}
		unix.Close(fd)
		fd = up
	}
	return false
}

// sweep kills every process in ns except the caller, and returns when they are gone.
func sweep(ns nsID, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for {
		victims, err := condemn(ns)
		if err != nil {
			return fmt.Errorf("clearing up the sandbox: %w", err)
		}
		if len(victims) == 0 {
			return nil
		}
		for _, pidfd := range victims {
			_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		}
		for _, pidfd := range victims {
			awaitPidfd(pidfd, time.Until(deadline))
			unix.Close(pidfd)
		}
		if time.Now().After(deadline) {
			return errors.New("clearing up the sandbox: processes in it do not die (in uninterruptible sleep, or forking faster than they can be killed)")
		}
	}
}

// maxVictims bounds the descriptors opened in one pass.
const maxVictims = 512

// condemn returns a pidfd for each live process in ns. The pidfd is opened before the namespace is
// checked, so it refers to that process and no later one.
func condemn(ns nsID) ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() || !livesIn(pid, ns) {
			continue
		}
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if len(out) < maxVictims && livesIn(pid, ns) && !dead(pidfd) {
			out = append(out, pidfd)
			continue
		}
		unix.Close(pidfd)
	}
	return out, nil
}

// dead reports whether all threads of the process are dead. A zombie that its parent does not reap
// holds no namespace and counts as dead.
func dead(pidfd int) bool {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, _ := unix.Poll(p, 0)
	return n > 0
}

// awaitPidfd waits until the process is dead.
func awaitPidfd(pidfd int, limit time.Duration) {
	end := time.Now().Add(limit)
	for {
		ms := int(time.Until(end).Milliseconds())
		if ms < 0 {
			return
		}
		p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, ms); n > 0 || (err != nil && err != unix.EINTR) {
			return
		}
	}
}
