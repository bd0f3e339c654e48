package confine

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var helpers = map[string]func() error{
	"wait":      helpWait,
	"forbidden": helpForbidden,
	"answered":  helpAnswered,
	"stages":    helpStages,
	"fds":       helpFDs,
	"null":      helpNull,
	"abstract":  helpAbstract,
	"busy":      helpBusy,
	"churn":     helpChurn,
	"panic":     helpPanic,
	"fault":     helpFault,
	"command":   commandHelper,
}

var stdio = []int{0, 1, 2}

// apply is Enter and seal together.
func apply(cfg Config) error {
	seal, err := Enter(cfg)
	if err != nil {
		return err
	}
	return seal()
}

// crowd makes threads that exist before apply: some asleep, some in a system call.
func crowd() {
	var up sync.WaitGroup
	for range 6 {
		up.Add(1)
		go func() {
			runtime.LockOSThread()
			up.Done()
			select {}
		}()
	}
	var pipe [2]int
	_ = unix.Pipe2(pipe[:], unix.O_CLOEXEC)
	up.Add(1)
	go func() {
		runtime.LockOSThread()
		up.Done()
		_, _ = unix.Read(pipe[0], make([]byte, 1)) // until the process ends or the pipe is closed
		select {}
	}()
	up.Wait()
}

func helpWait() error {
	crowd()
	began := time.Now()
	if err := apply(Config{KeepFDs: stdio}); err != nil {
		return err
	}
	fmt.Println("Apply took", time.Since(began).Round(time.Millisecond))
	return pause("confined")
}

// forbidden are calls that must kill the process. With these arguments each would succeed, or fail
// at once, if it were let through.
var forbidden = map[string]func(){
	"unshare":                 func() { try(unix.SYS_UNSHARE, unix.CLONE_NEWNET) },
	"setns":                   func() { try(unix.SYS_SETNS, 0, 0) },
	"execve":                  func() { try(unix.SYS_EXECVE, ptr("/proc/self/exe"), 0, 0) },
	"execveat":                func() { try(unix.SYS_EXECVEAT, 0, ptr(""), 0, 0, unix.AT_EMPTY_PATH) },
	"fork by clone":           func() { try(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0) },
	"a thread in a new netns": func() { try(unix.SYS_CLONE, threadFlags|unix.CLONE_NEWNET, 0) },
	"ptrace":                  func() { try(unix.SYS_PTRACE, unix.PTRACE_TRACEME) },
	"process_vm_readv":        func() { try(unix.SYS_PROCESS_VM_READV, 1) },
	"open_by_handle_at":       func() { try(unix.SYS_OPEN_BY_HANDLE_AT, 0, 0, 0) },
	"mount":                   func() { try(unix.SYS_MOUNT) },
	"umount2":                 func() { try(unix.SYS_UMOUNT2) },
	"chroot":                  func() { try(unix.SYS_CHROOT, ptr("/")) },
	"unlinkat":                func() { try(unix.SYS_UNLINKAT, 0, ptr("x"), 0) },
	"mkdirat":                 func() { try(unix.SYS_MKDIRAT, 0, ptr("x"), 0) },
	"bpf":                     func() { try(unix.SYS_BPF) },
	"io_uring_setup":          func() { try(unix.SYS_IO_URING_SETUP) },
	"perf_event_open":         func() { try(unix.SYS_PERF_EVENT_OPEN) },
	"userfaultfd":             func() { try(unix.SYS_USERFAULTFD) },
	"keyctl":                  func() { try(unix.SYS_KEYCTL) },
	"init_module":             func() { try(unix.SYS_INIT_MODULE) },
	"setuid":                  func() { try(unix.SYS_SETUID, 0) },
	"capset":                  func() { try(unix.SYS_CAPSET, 0, 0) },
	"seccomp":                 func() { try(unix.SYS_SECCOMP, 2, 0, 0) },
	"prctl of dumpable":       func() { try(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1) },
	"kill of another":         func() { try(unix.SYS_KILL, ^uintptr(0), 0) },
	"tgkill of another":       func() { try(unix.SYS_TGKILL, 2, 2, 0) },
	"executable memory": func() {
		try(unix.SYS_MMAP, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON, ^uintptr(0), 0)
	},
	"memory made executable":     func() { try(unix.SYS_MPROTECT, 0, 0, unix.PROT_EXEC) },
	"memfd without cloexec":      func() { try(unix.SYS_MEMFD_CREATE, ptr("x"), 0) },
	"a raw socket":               func() { try(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP) },
	"an SCTP socket":             func() { try(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP) },
	"a UDP-Lite socket":          func() { try(unix.SYS_SOCKET, unix.AF_INET6, unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE) },
	"a socketpair":               func() { try(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_STREAM, 0) },
	"a filter on a socket":       func() { try(unix.SYS_SETSOCKOPT, 0, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, 0, 0) },
	"an upper layer on TCP":      func() { try(unix.SYS_SETSOCKOPT, 0, unix.IPPROTO_TCP, unix.TCP_ULP, 0, 0) },
	"an option of netlink":       func() { try(unix.SYS_SETSOCKOPT, 0, unix.SOL_NETLINK, 1, 0, 0) },
	"ioctl TIOCSTI":              func() { try(unix.SYS_IOCTL, 0, unix.TIOCSTI, 0) },
	"ioctl TUNSETIFF":            func() { try(unix.SYS_IOCTL, 0, unix.TUNSETIFF, 0) },
	"fcntl F_SETOWN":             func() { try(unix.SYS_FCNTL, 0, unix.F_SETOWN, 1) },
	"a call of another ABI":      func() { try(0x40000000|unix.SYS_GETPID, 0) },
	"a call that does not exist": func() { try(100000) },
}

func try(nr uintptr, args ...uintptr) {
	var a [6]uintptr
	copy(a[:], args)
	_, _, _ = unix.RawSyscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
}

func ptr(s string) uintptr { return uintptr(unsafe.Pointer(unsafe.StringData(s + "\x00"))) }

func helpForbidden() error {
	if err := apply(Config{KeepFDs: stdio}); err != nil {
		return err
	}
	fmt.Println("confined")
	forbidden[os.Args[1]]()
	fmt.Println("alive")
	return nil
}

// helpAnswered tries the calls that fail harmlessly.
func helpAnswered() error {
	if err := apply(Config{KeepFDs: stdio}); err != nil {
		return err
	}
	for _, name := range []string{"/", ".", "..", "/etc/passwd", "/proc/self/status", "/dev/null", "/etc/localtime"} {
		if f, err := os.Open(name); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("opening %s: %v, %v", name, f, err)
		}
		if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("stat of %s: %v", name, err)
		}
	}
	if f, err := os.Create("/x"); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("creating a file: %v, %v", f, err)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0); errno != unix.ENOSYS {
		return fmt.Errorf("clone3: %v", errno)
	}
	if _, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP); err != unix.EPROTONOSUPPORT {
		return fmt.Errorf("an MPTCP socket: %v", err)
	}
	for _, family := range []int{unix.AF_UNIX, unix.AF_NETLINK, unix.AF_PACKET, unix.AF_ALG, unix.AF_VSOCK, unix.AF_XDP} {
		for _, typ := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_RAW} {
			if _, err := unix.Socket(family, typ, 0); err != unix.EAFNOSUPPORT {
				return fmt.Errorf("a socket of the family %d and type %d: %v", family, typ, err)
			}
		}
	}
	if list, err := net.Interfaces(); !errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("listing the interfaces: %v, %v", list, err)
	}
	fmt.Println("fine")
	return nil
}

// helpStages runs stage by stage and checks what the filter would hide.
func helpStages() error {
	all, err := openThreads()
	if err != nil {
		return err
	}
	defer all.close()
	if err := emptyRoot(); err != nil {
		return err
	}
	entries, err := os.ReadDir("/")
	if err != nil || len(entries) != 0 {
		return fmt.Errorf("the root has %v, %v", entries, err)
	}
	if up, err := os.ReadDir("/../.."); err != nil || len(up) != 0 {
		return fmt.Errorf("above the root is %v, %v", up, err)
	}
	if err := os.Mkdir("/x", 0o755); !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
		return fmt.Errorf("making a directory: %v", err)
	}
	if err := limit(); err != nil {
		return err
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || n != 0 {
		return fmt.Errorf("dumpable is %d, %v", n, err)
	}
	if err := dropPrivileges(all); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT, ""); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("mounting without capabilities: %v", err)
	}
	if err := landlock(all); err != nil {
		return err
	}
	if _, err := createRuleset(nil, 0, unix.LANDLOCK_CREATE_RULESET_VERSION); err != nil {
		fmt.Println("no Landlock:", err)
		return nil
	}
	if _, err := os.ReadDir("/"); !errors.Is(err, unix.EACCES) {
		return fmt.Errorf("reading the root under Landlock: %v", err)
	}
	fmt.Println("fine")
	return nil
}

// helpFDs is given descriptors 3 to 6 and keeps 4.
func helpFDs() error {
	own, err := os.Open("/etc/passwd")
	if err != nil {
		return err
	}
	if err := apply(Config{KeepFDs: append([]int{4}, stdio...)}); err != nil {
		return err
	}
	var open []int
	for fd := range 200 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			open = append(open, fd)
		}
	}
	if _, err := own.Read(make([]byte, 1)); !errors.Is(err, unix.EBADF) {
		return fmt.Errorf("reading a closed descriptor: %v", err)
	}
	fmt.Println(open)
	return pause("confined")
}

// helpNull keeps only descriptor 1.
func helpNull() error {
	if err := apply(Config{KeepFDs: []int{1}}); err != nil {
		return err
	}
	if n, err := unix.Read(0, make([]byte, 10)); n != 0 || err != nil {
		return fmt.Errorf("standard input gives %d bytes, %v", n, err)
	}
	if n, err := unix.Write(2, []byte("lost")); n != 4 || err != nil {
		return fmt.Errorf("standard error takes %d bytes, %v", n, err)
	}
	fmt.Println("fine")
	return nil
}

// helpAbstract is given an unconnected unix socket and an abstract name.
func helpAbstract() error {
	if err := apply(Config{KeepFDs: append([]int{3}, stdio...)}); err != nil {
		return err
	}
	fmt.Println(unix.Connect(3, &unix.SockaddrUnix{Name: os.Args[1]}))
	return nil
}

// helpBusy does what a worker's runtime and network code do, for a while.
func helpBusy() error {
	crowd()
	if err := apply(Config{KeepFDs: stdio}); err != nil {
		return err
	}
	var wg sync.WaitGroup
	failed := make(chan error, 100)
	work := func(f func() error) {
		wg.Go(func() {
			if err := f(); err != nil {
				failed <- err
			}
		})
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		work(func() error { return echoTCP(host) })
		work(func() error { return echoUDP(host) })
	}
	for range 4 {
		work(func() error { // garbage, timers, and loops that a signal must preempt
			var keep [][]byte
			for i := range 200 {
				keep = append(keep, make([]byte, 100_000))
				if i%50 == 0 {
					keep = nil
					runtime.GC()
				}
				time.Sleep(50 * time.Microsecond)
				for j := 0; j < 1_000_000; j++ {
					_ = j
				}
			}
			runtime.KeepAlive(keep)
			return nil
		})
		work(func() error { // threads that start and end
			for range 20 {
				done := make(chan struct{})
				go func() {
					runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
					close(done)
				}()
				<-done
			}
			return nil
		})
	}
	work(descriptors)
	wg.Wait()
	select {
	case err := <-failed:
		return err
	default:
	}
	if !strings.Contains(time.Now().Format(time.RFC1123), ":") {
		return errors.New("no time")
	}
	return pause("fine")
}

// helpChurn makes calls on all threads while threads start others and end.
func helpChurn() error {
	all, err := openThreads()
	if err != nil {
		return err
	}
	defer all.close()
	crowd()
	var churning sync.WaitGroup
	for range 4 {
		churning.Go(func() { // ends after a fixed number of threads: until then a listing may find new ones
			for range 25 {
				done := make(chan struct{})
				go func() {
					runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
					close(done)
				}()
				<-done
			}
		})
	}
	if err := all.onAll(call{unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0}); err != nil {
		return err
	}
	churning.Wait()
	// A call that fails on the other threads is not tried on the caller's, and its error is
	// returned.
	if err := all.onAll(call{unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 2, 0}); err != unix.EINVAL {
		return fmt.Errorf("a call that fails: %v", err)
	}
	return pause("fine")
}

// helpPanic and helpFault end the way a worker with a bug would.
func helpPanic() error {
	if err := apply(Config{KeepFDs: stdio}); err != nil {
		return err
	}
	panic("last words")
}

func helpFault() error {
	if err := apply(Config{KeepFDs: stdio}); err != nil {
		return err
	}
	var none *Config
	none.KeepFDs = stdio
	return nil
}

func echoTCP(host string) error {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		if host == "::1" {
			return nil // a host without IPv6
		}
		return err
	}
	defer l.Close()
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
	for range 50 {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 10*time.Second)
		if err != nil {
			return err
		}
		msg := make([]byte, 200_000)
		go func() { _, _ = c.Write(msg); _ = c.(*net.TCPConn).CloseWrite() }()
		n, err := io.Copy(io.Discard, c)
		if c.Close(); err != nil || n != int64(len(msg)) {
			return fmt.Errorf("tcp %s: %d bytes, %v", host, n, err)
		}
	}
	return nil
}

func echoUDP(host string) error {
	a, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
	if err != nil {
		if host == "::1" {
			return nil
		}
		return err
	}
	defer a.Close()
	c, err := net.Dial("udp", a.LocalAddr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	buf := make([]byte, 100)
	for range 200 {
		if _, err := c.Write([]byte("question")); err != nil {
			return err
		}
		_, from, err := a.ReadFrom(buf)
		if err != nil {
			return err
		}
		if _, err := a.WriteTo([]byte("answer"), from); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(buf); err != nil {
			return err
		}
	}
	return nil
}

// descriptors makes and uses every kind of descriptor that a worker makes itself.
func descriptors() error {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("epoll_create1: %w", err)
	}
	ev, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, ev, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(ev)}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	if _, err := unix.Write(ev, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		return fmt.Errorf("write to an eventfd: %w", err)
	}
	if n, err := unix.EpollWait(ep, make([]unix.EpollEvent, 4), 1000); n != 1 || err != nil {
		return fmt.Errorf("epoll_wait: %d, %w", n, err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(ev), Events: unix.POLLIN}}, 1000); n != 1 || err != nil {
		return fmt.Errorf("poll: %d, %w", n, err)
	}
	var a, b [2]int
	if err := errors.Join(unix.Pipe2(a[:], unix.O_CLOEXEC|unix.O_NONBLOCK), unix.Pipe2(b[:], unix.O_CLOEXEC|unix.O_NONBLOCK)); err != nil {
		return fmt.Errorf("pipe2: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(a[0]), unix.F_SETPIPE_SZ, 1<<16); err != nil {
		return fmt.Errorf("F_SETPIPE_SZ: %w", err)
	}
	if _, err := unix.Writev(a[1], [][]byte{[]byte("one"), []byte("two")}); err != nil {
		return fmt.Errorf("writev: %w", err)
	}
	if n, err := unix.Tee(a[0], b[1], 100, unix.SPLICE_F_NONBLOCK); n != 6 || err != nil {
		return fmt.Errorf("tee: %d, %w", n, err)
	}
	if n, err := unix.IoctlGetInt(b[0], unix.SIOCINQ); n != 6 || err != nil {
		return fmt.Errorf("FIONREAD: %d, %w", n, err)
	}
	mem, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	if n, err := unix.Splice(b[0], nil, mem, nil, 100, 0); n != 6 || err != nil {
		return fmt.Errorf("splice: %d, %w", n, err)
	}
	f := os.NewFile(uintptr(mem), "memory")
	if _, err := f.WriteAt([]byte("x"), 0); err != nil {
		return err
	}
	if s, err := io.ReadAll(io.NewSectionReader(f, 0, 100)); string(s) != "xnetwo" || err != nil {
		return fmt.Errorf("a memory file holds %q, %w", s, err)
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil && !errors.Is(err, unix.EACCES) { // net.ipv4.ping_group_range
		return fmt.Errorf("a ping socket: %w", err)
	}
	for _, fd := range []int{ep, ev, a[0], a[1], b[0], b[1], s} {
		_ = unix.Close(fd)
	}
	return f.Close()
}
