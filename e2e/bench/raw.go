package main

// Raw system calls for the load generator.
//
// A blocking call through syscall.RawSyscall keeps its thread and its P: Go's scheduler does not
// see it, so it neither hands the P over nor wakes its monitor thread for it. The price: while one
// blocks, nothing may stop the world. A caller therefore first calls quietRuntime (no collection)
// and reserve (a P for each blocking thread and some to spare), and allocates next to nothing. The
// processes start with GODEBUG=asyncpreemptoff=1, so that no signal interrupts the calls either.

import (
	"net/netip"
	"runtime"
	"runtime/debug"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// quietEnv turns off Go's preemption signals and its changes of GOMAXPROCS.
const quietEnv = "GODEBUG=asyncpreemptoff=1,updatemaxprocs=0"

func quietRuntime() { debug.SetGCPercent(-1) }

// reserve makes room for n blocking threads. It must not be called while one blocks.
func reserve(n int) { runtime.GOMAXPROCS(n + 4) }

var (
	clockBase  = time.Now()
	clockStart = func() int64 {
		var ts unix.Timespec
		_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail for this clock
		return ts.Nano()
	}()
)

// monotonic returns CLOCK_MONOTONIC in nanoseconds, which all processes of a run share.
func monotonic() int64 { return clockStart + int64(time.Since(clockBase)) }

type sockaddr struct {
	b [unix.SizeofSockaddrInet6]byte
	n uintptr
}

func newSockaddr(ap netip.AddrPort) *sockaddr {
	s := new(sockaddr)
	port := [2]byte{byte(ap.Port() >> 8), byte(ap.Port())}
	if ap.Addr().Is4() {
		sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s.b))
		sa.Family, sa.Addr = unix.AF_INET, ap.Addr().As4()
		*(*[2]byte)(unsafe.Pointer(&sa.Port)) = port
		s.n = unix.SizeofSockaddrInet4
		return s
	}
	sa := (*unix.RawSockaddrInet6)(unsafe.Pointer(&s.b))
	sa.Family, sa.Addr = unix.AF_INET6, ap.Addr().As16()
	*(*[2]byte)(unsafe.Pointer(&sa.Port)) = port
	s.n = unix.SizeofSockaddrInet6
	return s
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func rawConnect(fd int, to *sockaddr) unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&to.b)), to.n)
	return e
}

func rawSend(fd int, b []byte) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}

func rawRecv(fd int, b []byte) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0, 0, 0)
	return int(n), e
}

func rawAccept(fd, flags int) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), 0, 0, uintptr(flags|unix.SOCK_CLOEXEC), 0, 0)
	return int(n), e
}

func rawClose(fd int) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

type mmsg struct {
	hdr unix.Msghdr
	n   uint32
	_   uint32
}

func rawRecvmmsg(fd int, m []mmsg) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), unix.MSG_WAITFORONE, 0, 0)
	return int(n), e
}

func rawSendmmsg(fd int, m []mmsg) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}

func setTimeouts(fd int, d time.Duration) {
	tv := unix.NsecToTimeval(int64(d))
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv) // cannot fail on a socket
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
}

// tcpSocket returns a blocking TCP socket that uses cubic where the kernel allows it.
func tcpSocket(fam int, limit time.Duration) (int, error) {
	fd, err := unix.Socket(fam, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	setTimeouts(fd, limit)
	_ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, congestion) // the info operation reports it
	return fd, nil
}

func setNoDelay(fd int) { _ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) }

// abort closes with a reset, so that nothing of one measurement drains into the next.
func abort(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	rawClose(fd)
}
