package confine

import "golang.org/x/sys/unix"

// nativeArch is the one ABI whose system calls the command of a sandbox has.
const nativeArch = unix.AUDIT_ARCH_AARCH64

// archAlways are calls that only this architecture has: none.
var archAlways []uintptr

// archPaths are the calls with paths that have another name on amd64.
var archPaths = []uintptr{unix.SYS_FSTATAT}
