package confine

import (
	"slices"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/seccomp"
)

// The system call filter: a call that is not listed here kills the process. gVisor's package
// compiles the rules. Its SetFilter installs the program on all threads at once
// (SECCOMP_FILTER_FLAG_TSYNC).
//
// Rules check the arguments of calls that do many things: socket, ioctl, fcntl, prctl, clone, mmap,
// setsockopt. A filter cannot follow pointers, so calls that take paths are not allowed at all. A
// few calls return an error instead of killing the process, because libraries try them and can do
// without: package net asks a netlink socket for the name of every zone it meets.

const (
	// threadFlags are the flags that the Go runtime passes to clone. None of them makes a process
	// or a namespace.
	threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD

	socketFlags = unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC

	prSetVMA = 0x53564d41 // PR_SET_VMA: the runtime names its mappings with it
)

// any0 matches an argument of any value.
var any0 = seccomp.AnyValue{}

func oneOf(arg int, values ...uintptr) seccomp.Or {
	var or seccomp.Or
	for _, v := range values {
		rule := seccomp.PerArg{}
		for i := range arg {
			rule[i] = any0
		}
		rule[arg] = seccomp.EqualTo(v)
		or = append(or, rule)
	}
	return or
}

// always are the calls whose arguments need no check: they act on memory, time, threads, or
// descriptors that the process has.
var always = []uintptr{
	// Descriptors.
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_PREAD64, unix.SYS_PWRITE64,
	unix.SYS_LSEEK, unix.SYS_FSTAT, unix.SYS_FSYNC, unix.SYS_CLOSE,
	unix.SYS_PIPE2, unix.SYS_EVENTFD2, unix.SYS_SPLICE, unix.SYS_TEE,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2, unix.SYS_PPOLL,
	// Sockets.
	unix.SYS_BIND, unix.SYS_CONNECT, unix.SYS_LISTEN, unix.SYS_ACCEPT4, unix.SYS_SHUTDOWN,
	unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT,
	unix.SYS_SENDTO, unix.SYS_RECVFROM, unix.SYS_SENDMSG, unix.SYS_RECVMSG, unix.SYS_SENDMMSG, unix.SYS_RECVMMSG,
	// The Go runtime: memory, threads, signals, time.
	unix.SYS_MUNMAP, unix.SYS_MADVISE,
	unix.SYS_FUTEX, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY,
	unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL,
	unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_GETTIMEOFDAY,
	unix.SYS_GETRANDOM,
}

// paths are the calls that look up a path. Libraries make them for files that need not exist (time
// zones, /proc/sys), so they fail as they would in the empty root.
var paths = []uintptr{unix.SYS_OPENAT, unix.SYS_READLINKAT, unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2, unix.SYS_STATX}

// neverSockopt are the socket options that run code or reach far into the kernel, and that a proxy
// does not need.
var neverSockopt = seccomp.Or{
	sockopt(unix.SOL_SOCKET, unix.SO_ATTACH_FILTER), sockopt(unix.SOL_SOCKET, unix.SO_ATTACH_BPF),
	sockopt(unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF), sockopt(unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF),
	sockopt(unix.IPPROTO_TCP, unix.TCP_ULP), sockopt(unix.IPPROTO_TCP, unix.TCP_REPAIR),
	sockopt(unix.IPPROTO_UDP, unix.UDP_ENCAP), sockopt(unix.IPPROTO_IP, unix.IP_XFRM_POLICY), sockopt(unix.IPPROTO_IPV6, unix.IPV6_XFRM_POLICY),
}

func sockopt(level, name uintptr) seccomp.PerArg {
	return seccomp.PerArg{any0, seccomp.EqualTo(level), seccomp.EqualTo(name)}
}

// allowed returns the rules of the calls that pass.
func allowed(pid int) seccomp.SyscallRules {
	rules := seccomp.NewSyscallRules()
	for _, nr := range slices.Concat(always, archAlways, libcAlways) {
		rules.Set(nr, seccomp.MatchAll{})
	}
	noExec := seccomp.PerArg{any0, any0, seccomp.MaskedEqual(unix.PROT_EXEC, 0)}
	self := seccomp.PerArg{seccomp.EqualTo(uintptr(pid))}
	internet := func(typ uintptr, protocols ...uintptr) (or seccomp.Or) {
		for _, family := range []uintptr{unix.AF_INET, unix.AF_INET6} {
			for _, p := range protocols {
				or = append(or, seccomp.PerArg{seccomp.EqualTo(family), seccomp.MaskedEqual(^uintptr(socketFlags), typ), seccomp.EqualTo(p)})
			}
		}
		return or
	}
	for nr, rule := range map[uintptr]seccomp.SyscallRule{
		unix.SYS_SOCKET: append(internet(unix.SOCK_STREAM, 0, unix.IPPROTO_TCP),
			internet(unix.SOCK_DGRAM, 0, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6)...),
		unix.SYS_SETSOCKOPT: oneOf(1, unix.SOL_SOCKET, unix.IPPROTO_IP, unix.IPPROTO_IPV6, unix.IPPROTO_TCP,
			unix.IPPROTO_UDP, unix.IPPROTO_ICMPV6, unix.SOL_RAW),
		unix.SYS_IOCTL: oneOf(1, unix.SIOCINQ /* FIONREAD */, unix.SIOCOUTQ, unix.TUNGETIFF, unix.TUNGETFEATURES, unix.TUNGETVNETHDRSZ, unix.TUNSETQUEUE),
		unix.SYS_FCNTL: oneOf(1, unix.F_GETFL, unix.F_SETFL, unix.F_GETFD, unix.F_SETFD, unix.F_DUPFD_CLOEXEC,
			unix.F_GETPIPE_SZ, unix.F_SETPIPE_SZ),
		unix.SYS_PRCTL:        seccomp.PerArg{seccomp.EqualTo(prSetVMA)},
		unix.SYS_CLONE:        oneOf(0, append([]uintptr{threadFlags, threadFlags | unix.CLONE_SETTLS /* on amd64 */}, libcThreadFlags...)...),
		unix.SYS_MMAP:         noExec,
		unix.SYS_MPROTECT:     noExec,
		unix.SYS_TGKILL:       self,
		unix.SYS_KILL:         self,
		unix.SYS_MEMFD_CREATE: seccomp.PerArg{any0, seccomp.EqualTo(unix.MFD_CLOEXEC)},
	} {
		rules.Set(nr, rule)
	}
	return rules
}

// answered returns the calls that fail harmlessly, by their error.
func answered() map[unix.Errno]seccomp.SyscallRules {
	absent := seccomp.NewSyscallRules()
	for _, nr := range slices.Concat(paths, archPaths) {
		absent.Set(nr, seccomp.MatchAll{})
	}
	old := seccomp.NewSyscallRules()
	old.Set(unix.SYS_CLONE3, seccomp.MatchAll{}) // its flags are behind a pointer; clone's are arguments
	mptcp := seccomp.NewSyscallRules()           // net.Listen tries MPTCP before TCP
	mptcp.Set(unix.SYS_SOCKET, seccomp.Or{
		seccomp.PerArg{seccomp.EqualTo(unix.AF_INET), any0, seccomp.EqualTo(unix.IPPROTO_MPTCP)},
		seccomp.PerArg{seccomp.EqualTo(unix.AF_INET6), any0, seccomp.EqualTo(unix.IPPROTO_MPTCP)},
	})
	families := seccomp.NewSyscallRules() // as in a kernel without the other families
	families.Set(unix.SYS_SOCKET, seccomp.And{
		seccomp.PerArg{seccomp.NotEqual(unix.AF_INET)}, seccomp.PerArg{seccomp.NotEqual(unix.AF_INET6)},
	})
	return map[unix.Errno]seccomp.SyscallRules{
		unix.ENOENT: absent, unix.ENOSYS: old, unix.EPROTONOSUPPORT: mptcp, unix.EAFNOSUPPORT: families,
	}
}

// program returns the whole filter for the process pid.
func program(pid int) seccomp.Program {
	never := seccomp.NewSyscallRules()
	never.Set(unix.SYS_SETSOCKOPT, neverSockopt)
	sets := []seccomp.RuleSet{
		{Rules: never, Action: seccomp.KillProcess},
		{Rules: allowed(pid), Action: seccomp.Allow},
	}
	for _, errno := range []unix.Errno{unix.ENOENT, unix.ENOSYS, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT} {
		sets = append(sets, seccomp.RuleSet{Rules: answered()[errno], Action: seccomp.ReturnError.Code(uint16(errno))})
	}
	return seccomp.Program{RuleSets: sets, Options: seccomp.ProgramOptions{
		DefaultAction: seccomp.KillProcess,
		BadArchAction: seccomp.KillProcess,
		HotSyscalls: []uintptr{unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_WRITEV, unix.SYS_READV,
			unix.SYS_RECVMMSG, unix.SYS_SENDMMSG, unix.SYS_READ, unix.SYS_WRITE},
	}}
}
