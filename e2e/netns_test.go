package e2e

// A network namespace of a test, with a mount namespace beside it, so that it can have its own
// /etc/resolv.conf. It lives on one locked thread, which starts every process in it. The thread
// dies with the test, and the namespaces with their last process.

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

type netns struct {
	name string
	dir  string // the namespace's own files: etc/…, logs
	env  []string
	tid  int
	jobs chan func()
	// plain starts processes without any capability, as the ordinary user would.
	plain chan func()
}

// newNetns makes an empty network namespace with its loopback up.
func newNetns(t *testing.T, name string) *netns {
	t.Helper()
	n := &netns{name: name, dir: filepath.Join(t.TempDir(), name), jobs: make(chan func()), plain: make(chan func())}
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.thread(t, n.jobs, func() error {
		n.tid = unix.Gettid()
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("making namespace %s: %w", name, err)
		}
		return unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	})
	n.thread(t, n.plain, func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		for kind, flag := range map[string]int{"net": unix.CLONE_NEWNET, "mnt": unix.CLONE_NEWNS} {
			fd, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/%s", n.tid, kind), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, flag); err != nil {
				return fmt.Errorf("entering %s's %s namespace: %w", name, kind, err)
			}
		}
		if privileged {
			return nil
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
			return err
		}
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		return unix.Capset(&header, &none[0])
	})
	n.sysctl(t, "net.ipv6.conf.default.accept_dad", "0") // it would only cost a second
	n.ip(t, "link set lo up")
	return n
}

// thread starts the goroutine that owns a locked thread; closing jobs ends both.
func (n *netns) thread(t *testing.T, jobs chan func(), setUp func() error) {
	t.Helper()
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := setUp()
		ready <- err
		if err != nil {
			return
		}
		for f := range jobs {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(jobs) })
}

// do runs f on the namespace's thread.
func (n *netns) do(f func()) {
	done := make(chan struct{})
	n.jobs <- func() { f(); close(done) }
	<-done
}

func (n *netns) String() string { return "netns " + n.name }

// ip runs iproute2 commands, one a line; empty lines and # comments are skipped.
func (n *netns) ip(t *testing.T, commands string) {
	t.Helper()
	r := n.startInput(t, n.jobs, commands+"\n", "ip", "-force", "-batch", "-").wait(t, 10*time.Second)
	if r.status != 0 {
		t.Fatalf("setting up %s\n%s\n%s", n, commands, r)
	}
}

// sysctl writes under /proc/sys as this namespace sees it.
func (n *netns) sysctl(t *testing.T, name, value string) {
	t.Helper()
	if err := n.trySysctl(name, value); err != nil {
		t.Fatalf("%s: setting %s to %q: %v", n, name, value, err)
	}
}

func (n *netns) trySysctl(name, value string) (err error) {
	n.do(func() { // the tree shows the namespace of the thread that opens it
		err = os.WriteFile("/proc/sys/"+strings.ReplaceAll(name, ".", "/"), []byte(value), 0)
	})
	return err
}

// file puts text at path (an absolute one, such as /etc/resolv.conf) as this namespace sees it, by
// a bind mount over the machine's file. A later call changes the same file in place.
func (n *netns) file(t *testing.T, path, text string) string {
	t.Helper()
	own := filepath.Join(n.dir, path)
	if err := os.MkdirAll(filepath.Dir(own), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := os.Stat(own)
	mounted := err == nil
	if err := os.WriteFile(own, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if mounted {
		return own
	}
	n.do(func() {
		target, rerr := filepath.EvalSymlinks(path)
		if rerr != nil {
			target = path
		}
		err = unix.Mount(own, target, "", unix.MS_BIND, "")
	})
	if err != nil {
		t.Fatalf("%s: binding %s: %v", n, path, err)
	}
	return own
}

// start runs a program here with the test's own privilege: servers, ip, nsenter.
func (n *netns) start(t *testing.T, argv ...string) *proc {
	t.Helper()
	return n.startInput(t, n.jobs, "", argv...)
}

// startPlain runs a program here as the run's user would at home.
func (n *netns) startPlain(t *testing.T, argv ...string) *proc {
	t.Helper()
	return n.startInput(t, n.plain, "", argv...)
}

func (n *netns) startInput(t *testing.T, on chan func(), input string, argv ...string) *proc {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	if input != "" {
		cmd.Stdin = strings.NewReader(input)
	}
	return n.startCmd(t, on, cmd)
}

func (n *netns) startCmd(t *testing.T, on chan func(), cmd *exec.Cmd) *proc {
	t.Helper()
	cmd.Env = append(os.Environ(), append(n.env, cmd.Env...)...)
	if cmd.Dir == "" {
		cmd.Dir = n.dir
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	}
	cmd.WaitDelay = 2 * time.Second // a grandchild may keep our pipes
	p := newProc(n.String(), cmd.Args)
	if cmd.Stdin == nil {
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		p.write = func(b []byte) { in.Write(b) }
		p.closeInput = func() { in.Close() }
	}
	if cmd.Stdout == nil {
		cmd.Stdout = p.stream(&p.out)
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.stream(&p.err)
	}
	var err error
	done := make(chan struct{})
	on <- func() { err = cmd.Start(); close(done) }
	<-done
	if err != nil {
		t.Fatalf("%s: starting %q: %v", n, cmd.Args, err)
	}
	p.pid = cmd.Process.Pid
	p.signal = func(s syscall.Signal) { syscall.Kill(-p.pid, s) }
	go func() { p.finish(statusOf(cmd.Wait(), cmd)) }()
	t.Cleanup(func() {
		// A server does not end by itself, but a sandbox whose test failed should: if killed, it
		// would leave its traces to the last check.
		p.closeInput()
		if cmd.Args[0] == sluiceBin() {
			select {
			case <-p.done:
			case <-time.After(3 * time.Second):
			}
		}
		p.signal(syscall.SIGKILL)
		<-p.done
		p.show(t)
	})
	return p
}

func statusOf(err error, cmd *exec.Cmd) int {
	if cmd.ProcessState == nil {
		return -1
	}
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return cmd.ProcessState.ExitCode()
}
