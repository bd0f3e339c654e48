package guest

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Starting the stage in namespaces that exist already.
//
// A process with more than one thread cannot enter a user namespace, and a Go
// program has several before main. So the entering is done between fork and
// exec, in the child that has one thread, the way syscall.forkExec works: from
// the fork on only raw system calls, no allocation, everything prepared before.
// The capabilities that entering gives are carried over the exec in the
// ambient set, so that it matters not whom the namespace maps the caller to
// (nsenter(1) before util-linux 2.40 loses them).

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()

// joined is a namespace to enter.
type joined struct {
	fd   int
	flag int // CLONE_NEW…
}

// Steps of the child, for its report.
const (
	stepDeath = iota
	stepUser
	stepNet
	stepCaps
	stepFiles
	stepExec
)

var stepNames = [...]string{
	stepDeath: "tying the guest to its monitor",
	stepUser:  "entering the user namespace",
	stepNet:   "entering the network namespace",
	stepCaps:  "keeping capabilities",
	stepFiles: "passing descriptors",
	stepExec:  "starting the guest stage",
}

// childReport is what a child that failed writes before it exits.
type childReport struct {
	step  int32
	errno int32
}

// joinStage starts the stage in the given namespaces (the user namespace first),
// with files as channelFD and planFD.
func joinStage(spaces []joined, files []*os.File) (*stageProcess, error) {
	p := &stageProcess{done: make(chan struct{})}
	up := make(chan error)
	// Keeps the forking thread, to which the child's parent-death signal is
	// tied; ends with the child.
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		pid, err := forkInto(spaces, files)
		p.pid = pid
		up <- err
		if err != nil {
			return
		}
		awaitExit(pid)
		p.collect(func() string { return describe(reap(pid)) })
	}()
	if err := <-up; err != nil {
		return nil, err
	}
	return p, nil
}

// forkPlan is all that the child needs, laid out before the fork.
type forkPlan struct {
	spaces      []joined
	files       [2]int // sources, far above the targets
	path        *byte
	argv, envp  []*byte
	reportFD    int
	header      unix.CapUserHeader
	data        [2]unix.CapUserData
	caps        []uintptr
	report      childReport
	deathSignal uintptr
}

func forkInto(spaces []joined, files []*os.File) (int, error) {
	plan := &forkPlan{
		spaces: spaces, caps: stageCaps, deathSignal: uintptr(unix.SIGKILL),
		header: unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3},
	}
	for i, f := range files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", stepNames[stepFiles], err)
		}
		defer unix.Close(fd)
		plan.files[i] = fd
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return 0, fmt.Errorf("starting the guest stage: %w", err)
	}
	defer unix.Close(pipe[0])
	plan.reportFD = pipe[1]
	var err error
	if plan.path, err = unix.BytePtrFromString("/proc/self/exe"); err != nil {
		return 0, err
	}
	if plan.argv, err = syscall.SlicePtrFromStrings([]string{"sluice", StageCommand}); err != nil {
		return 0, err
	}
	plan.envp = []*byte{nil}

	syscall.ForkLock.Lock()
	pid, errno := plan.fork()
	syscall.ForkLock.Unlock()
	unix.Close(pipe[1])
	if errno != 0 {
		return 0, fmt.Errorf("starting the guest stage: %w", errno)
	}
	var report [unsafe.Sizeof(childReport{})]byte
	n, _ := readFull(pipe[0], report[:])
	if n == len(report) {
		r := *(*childReport)(unsafe.Pointer(&report[0]))
		reap(pid)
		return 0, explainJoin(int(r.step), unix.Errno(r.errno))
	}
	return pid, nil
}

func readFull(fd int, b []byte) (int, error) {
	n := 0
	for n < len(b) {
		m, err := unix.Read(fd, b[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || m == 0 {
			return n, err
		}
		n += m
	}
	return n, nil
}

// fork returns in the parent only.
//
//go:noinline
//go:norace
func (p *forkPlan) fork() (int, unix.Errno) {
	var (
		i     int
		pid   uintptr
		errno unix.Errno
	)
	beforeFork()
	pid, _, errno = unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		afterFork()
		return int(pid), errno
	}
	afterForkInChild()

	p.report.step = stepDeath
	if _, _, errno = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, p.deathSignal, 0, 0, 0, 0); errno != 0 {
		goto failed
	}
	for i = range p.spaces {
		p.report.step = stepNet
		if p.spaces[i].flag == unix.CLONE_NEWUSER {
			p.report.step = stepUser
		}
		if _, _, errno = unix.RawSyscall(unix.SYS_SETNS, uintptr(p.spaces[i].fd), uintptr(p.spaces[i].flag), 0); errno != 0 {
			goto failed
		}
	}
	p.report.step = stepCaps
	if _, _, errno = unix.RawSyscall(unix.SYS_CAPGET, uintptr(unsafe.Pointer(&p.header)), uintptr(unsafe.Pointer(&p.data[0])), 0); errno != 0 {
		goto failed
	}
	p.data[0].Inheritable = p.data[0].Permitted
	p.data[1].Inheritable = p.data[1].Permitted
	if _, _, errno = unix.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&p.header)), uintptr(unsafe.Pointer(&p.data[0])), 0); errno != 0 {
		goto failed
	}
	for i = range p.caps {
		// One that this process lacks is missed where it is used.
		_, _, _ = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, p.caps[i], 0, 0, 0)
	}
	p.report.step = stepFiles
	for i = range p.files {
		if _, _, errno = unix.RawSyscall(unix.SYS_DUP3, uintptr(p.files[i]), uintptr(channelFD+i), 0); errno != 0 {
			goto failed
		}
	}
	p.report.step = stepExec
	_, _, errno = unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(p.path)),
		uintptr(unsafe.Pointer(&p.argv[0])), uintptr(unsafe.Pointer(&p.envp[0])))
failed:
	p.report.errno = int32(errno)
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(p.reportFD), uintptr(unsafe.Pointer(&p.report)), unsafe.Sizeof(p.report))
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, StatusOurs, 0, 0)
	}
}
