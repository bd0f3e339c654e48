package confine

import "golang.org/x/sys/unix"

// nativeArch is the only ABI whose system calls a sandbox's command can make.
const nativeArch = unix.AUDIT_ARCH_AARCH64

// archAlways are the calls that only this architecture has: none.
var archAlways []uintptr

// archPaths are the calls with paths that amd64 has under another name.
var archPaths = []uintptr{unix.SYS_FSTATAT}
