//go:build cgo

package confine

import "golang.org/x/sys/unix"

// In a binary with cgo the C library starts the threads: by clone, since clone3 fails, with flags
// of its own and memory from its own allocator.
var (
	libcAlways      = []uintptr{unix.SYS_BRK, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ}
	libcThreadFlags = []uintptr{threadFlags | unix.CLONE_SETTLS | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID}
)
