package confine

import (
	"fmt"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// verdict runs the filter as the kernel does.
func verdict(t *testing.T, arch, nr uint32, args ...uint64) uint32 {
	t.Helper()
	data := map[uint32]uint32{offNr: nr, offArch: arch}
	for i, a := range args {
		data[offArg0+8*uint32(i)], data[offArg0+8*uint32(i)+4] = uint32(a), uint32(a>>32)
	}
	filter := commandFilter()
	var a uint32
	for pc := 0; pc < len(filter); pc++ {
		in := filter[pc]
		hit := false
		switch in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = data[in.K]
			continue
		case unix.BPF_RET | unix.BPF_K:
			return in.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			hit = a == in.K
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			hit = a >= in.K
		default:
			t.Fatalf("instruction %d is %#v", pc, in)
		}
		if hit {
			pc += int(in.Jt)
		} else {
			pc += int(in.Jf)
		}
	}
	t.Fatal("the filter has no end")
	return 0
}

func TestCommandFilterJudgesByTheKernelsWords(t *testing.T) {
	const allow = unix.SECCOMP_RET_ALLOW
	refused := func(e unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(e) }
	for _, row := range []struct {
		name     string
		arch, nr uint32
		args     []uint64
		want     uint32
	}{
		{"a call nobody looks at", nativeArch, unix.SYS_READ, nil, allow},
		{"a unix socket", nativeArch, unix.SYS_SOCKET, []uint64{unix.AF_UNIX}, allow},
		{"IPv4", nativeArch, unix.SYS_SOCKET, []uint64{unix.AF_INET}, allow},
		{"IPv6", nativeArch, unix.SYS_SOCKET, []uint64{unix.AF_INET6}, allow},
		{"netlink", nativeArch, unix.SYS_SOCKET, []uint64{unix.AF_NETLINK}, allow},
		{"packets", nativeArch, unix.SYS_SOCKET, []uint64{unix.AF_PACKET}, allow},
		{"a pair of unix sockets", nativeArch, unix.SYS_SOCKETPAIR, []uint64{unix.AF_UNIX}, allow},
		{"AF_VSOCK", nativeArch, unix.SYS_SOCKET, []uint64{unix.AF_VSOCK}, refused(unix.EAFNOSUPPORT)},
		{"AF_VSOCK with bits that the kernel cuts off", nativeArch, unix.SYS_SOCKET, []uint64{1<<32 | unix.AF_VSOCK}, refused(unix.EAFNOSUPPORT)},
		{"a pair of AF_VSOCK", nativeArch, unix.SYS_SOCKETPAIR, []uint64{unix.AF_VSOCK}, refused(unix.EAFNOSUPPORT)},
		{"AF_TIPC", nativeArch, unix.SYS_SOCKET, []uint64{unix.AF_TIPC}, refused(unix.EAFNOSUPPORT)},
		{"AF_UNSPEC", nativeArch, unix.SYS_SOCKET, []uint64{0}, refused(unix.EAFNOSUPPORT)},
		{"io_uring", nativeArch, unix.SYS_IO_URING_SETUP, nil, refused(unix.ENOSYS)},
		{"a terminal's size", nativeArch, unix.SYS_IOCTL, []uint64{0, unix.TIOCGWINSZ}, allow},
		{"typing into a terminal", nativeArch, unix.SYS_IOCTL, []uint64{0, unix.TIOCSTI}, refused(unix.EPERM)},
		{"typing with bits that the kernel cuts off", nativeArch, unix.SYS_IOCTL, []uint64{0, 7<<32 | unix.TIOCSTI}, refused(unix.EPERM)},
		{"pasting into a console", nativeArch, unix.SYS_IOCTL, []uint64{0, tiocLinux}, refused(unix.EPERM)},
		{"another line discipline", nativeArch, unix.SYS_IOCTL, []uint64{0, tiocSetd}, refused(unix.EPERM)},
		{"a number on the descriptor's side", nativeArch, unix.SYS_IOCTL, []uint64{unix.TIOCSTI, unix.TIOCGWINSZ}, allow},
		{"x32's socket", nativeArch, foreignABI | unix.SYS_SOCKET, []uint64{unix.AF_INET}, refused(unix.ENOSYS)},
		{"i386's socketcall", unix.AUDIT_ARCH_I386, 102, nil, refused(unix.ENOSYS)},
		{"i386's number of a call that is allowed", unix.AUDIT_ARCH_I386, unix.SYS_READ, nil, refused(unix.ENOSYS)},
		{"32-bit ARM", unix.AUDIT_ARCH_ARM, 281, nil, refused(unix.ENOSYS)},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := verdict(t, row.arch, row.nr, row.args...); got != row.want {
				t.Errorf("the filter returns %#x, want %#x", got, row.want)
			}
		})
	}
}

// commandHelper installs the filter, then tries calls on a thread that existed before and in a
// program that it starts.
func commandHelper() error {
	try := make(chan string)
	begin := make(chan struct{})
	go func() {
		<-begin
		try <- commandAttempts()
	}()
	if err := FilterCommand(); err != nil {
		return err
	}
	close(begin)
	fmt.Println(<-try)
	fmt.Println(commandAttempts())
	return nil
}

func commandAttempts() string {
	var out string
	attempt := func(name string, nr uintptr, args ...uintptr) {
		var a [3]uintptr
		copy(a[:], args)
		r, _, errno := unix.Syscall(nr, a[0], a[1], a[2])
		if errno == 0 && nr == unix.SYS_SOCKET {
			_ = unix.Close(int(r))
		}
		out += fmt.Sprintf("%s=%d ", name, int(errno))
	}
	attempt("unix", unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM)
	attempt("vsock", unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM)
	attempt("vsockHigh", unix.SYS_SOCKET, 1<<32|unix.AF_VSOCK, unix.SOCK_STREAM)
	attempt("alg", unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET)
	attempt("x32", foreignABI|unix.SYS_GETPID)
	var params [120]byte
	attempt("uring", unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params[0])))
	attempt("sti", unix.SYS_IOCTL, 0, 1<<40|unix.TIOCSTI, uintptr(unsafe.Pointer(&params[0])))
	return out
}

func TestCommandFilterHoldsOnEveryThread(t *testing.T) {
	h := start(t, "command", nil)
	want := fmt.Sprintf("unix=0 vsock=%[1]d vsockHigh=%[1]d alg=%[1]d x32=%[2]d uring=%[2]d sti=%[3]d ",
		int(unix.EAFNOSUPPORT), int(unix.ENOSYS), int(unix.EPERM))
	h.want(want)
	h.want(want)
	if ws := h.end(); ws.ExitStatus() != 0 {
		t.Errorf("the helper ended with %d", ws.ExitStatus())
	}
}
