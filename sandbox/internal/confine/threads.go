package confine

import (
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls on every thread.
//
// Linux keeps credentials, no_new_privs and Landlock domains per thread, and a Go program has
// several threads before main runs. syscall.AllThreadsSyscall changes them all, but not in a binary
// with cgo, which a plain `go build` makes wherever there is a C compiler. So this file finds the
// threads and makes each of them act, the same way in both kinds of binary:
//
//	caller                                   every other thread, one after the other
//	lists /proc/self/task
//	tgkill(signal) ────────────────────────► onSignal: makes the calls of order
//	reads the result ◄──────────── pipe ──── writes what the last one returned
//	again, until a listing holds no thread that has not answered, twice in a row
//	makes the calls itself
//
// A new thread inherits the effect of the calls from the thread that clones it. All threads of the
// process are cloned by the Go runtime, and none by the caller, which is locked to its goroutine:
// the runtime's template thread clones for such a thread. So a thread that a listing misses, and
// that inherited nothing, comes from one that had not answered yet. Once all have answered, no such
// thread can appear.
//
// The handler is assembly that needs no Go stack, no goroutine and no C library: it may run on a
// thread that has just been cloned.

// allThreadsSignal is the signal that glibc, musl and the Go runtime keep unblocked for this very
// purpose (SIGSETXID). The runtime's handler is put back afterwards.
const allThreadsSignal = 33

// call is a system call that returns 0 unless it fails. A thread may make the calls of one order
// twice: once by inheriting from its creator, and once itself.
type call struct{ trap, a1, a2, a3 uintptr }

// order is what onSignal executes. A handler can read nothing but a global variable. Only onAll
// writes it, while no signal is in flight.
var order struct {
	calls  *call // made one after the other, until one fails
	n      uintptr
	result uintptr // the end of the pipe to write the last return value to
}

// onSignalPC and restorerPC are the addresses of the assembly. An arm64 kernel has a trampoline of
// its own, so there restorerPC is 0.
func onSignalPC() uintptr
func restorerPC() uintptr

// threads is the list of the process's threads. It stays open because the path to it goes away with
// the root.
type threads struct{ dir int }

func openThreads() (threads, error) {
	dir, err := unix.Open("/proc/self/task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return threads{-1}, fmt.Errorf("open the list of threads: %w", err)
	}
	return threads{dir}, nil
}

func (t threads) close() { _ = unix.Close(t.dir) }

// onAll makes system calls, in their order, on every thread of the process, the caller's last.
// After an error some threads have made them and others have not. The memory that the arguments
// point to must be pinned. Calls of onAll must not overlap.
func (t threads) onAll(calls ...call) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	order.calls, order.n, order.result = &calls[0], uintptr(len(calls)), uintptr(pipe[1])
	restore, err := handle()
	if err != nil {
		return fmt.Errorf("handle the signal to threads: %w", err)
	}
	defer restore()
	answered := map[string]bool{}
	for clean := 0; clean < 2; {
		clean++
		names, err := t.list()
		if err != nil {
			return fmt.Errorf("list the threads: %w", err)
		}
		for _, name := range names {
			if answered[name] {
				continue
			}
			clean, answered[name] = 0, true
			if err := t.tell(name, pipe[0]); err != nil {
				return err
			}
		}
	}
	for _, c := range calls {
		if _, _, errno := unix.RawSyscall6(c.trap, c.a1, c.a2, c.a3, 0, 0, 0); errno != 0 {
			return errno
		}
	}
	return nil
}

// tell makes one thread make the calls, unless it is the caller's or ends first.
func (t threads) tell(name string, result int) error {
	tid, err := t.number(name)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || tid == unix.Gettid() {
		return nil
	}
	if err != nil {
		return fmt.Errorf("thread %s: %w", name, err)
	}
	for sig := syscall.Signal(allThreadsSignal); ; sig = 0 { // 0 checks whether the thread is still there
		switch err := unix.Tgkill(unix.Getpid(), tid, sig); {
		case err == unix.ESRCH:
			return nil
		case err != nil:
			return fmt.Errorf("signal thread %d: %w", tid, err)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(result), Events: unix.POLLIN}}, threadPatience)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("wait for thread %d: %w", tid, err)
		}
		if n <= 0 {
			continue
		}
		var returned int
		if _, err := unix.Read(result, unsafe.Slice((*byte)(unsafe.Pointer(&returned)), unsafe.Sizeof(returned))); err != nil {
			return fmt.Errorf("thread %d: %w", tid, err)
		}
		if returned < 0 {
			return unix.Errno(-returned)
		}
		return nil
	}
}

// threadPatience is how many milliseconds a thread may take before the caller checks for it again:
// a thread that ends with the signal pending never answers.
const threadPatience = 10

// list returns the names of the threads in /proc, which are their numbers in the PID namespace it
// was mounted in.
func (t threads) list() (names []string, err error) {
	if _, err := unix.Seek(t.dir, 0, unix.SEEK_SET); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	for {
		n, err := unix.ReadDirent(t.dir, buf)
		if n == 0 || err != nil {
			return names, err
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// number returns a thread's number in the process's own PID namespace.
func (t threads) number(name string) (int, error) {
	fd, err := unix.Openat(t.dir, name+"/status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(buf[:n])) {
		if numbers, found := strings.CutPrefix(line, "NSpid:"); found {
			if f := strings.Fields(numbers); len(f) > 0 {
				return strconv.Atoi(f[len(f)-1])
			}
		}
	}
	return 0, errors.New("its status has no NSpid")
}

// sigaction is the kernel's struct sigaction.
type sigaction struct{ handler, flags, restorer, mask uintptr }

// handle makes onSignal the signal's handler until restore is called.
func handle() (restore func(), err error) {
	set := func(to, was *sigaction) error {
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, allThreadsSignal,
			uintptr(unsafe.Pointer(to)), uintptr(unsafe.Pointer(was)), unsafe.Sizeof(to.mask), 0, 0)
		if errno != 0 {
			return errno
		}
		return nil
	}
	const ( // SA_… of asm-generic/signal-defs.h
		saRestorer = 0x04000000
		saOnStack  = 0x08000000
		saRestart  = 0x10000000
	)
	ours := &sigaction{handler: onSignalPC(), flags: saOnStack | saRestart, mask: ^uintptr(0)}
	if ours.restorer = restorerPC(); ours.restorer != 0 {
		ours.flags |= saRestorer
	}
	was := new(sigaction)
	if err := set(ours, was); err != nil {
		return nil, err
	}
	return func() { _ = set(was, nil) }, nil
}
