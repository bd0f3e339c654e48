package fork

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()

// Namespace is a namespace to enter.
type Namespace struct {
	FD   int
	Flag int // CLONE_NEW…
}

// Plan describes the child to start.
type Plan struct {
	Args, Env []string
	Dir       string // "" means the caller's
	Files     []int  // Files[i] becomes descriptor i; -1 keeps the current one

	Flags uintptr // new namespaces, CLONE_NEW…
	// Maps writes the id maps of a new user namespace while the child waits. If Maps is nil, the
	// child does not wait.
	Maps func(pid int) error
	Join []Namespace // entered in this order

	Root      bool // becomes uid and gid 0 of its user namespace
	DropGroup bool // gives up the supplementary groups
	Session   bool // starts a new session

	// Ambient are the capabilities kept across exec in the ambient set, whichever id the namespace
	// maps the caller to (nsenter(1) before util-linux 2.40 loses them). If the child lacks one, it
	// fails only where the capability is used.
	Ambient []uintptr
	// Unbound empties the bounding set. As uid 0 the child still keeps its capabilities across
	// exec, in the inheritable set.
	Unbound bool

	// DeathSignal is sent when the calling thread ends, so lock that thread and keep it.
	DeathSignal syscall.Signal
}

// Step is a step of the child, which names where it failed.
type Step int32

// The steps of a child, in order.
const (
	StepMaps Step = iota
	StepUser
	StepNet
	StepIDs
	StepSession
	StepCaps
	StepFiles
	StepDir
	StepDeath
	StepExec
)

var stepNames = [...]string{
	StepMaps:    "waiting for the id maps",
	StepUser:    "entering the user namespace",
	StepNet:     "entering the network namespace",
	StepIDs:     "changing user",
	StepSession: "starting a session",
	StepCaps:    "keeping capabilities",
	StepFiles:   "passing descriptors",
	StepDir:     "changing the directory",
	StepDeath:   "tying the child to its parent",
	StepExec:    "executing",
}

func (s Step) String() string {
	if s < 0 || int(s) >= len(stepNames) {
		s = StepExec
	}
	return stepNames[s]
}

// Error explains why a child did not get as far as exec.
type Error struct {
	Step  Step
	Errno unix.Errno
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %v", e.Step, e.Errno) }
func (e *Error) Unwrap() error { return e.Errno }

// report is what a failed child writes before it exits.
type report struct {
	step  Step
	errno int32
}

// laid holds everything the child needs, prepared before the fork.
type laid struct {
	flags       uintptr
	waitFD      int // brings the word that the maps are written; -1 for none
	mappedFD    int // its other end, which the parent writes
	word        [1]byte
	join        []Namespace
	root        bool
	dropGroup   bool
	session     bool
	keepCaps    bool
	unbound     bool
	header      unix.CapUserHeader
	data        [2]unix.CapUserData
	ambient     []uintptr
	files       []int // sources, numbered above the targets; -1 keeps the current one
	dir         *byte // nil keeps the current one
	deathSignal uintptr
	path        *byte
	argv, envp  []*byte
	reportFD    int
	report      report
}

// Start forks, and returns when the child has executed or with an *Error that explains why it did
// not. The caller must wait for the child.
func Start(p Plan) (pid int, err error) {
	l := &laid{
		flags: p.Flags | uintptr(unix.SIGCHLD), waitFD: -1, join: p.Join,
		root: p.Root, dropGroup: p.DropGroup, session: p.Session,
		keepCaps: p.Unbound || len(p.Ambient) > 0, unbound: p.Unbound, ambient: p.Ambient,
		header:      unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3},
		deathSignal: uintptr(p.DeathSignal),
	}
	// The duplicates go above every descriptor in Files, so that none lies where another goes. But
	// no higher: a process with threads waits for the kernel's RCU, some 9 ms, when its descriptor
	// table grows.
	above := len(p.Files)
	for _, fd := range p.Files {
		if fd >= 0 {
			if fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, above); err != nil {
				return 0, fmt.Errorf("%s: %w", StepFiles, err)
			}
			defer unix.Close(fd)
		}
		l.files = append(l.files, fd)
	}
	if l.path, err = unix.BytePtrFromString("/proc/self/exe"); err != nil {
		return 0, err
	}
	if l.argv, err = syscall.SlicePtrFromStrings(p.Args); err != nil {
		return 0, err
	}
	if l.envp, err = syscall.SlicePtrFromStrings(p.Env); err != nil {
		return 0, err
	}
	if p.Dir != "" {
		if l.dir, err = unix.BytePtrFromString(p.Dir); err != nil {
			return 0, err
		}
	}
	if p.Maps != nil {
		var ends [2]int
		if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
			return 0, err
		}
		l.waitFD, l.mappedFD = ends[0], ends[1]
		defer unix.Close(l.waitFD)
	}
	// Read through the runtime's poller; a blocking read would hold a processor.
	said, failed, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer said.Close()
	conn, err := failed.SyscallConn()
	if err == nil {
		err = conn.Control(func(fd uintptr) { l.reportFD = int(fd) })
	}
	var errno unix.Errno
	if err == nil {
		syscall.ForkLock.Lock()
		pid, errno = l.fork()
		syscall.ForkLock.Unlock()
		if errno != 0 {
			err = errno
		}
	}
	_ = failed.Close()
	if p.Maps != nil {
		if err == nil {
			err = p.Maps(pid)
		}
		if err == nil {
			_, err = unix.Write(l.mappedFD, []byte{1})
		}
		_ = unix.Close(l.mappedFD) // if the word was not sent, this ends the child
	}
	if err == nil {
		err = outcome(said)
	}
	if err != nil && pid > 0 {
		_ = unix.Kill(pid, unix.SIGKILL)
		Reap(pid)
	}
	return pid, err
}

// outcome reads a failed child's report. An exec closes the pipe instead.
func outcome(said io.Reader) error {
	var b [unsafe.Sizeof(report{})]byte
	switch _, err := io.ReadFull(said, b[:]); {
	case err == nil:
		r := *(*report)(unsafe.Pointer(&b[0]))
		return &Error{r.step, unix.Errno(r.errno)}
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}

// maxCaps bounds the search for the last capability; the kernel's sets have 64 bits.
const maxCaps = 64

// fork returns only in the parent: the child's pid, or 0 and the error.
//
//go:noinline
//go:norace
func (l *laid) fork() (int, unix.Errno) {
	var (
		i          int
		c          uintptr
		pid, n     uintptr
		errno, end unix.Errno
	)
	beforeFork()
	pid, _, errno = unix.RawSyscall6(unix.SYS_CLONE, l.flags, 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		afterFork()
		if errno != 0 {
			pid = 0 // not -1, which means every process to kill(2)
		}
		return int(pid), errno
	}
	afterForkInChild()

	if l.waitFD >= 0 {
		l.report.step = StepMaps
		// Otherwise the child would wait for itself if the parent died.
		if _, _, errno = unix.RawSyscall(unix.SYS_CLOSE, uintptr(l.mappedFD), 0, 0); errno != 0 {
			goto failed
		}
		n, _, errno = unix.RawSyscall(unix.SYS_READ, uintptr(l.waitFD), uintptr(unsafe.Pointer(&l.word[0])), 1)
		if errno == 0 && n != 1 {
			errno = unix.EPIPE // the parent failed, or is gone
		}
		if errno != 0 {
			goto failed
		}
	}
	for i = range l.join {
		l.report.step = StepNet
		if l.join[i].Flag == unix.CLONE_NEWUSER {
			l.report.step = StepUser
		}
		if _, _, errno = unix.RawSyscall(unix.SYS_SETNS, uintptr(l.join[i].FD), uintptr(l.join[i].Flag), 0); errno != 0 {
			goto failed
		}
	}
	l.report.step = StepIDs
	if l.dropGroup {
		if _, _, errno = unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
			goto failed
		}
	}
	if l.root {
		if _, _, errno = unix.RawSyscall(unix.SYS_SETGID, 0, 0, 0); errno != 0 {
			goto failed
		}
		if _, _, errno = unix.RawSyscall(unix.SYS_SETUID, 0, 0, 0); errno != 0 {
			goto failed
		}
	}
	l.report.step = StepSession
	if l.session {
		if _, _, errno = unix.RawSyscall(unix.SYS_SETSID, 0, 0, 0); errno != 0 {
			goto failed
		}
	}
	l.report.step = StepCaps
	if l.keepCaps {
		if _, _, errno = unix.RawSyscall(unix.SYS_CAPGET, uintptr(unsafe.Pointer(&l.header)), uintptr(unsafe.Pointer(&l.data[0])), 0); errno != 0 {
			goto failed
		}
		l.data[0].Inheritable = l.data[0].Permitted
		l.data[1].Inheritable = l.data[1].Permitted
		if _, _, errno = unix.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&l.header)), uintptr(unsafe.Pointer(&l.data[0])), 0); errno != 0 {
			goto failed
		}
	}
	for i = range l.ambient {
		_, _, _ = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, l.ambient[i], 0, 0, 0)
	}
	if l.unbound {
		for c = 0; c < maxCaps && end == 0; c++ { // EINVAL: the kernel has no more
			_, _, end = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0, 0, 0, 0)
		}
	}
	l.report.step = StepFiles
	for i = range l.files {
		if l.files[i] < 0 {
			continue
		}
		if _, _, errno = unix.RawSyscall(unix.SYS_DUP3, uintptr(l.files[i]), uintptr(i), 0); errno != 0 {
			goto failed
		}
	}
	l.report.step = StepDir
	if l.dir != nil {
		if _, _, errno = unix.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(l.dir)), 0, 0); errno != 0 {
			goto failed
		}
	}
	// Only after every change of credentials, since a change clears it.
	l.report.step = StepDeath
	if _, _, errno = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, l.deathSignal, 0, 0, 0, 0); errno != 0 {
		goto failed
	}
	l.report.step = StepExec
	_, _, errno = unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(l.path)),
		uintptr(unsafe.Pointer(&l.argv[0])), uintptr(unsafe.Pointer(&l.envp[0])))
failed:
	l.report.errno = int32(errno)
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(l.reportFD), uintptr(unsafe.Pointer(&l.report)), unsafe.Sizeof(l.report))
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 125, 0, 0)
	}
}
