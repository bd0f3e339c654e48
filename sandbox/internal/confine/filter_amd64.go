package confine

import "golang.org/x/sys/unix"

// nativeArch is the only ABI whose system calls a sandbox's command can make.
const nativeArch = unix.AUDIT_ARCH_X86_64

// archAlways are the older calls that amd64 still has and x/sys still uses.
var archAlways = []uintptr{unix.SYS_EPOLL_WAIT, unix.SYS_POLL}

// archPaths are the calls with paths that arm64 has under another name, or not at all.
var archPaths = []uintptr{unix.SYS_OPEN, unix.SYS_STAT, unix.SYS_LSTAT, unix.SYS_ACCESS, unix.SYS_READLINK, unix.SYS_NEWFSTATAT}
