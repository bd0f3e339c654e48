package confine

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxCaps bounds the search for the last capability; the kernel's sets have 64 bits.
const maxCaps = 64

// dropPrivileges clears all capability sets of all threads, permanently.
func dropPrivileges(all threads) error {
	calls := []call{{unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0}}
	for c := uintptr(0); c < maxCaps; c++ {
		// The process that cloned this one may have emptied its set, and every thread descends from
		// the one it had then.
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && c > unix.CAP_SETPCAP {
			break // the kernel has no more
		}
		if err != nil {
			return fmt.Errorf("read capability %d of the bounding set: %w", c, err)
		}
		if has != 0 {
			calls = append(calls, call{unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0})
		}
	}
	if err := all.onAll(calls...); err != nil {
		return fmt.Errorf("no_new_privs and the bounding set: %w", err)
	}
	// In a step of its own, as a thread may make the calls twice: dropping from the bounding set
	// takes CAP_SETPCAP, which is gone after this. The ambient set loses whatever leaves the
	// permitted and inheritable sets.
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // Pid 0: the calling thread
	none := new([2]unix.CapUserData)
	var pinned runtime.Pinner
	defer pinned.Unpin()
	pinned.Pin(header)
	pinned.Pin(none)
	if err := all.onAll(call{unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(none)), 0}); err != nil {
		return fmt.Errorf("clear the capability sets: %w", err)
	}
	return nil
}
