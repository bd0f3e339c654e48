package confine

import "golang.org/x/sys/unix"

// nativeArch is the one ABI whose system calls the command of a sandbox has.
const nativeArch = unix.AUDIT_ARCH_X86_64

// archAlways are the older names that amd64 still has and x/sys still uses.
var archAlways = []uintptr{unix.SYS_EPOLL_WAIT, unix.SYS_POLL}

// archPaths are the calls with paths that have another name, or none, on arm64.
var archPaths = []uintptr{unix.SYS_OPEN, unix.SYS_STAT, unix.SYS_LSTAT, unix.SYS_ACCESS, unix.SYS_READLINK, unix.SYS_NEWFSTATAT}
