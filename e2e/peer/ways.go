package main

// Ways out of a sandbox that do not use the network: system calls that reach past it, and sockets
// with a path.

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tried holds the outcome of each attempt: an errno's name, or "done".
type tried map[string]string

func (w tried) call(name string, nr uintptr, args ...uintptr) {
	var a [6]uintptr
	copy(a[:], args)
	r, _, errno := unix.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
	w[name] = "done"
	if errno != 0 {
		w[name] = unix.ErrnoName(errno)
	} else if nr == unix.SYS_SOCKET || nr == unix.SYS_IO_URING_SETUP {
		_ = unix.Close(int(r))
	}
}

// ways tries the system calls or, given paths, to connect to each.
func ways(paths []string) error {
	w := tried{}
	for _, path := range paths {
		w[path] = connectPath(path)
	}
	if len(paths) > 0 {
		say(w)
		return nil
	}
	for name, family := range map[string]uintptr{
		"unix": unix.AF_UNIX, "inet": unix.AF_INET, "inet6": unix.AF_INET6,
		"vsock": unix.AF_VSOCK, "alg": unix.AF_ALG, "tipc": unix.AF_TIPC, "bluetooth": unix.AF_BLUETOOTH,
		"vsock with high bits": 1<<32 | unix.AF_VSOCK,
	} {
		typ := uintptr(unix.SOCK_STREAM)
		if family == unix.AF_ALG {
			typ = unix.SOCK_SEQPACKET
		}
		w.call(name, unix.SYS_SOCKET, family, typ)
	}
	w.call("netlink", unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW)
	var params [120]byte
	w.call("io_uring", unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params[0])))
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err == nil {
		defer tty.Close()
		key := byte('x')
		for name, request := range map[string]uintptr{"TIOCSTI": unix.TIOCSTI, "TIOCSTI with high bits": 1<<40 | unix.TIOCSTI} {
			w.call(name, unix.SYS_IOCTL, tty.Fd(), request, uintptr(unsafe.Pointer(&key)))
		}
		sub := [2]byte{3, 0} // paste the selection
		w.call("TIOCLINUX", unix.SYS_IOCTL, tty.Fd(), 0x541C, uintptr(unsafe.Pointer(&sub[0])))
	}
	say(w)
	return nil
}

// connectPath connects a socket to a path: a stream socket or, if the one there is of another type,
// one of that type.
func connectPath(path string) string {
	var err error
	for _, typ := range []int{unix.SOCK_STREAM, unix.SOCK_SEQPACKET, unix.SOCK_DGRAM} {
		fd, serr := unix.Socket(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0)
		if serr != nil {
			return fmt.Sprint(serr)
		}
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		_ = unix.Close(fd)
		if err != unix.EPROTOTYPE {
			break
		}
	}
	if errno, ok := err.(unix.Errno); ok {
		return unix.ErrnoName(errno)
	}
	return "done"
}
