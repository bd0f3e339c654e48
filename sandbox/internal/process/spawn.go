package process

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/fork"
	"sluice.dev/sluice/sandbox/internal/logring"
)

// Starting the worker process.
//
// The worker is this same binary with the hidden command WorkerCommand. It has its own user, mount,
// PID, IPC and UTS namespaces, but stays in the caller's network namespace, whose sockets it uses.
// An ordinary user is mapped to itself. Root is mapped to a uid that no other process has, so a
// worker that escapes its user namespace is still unprivileged.
//
// The worker is init of its PID namespace, so any process that it starts dies with it. It has its
// own session: the terminal's signals are for the command. It gets SIGKILL when the monitor dies;
// the kernel ties that to the thread that forked, hence the thread that does nothing else.

// WorkerCommand is the hidden command that becomes WorkerMain.
const WorkerCommand = "worker"

// lastWords bounds the lines of a worker's standard error that are kept to explain its end.
const lastWords = 20

// Process is a started worker.
type Process struct {
	Cmd  *os.Process
	Ch   *channel.Conn
	Done chan struct{} // closed when it has been reaped
	Why  string        // how it ended; valid after done
}

// Spawner starts workers from one thread that lives as long as it does.
type Spawner struct {
	requests chan func()
}

func NewSpawner() *Spawner {
	s := &Spawner{requests: make(chan func())}
	// Owned by the spawner, ended by close. The thread is never given back: it
	// ends with the goroutine, after the last worker.
	OnOwnThread(func() {
		for f := range s.requests {
			f()
		}
	})
	return s
}

// OnOwnThread runs f on a goroutine whose thread no other goroutine gets, now or later: it ends
// with f. It is never the process's first thread, whose namespaces /proc/self shows and which
// cannot end before the process.
func OnOwnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		other := make(chan struct{})
		go func() { // while we hold the first thread, this one has another
			runtime.LockOSThread()
			close(other)
			f()
		}()
		<-other
		runtime.UnlockOSThread()
	}()
}

func (s *Spawner) Close() { close(s.requests) }

// Start runs this binary by plan, which need not contain the settings common to all; log gets each
// line of its standard error. It must not be called after Close.
func (s *Spawner) Start(plan fork.Plan, log func(string)) (*Process, error) {
	ends, err := channel.Socketpair(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, err
	}
	defer ends[1].Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		_ = ends[0].Close()
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	defer errW.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		_ = ends[0].Close()
		_ = errR.Close()
		return nil, err
	}
	defer null.Close()

	// A worker reads no environment; GOTRACEBACK only shapes its last words.
	plan.Env, plan.Dir = []string{"GOTRACEBACK=single"}, "/"
	// By its number errW stays as it is; os.File's Fd would make it blocking.
	plan.Files = []int{channel.FDOf(null), channel.FDOf(null), channel.FDOf(errW), channel.FDOf(ends[1])}
	plan.Session, plan.DeathSignal = true, syscall.SIGKILL
	p := &Process{Ch: channel.New(ends[0], false), Done: make(chan struct{})}
	result := make(chan error, 1)
	s.requests <- func() {
		pid, err := fork.Start(plan)
		if err == nil {
			p.Cmd, err = os.FindProcess(pid)
		}
		result <- err
	}
	if err := <-result; err != nil {
		_ = p.Ch.Close()
		_ = errR.Close()
		return nil, explainSpawn(err)
	}
	go p.reap(errR, log)
	return p, nil
}

// reap is owned by the process and ends with it: it reads standard error to
// the end, then collects the status.
func (p *Process) reap(stderr *os.File, log func(string)) {
	var mu sync.Mutex // guards last, in case standard error outlives the process
	var last []string
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		eachLine(stderr, func(line string) {
			mu.Lock()
			if len(last) < lastWords {
				last = append(last, line)
			}
			mu.Unlock()
			log(line)
		})
	}()
	fork.Await(p.Cmd.Pid)
	state, err := p.Cmd.Wait()
	// The worker forks nothing, so its end is the end of its standard error.
	<-drained
	_ = stderr.Close()
	mu.Lock()
	p.Why = describeEnd(state, err, last)
	mu.Unlock()
	close(p.Done)
}

// eachLine calls f for each line, cutting long ones.
func eachLine(r io.Reader, f func(string)) {
	br := bufio.NewReaderSize(r, 4096)
	for {
		line, isPrefix, err := br.ReadLine()
		if err != nil {
			return
		}
		text := string(line)
		for isPrefix && err == nil {
			_, isPrefix, err = br.ReadLine()
		}
		f(text)
	}
}

// describeEnd returns a line about why a worker ended.
func describeEnd(state *os.ProcessState, err error, last []string) string {
	if err != nil {
		return err.Error()
	}
	ws, _ := state.Sys().(syscall.WaitStatus)
	switch {
	case ws.Signaled() && ws.Signal() == syscall.SIGSYS:
		return "killed by SIGSYS: it made a system call that its filter forbids"
	case ws.Signaled() && ws.Signal() == syscall.SIGKILL:
		return "killed by SIGKILL (by hand, or by the kernel for lack of memory)"
	case ws.Signaled():
		return "killed by " + unix.SignalName(ws.Signal())
	}
	why := fmt.Sprintf("exit status %d", ws.ExitStatus())
	for _, line := range last {
		for _, p := range []string{"panic: ", "fatal error: ", "sluice: "} {
			if _, text, ok := strings.Cut(line, p); ok {
				return why + ": " + p + logring.CleanLine(text)
			}
		}
	}
	return why
}

// Kill ends the process at once and waits until it is gone.
func (p *Process) Kill() {
	_ = p.Cmd.Kill()
	<-p.Done
	_ = p.Ch.Close()
}

// ids is a uid or gid mapping of one line.
type ids struct{ uid, Gid int }

// The worker's uid when the caller is root: above every range that is assigned to users or
// containers, plus the monitor's pid, so that the workers of two sandboxes cannot affect each
// other.
const workerUIDBase = 2_000_000_000

// WorkerIDs returns the worker's ids on the host.
func WorkerIDs() ids {
	self := ids{os.Geteuid(), os.Getegid()}
	if self.uid != 0 {
		return self
	}
	for _, id := range []int{workerUIDBase + os.Getpid(), 65534} {
		if idMapped("/proc/self/uid_map", id) && idMapped("/proc/self/gid_map", id) {
			return ids{id, id}
		}
	}
	return self // root of a namespace that maps nobody else
}

// idMapped reports whether a map of the caller's namespace covers id.
func idMapped(file string, id int) bool {
	b, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		var inside, outside, count int64
		if _, err := fmt.Sscan(line, &inside, &outside, &count); err == nil &&
			int64(id) >= inside && int64(id) < inside+count {
			return true
		}
	}
	return false
}

// WorkerPlan is how the worker is cloned. Inside it is 0 until it has dropped
// everything: it needs its namespace's capabilities to empty its root. The bounding
// set, which each of its threads would have to empty capability by capability, it
// never has.
func WorkerPlan(who ids) fork.Plan {
	root := os.Geteuid() == 0
	return fork.Plan{
		Args: []string{os.Args[0], WorkerCommand},
		Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID |
			unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Maps: func(pid int) error { return who.writeMaps(pid, !root) },
		Root: true, DropGroup: root, Unbound: true,
	}
}

// writeMaps makes who the uid and gid 0 of the process's new user namespace. A caller that may map
// only itself has to give up setgroups(2) there.
func (who ids) writeMaps(pid int, alone bool) error {
	write := func(name, text string) error {
		return os.WriteFile(fmt.Sprintf("/proc/%d/%s", pid, name), []byte(text), 0)
	}
	if alone {
		if err := write("setgroups", "deny"); err != nil {
			return err
		}
	}
	if err := write("uid_map", fmt.Sprintf("0 %d 1", who.uid)); err != nil {
		return err
	}
	return write("gid_map", fmt.Sprintf("0 %d 1", who.Gid))
}

func explainSpawn(err error) error {
	err = fmt.Errorf("start the worker: %w", err)
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: user namespaces are off here (see kernel.unprivileged_userns_clone, user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns)", err)
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w: the limit on namespaces is reached (raise user.max_user_namespaces)", err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: the sluice binary must be executable for everyone: chmod 755 it", err)
	}
	return err
}

// Do runs f on the spawner's thread and waits for it.
func (s *Spawner) Do(f func()) {
	done := make(chan struct{})
	s.requests <- func() {
		defer close(done)
		f()
	}
	<-done
}
