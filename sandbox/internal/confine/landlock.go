package confine

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Landlock, after Documentation/userspace-api/landlock.rst: a ruleset that handles every kind of
// file system access that the kernel knows, with no rule that allows any. TCP bind and connect are
// not handled, since dialling is the worker's job and policy judges it. Where the kernel supports
// it, connecting to abstract unix sockets and signalling processes outside are denied too.
//
// Each thread gets a domain of its own from landlock_restrict_self, and the domains are siblings.
// Before erratum 2 of the ABI was fixed, a scoped thread could not even signal its sibling threads,
// which the Go runtime relies on. So signals are scoped only where it is fixed.

const erratumScopedSignal = 1 << (2 - 1)

// landlockFS returns all file system rights up to and including an ABI.
func landlockFS(abi int) uint64 {
	const (
		abi1 = unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1 // EXECUTE … MAKE_SYM
		abi2 = unix.LANDLOCK_ACCESS_FS_REFER
		abi3 = unix.LANDLOCK_ACCESS_FS_TRUNCATE
		abi5 = unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	)
	rights := uint64(abi1)
	if abi >= 2 {
		rights |= abi2
	}
	if abi >= 3 {
		rights |= abi3
	}
	if abi >= 5 {
		rights |= abi5
	}
	return rights
}

// landlockRuleset returns the ruleset for an ABI, and how many bytes of it that ABI knows.
func landlockRuleset(abi, errata int) (attr unix.LandlockRulesetAttr, size uintptr) {
	attr.Handled_access_fs = landlockFS(abi)
	switch {
	case abi >= 6:
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
		if errata&erratumScopedSignal != 0 {
			attr.Scoped |= unix.LANDLOCK_SCOPE_SIGNAL
		}
		size = unsafe.Offsetof(attr.Scoped) + unsafe.Sizeof(attr.Scoped)
	case abi >= 4:
		size = unsafe.Offsetof(attr.Handled_access_net) + unsafe.Sizeof(attr.Handled_access_net)
	default:
		size = unsafe.Sizeof(attr.Handled_access_fs)
	}
	return attr, size
}

// landlock restricts all threads. A kernel without Landlock is not an error: the root is empty and
// the filter allows no call that opens a file.
func landlock(all threads) error {
	abi, err := createRuleset(nil, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ask for the ABI: %w", err)
	}
	errata, err := createRuleset(nil, 0, unix.LANDLOCK_CREATE_RULESET_ERRATA)
	if err != nil {
		errata = 0 // the kernel is too old for this query
	}
	attr, size := landlockRuleset(abi, errata)
	fd, err := createRuleset(&attr, size, 0)
	if err != nil {
		return fmt.Errorf("create a ruleset: %w", err)
	}
	defer unix.Close(fd)
	if err := all.onAll(call{unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(fd), 0, 0}); err != nil {
		return fmt.Errorf("restrict: %w", err)
	}
	return nil
}

func createRuleset(attr *unix.LandlockRulesetAttr, size uintptr, flags uint) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(attr)), size, uintptr(flags))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
