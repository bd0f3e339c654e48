package confine

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system call filter for everything that runs in a sandbox, as opposed to the worker's.
//
// A network namespace confines the families that have one. AF_VSOCK leads to the hypervisor, or to
// virtual machines, from any namespace; AF_ALG, AF_QIPCRTR, AF_TIPC and others reach kernel code
// that a sandbox has no use for. So only sockets of families that programs need and the namespace
// confines can be made. io_uring makes sockets without the system call that the filter checks, so
// it is refused.
//
// The command does not get the caller's terminal, but it may be handed one as a descriptor, and a
// terminal takes more than output. TIOCSTI types into it (before Linux 6.2, or with
// dev.tty.legacy_tiocsti=1), TIOCLINUX pastes into a virtual console, and the caller's shell,
// outside, runs what was typed. TIOCSETD changes what the terminal does with its bytes. All three
// are refused.
//
// System calls of other ABIs have other numbers, which a filter by number would not recognise. So
// the calls of 32-bit programs and of x32 do not exist in here.
//
// The filter is written by hand, since seccomp.Program has no ranges of numbers, and since
// SetFilter sets no_new_privs, which would disable set-user-ID programs in the sandbox. Instead the
// stage installs it by its privilege over the sandbox's own user namespace.

// commandFamilies are the address families that sockets can be made of.
var commandFamilies = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK, unix.AF_PACKET}

const (
	tiocSetd  = 0x5423 // TIOCSETD, which x/sys/unix lacks on some architectures
	tiocLinux = 0x541C // TIOCLINUX
)

// commandIoctls are the refused requests. The kernel uses only the low 32 bits of a request, and so
// does the filter (CVE-2019-7303).
var commandIoctls = []uint32{unix.TIOCSTI, tiocLinux, tiocSetd}

// foreignABI is the bit set in x32's numbers. No number of another ABI is as large.
const foreignABI = 0x40000000

// Offsets in struct seccomp_data of linux/seccomp.h, on a little-endian machine.
const (
	offNr   = 0
	offArch = 4
	offArg0 = 16
	offArg1 = 24
)

// FilterCommand installs the filter on every thread of the process; the children inherit it. It
// requires CAP_SYS_ADMIN in the process's user namespace.
func FilterCommand() error {
	filter := commandFilter()
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("filter the command's system calls: %w", errno)
	}
	if r != 0 {
		return fmt.Errorf("filter the command's system calls: thread %d has a filter of its own", r)
	}
	return nil
}

func commandFilter() []unix.SockFilter {
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	give := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	fail := func(errno unix.Errno) unix.SockFilter { return give(unix.SECCOMP_RET_ERRNO | uint32(errno)) }
	allow := give(unix.SECCOMP_RET_ALLOW)
	// when jumps over skip instructions if the comparison holds for the loaded value, and falls
	// through otherwise.
	when := func(op uint16, value uint32, skip int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | op | unix.BPF_K, K: value, Jt: uint8(skip)}
	}
	// oneOf ends in hit if the loaded value is listed, and in miss otherwise.
	oneOf := func(values []uint32, hit, miss unix.SockFilter) (out []unix.SockFilter) {
		for i, v := range values {
			out = append(out, when(unix.BPF_JEQ, v, len(values)-i))
		}
		return append(out, miss, hit)
	}
	families := append([]unix.SockFilter{load(offArg0)}, oneOf(commandFamilies, allow, fail(unix.EAFNOSUPPORT))...)
	ioctls := append([]unix.SockFilter{load(offArg1)}, oneOf(commandIoctls, fail(unix.EPERM), allow)...)

	head := []unix.SockFilter{
		load(offArch),
		when(unix.BPF_JEQ, nativeArch, 1),
		fail(unix.ENOSYS),
		load(offNr),
		when(unix.BPF_JGE, foreignABI, 5), // to the ENOSYS below
		when(unix.BPF_JEQ, unix.SYS_IO_URING_SETUP, 4),
		when(unix.BPF_JEQ, unix.SYS_SOCKET, 4), // to families
		when(unix.BPF_JEQ, unix.SYS_SOCKETPAIR, 3),
		when(unix.BPF_JEQ, unix.SYS_IOCTL, 2+len(families)), // to ioctls
		allow,
		fail(unix.ENOSYS),
	}
	return append(append(head, families...), ioctls...)
}
