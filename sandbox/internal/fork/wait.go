package fork

import (
	"os"

	"golang.org/x/sys/unix"
)

// Await returns when the child pid has ended, without reaping it: the number is not reused before
// Reap.
func Await(pid int) {
	var info unix.Siginfo
	over := func(flags int) bool {
		info = unix.Siginfo{}
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT|flags, nil)
		return err != unix.EINTR && (err != nil || info.Signo != 0)
	}
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		_ = unix.SetNonblock(fd, true)
		f := os.NewFile(uintptr(fd), "child")
		defer f.Close()
		if conn, err := f.SyscallConn(); err == nil {
			_ = conn.Read(func(uintptr) bool { return over(unix.WNOHANG) })
		}
	}
	// This waits only if no descriptor was left for the wait above.
	for !over(0) {
		continue
	}
}

// Reap waits for a child and reaps it.
func Reap(pid int) unix.WaitStatus {
	var ws unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &ws, 0, nil); err != unix.EINTR {
			return ws
		}
	}
}
