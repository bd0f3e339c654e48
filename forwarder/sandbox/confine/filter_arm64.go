package confine

import "golang.org/x/sys/unix"

// archAlways are calls that only this architecture has: none.
var archAlways []uintptr

// archPaths are the calls with paths that have another name on amd64.
var archPaths = []uintptr{unix.SYS_FSTATAT}
