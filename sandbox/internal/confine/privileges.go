package confine

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// onAllThreads makes a system call on every thread of the process.
func onAllThreads(trap, a1, a2, a3 uintptr) error {
	switch _, _, errno := syscall.AllThreadsSyscall(trap, a1, a2, a3); errno {
	case 0:
		return nil
	case syscall.ENOTSUP:
		return ErrCgo
	default:
		return errno
	}
}

// maxCaps bounds the search for the last capability; the kernel's sets have 64 bits.
const maxCaps = 64

// dropPrivileges clears all capability sets of all threads, for good.
func dropPrivileges() error {
	if err := onAllThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	for c := uintptr(0); c < maxCaps; c++ {
		// Whoever cloned the process may have emptied its set, and all threads come from
		// the one that there was then. A signal to each of them and a wait for all, for
		// every capability, takes longer than all else does.
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if errors.Is(err, syscall.EINVAL) && c > unix.CAP_SETPCAP {
			break // the kernel knows no more
		}
		if err == nil && has != 0 {
			err = onAllThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0)
		}
		if err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	// The ambient set loses what leaves the permitted and inheritable ones.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // Pid 0: the calling thread
	var none [2]unix.CapUserData
	if err := onAllThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0); err != nil {
		return fmt.Errorf("clear the capability sets: %w", err)
	}
	return nil
}
