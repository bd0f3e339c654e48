package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/fswatch"
	"sluice.dev/sluice/sandbox/internal/fork"
	"sluice.dev/sluice/sandbox/internal/idmap"
)

// Attaching to a network namespace that somebody else made.
//
// Root enters it directly. An ordinary user first enters the user namespace that owns it. The
// kernel names that one (NS_GET_USERNS), and it has to be the user's own.

// Target is what to attach to: a process or a path.
type Target struct {
	PID    int    // its network namespace; 0 means NetNS names it
	NetNS  string // such as /run/netns/NAME
	UserNS string // the user namespace to enter; "" means find it
}

// ErrTargetGone is why Attach or Wait fails when the target has ended.
var ErrTargetGone = errors.New("the target is gone")

func (t Target) String() string {
	if t.PID != 0 {
		return fmt.Sprintf("process %d", t.PID)
	}
	return t.NetNS
}

// Attach puts a device into an existing network namespace. The guest has no CMD: Release must not
// be called, and Wait returns when the target is gone.
func Attach(ctx context.Context, t Target, cfg Config) (*Guest, error) {
	g, err := attach(ctx, t, cfg)
	if err != nil {
		return nil, fmt.Errorf("attaching to %s: %w", t, err)
	}
	return g, nil
}

func attach(ctx context.Context, t Target, cfg Config) (*Guest, error) {
	if (t.PID == 0) == (t.NetNS == "") || t.PID < 0 {
		return nil, errors.New("give either a process or the path of a network namespace")
	}
	if err := cfg.validate(false); err != nil {
		return nil, err
	}
	watch, err := watchTarget(t)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Guest, error) {
		watch.Close()
		return nil, err
	}
	path := t.NetNS
	if t.PID != 0 {
		path = fmt.Sprintf("/proc/%d/ns/net", t.PID)
	}
	net, err := openNamespace(path, unix.CLONE_NEWNET)
	if err != nil {
		return fail(err)
	}
	defer net.Close()
	spaces := []fork.Namespace{{FD: int(net.Fd()), Flag: unix.CLONE_NEWNET}}
	user, err := userNamespaceFor(t, net)
	if err != nil {
		return fail(err)
	}
	if user != nil {
		defer user.Close()
		spaces = append([]fork.Namespace{{FD: int(user.Fd()), Flag: unix.CLONE_NEWUSER}}, spaces...)
	}
	spec := stageSpec{Mode: modeAttach, Config: cfg}
	g, err := start(ctx, spec, nil, func(files []*os.File) (*stageProcess, error) {
		return joinStage(spaces, files)
	})
	if err != nil {
		return fail(err)
	}
	g.stop = func() { watch.Close() }
	// Ends with the target, or with Close, which closes the watch.
	go func() {
		if watch.wait() {
			g.finish(Status{}, nil)
		}
	}()
	return g, nil
}

// openNamespace opens a namespace and checks that it is of the type flag.
func openNamespace(path string, flag int) (*os.File, error) {
	what := "network"
	if flag == unix.CLONE_NEWUSER {
		what = "user"
	}
	f, err := os.Open(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%w: there is no %s", ErrTargetGone, path)
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("its %s namespace is closed to this user: attach as the user who started it, or as root (%w)", what, err)
	case err != nil:
		return nil, err
	}
	got, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || got != flag {
		f.Close()
		return nil, fmt.Errorf("%s is not a %s namespace", path, what)
	}
	return f, nil
}

// userNamespaceFor returns the user namespace to enter first, or nil if there is none.
func userNamespaceFor(t Target, net *os.File) (*os.File, error) {
	if t.UserNS != "" {
		return openNamespace(t.UserNS, unix.CLONE_NEWUSER)
	}
	if idmap.HasCaps(unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN) {
		return nil, nil
	}
	const cure = "attach as root, or make the namespace together with a user namespace (unshare -rn)"
	fd, err := unix.IoctlRetInt(int(net.Fd()), unix.NS_GET_USERNS)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("its network namespace does not belong to this user: %s", cure)
	}
	if err != nil {
		return nil, fmt.Errorf("finding the user namespace that owns it: %w", err)
	}
	user := os.NewFile(uintptr(fd), "user namespace")
	id, err := fdNamespaceID(fd)
	own, err2 := namespaceID("/proc/self/ns/user")
	if err = errors.Join(err, err2); err != nil || id == own {
		user.Close()
		if err == nil {
			err = fmt.Errorf("its network namespace belongs to the user namespace of the host: %s", cure)
		}
		return nil, err
	}
	return user, nil
}

// targetWatch waits for a target's end without holding a thread: its descriptor is in Go's poller,
// and Close ends the wait.
type targetWatch struct {
	*os.File
	over func() bool // asked whenever the file is readable
}

func watchTarget(t Target) (*targetWatch, error) {
	pid := t.PID
	if pid == 0 {
		pid = pidOfPath(t.NetNS)
	}
	if pid == 0 {
		return watchPath(t.NetNS)
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("%w: there is no process %d", ErrTargetGone, pid)
	}
	if err != nil {
		return nil, fmt.Errorf("watching process %d: %w", pid, err)
	}
	return &targetWatch{os.NewFile(uintptr(fd), "target"), func() bool { return dead(fd) }}, nil
}

// pidOfPath returns PID for the path /proc/PID/ns/net, and 0 for any other.
func pidOfPath(path string) int {
	f := strings.Split(filepath.Clean(path), "/")
	if len(f) != 5 || f[1] != "proc" {
		return 0
	}
	pid, err := strconv.Atoi(f[2])
	if err != nil || pid <= 0 {
		return 0
	}
	return pid
}

// watchPath watches the directory that the namespace is mounted in. Unmounting alone sends no
// event, but a tool that unmounts a namespace removes its file next. Where the kernel has no watch
// left, the path is checked every second.
func watchPath(path string) (*targetWatch, error) {
	id, err := namespaceID(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no %s", ErrTargetGone, path)
	}
	if err != nil {
		return nil, err
	}
	fd, ticking, err := fswatch.Open()
	if err != nil {
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	const mask = unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	if !ticking {
		if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), mask); err != nil {
			unix.Close(fd)
			if fd, err = fswatch.Ticker(); err != nil {
				return nil, fmt.Errorf("watching %s: %w", path, err)
			}
		}
	}
	buf := make([]byte, 4096)
	return &targetWatch{os.NewFile(uintptr(fd), "target"), func() bool {
		for {
			if _, err := unix.Read(fd, buf); err != nil {
				break
			}
		}
		now, err := namespaceID(path)
		return err != nil || now != id
	}}, nil
}

// wait returns true when the target is gone, false when the watch was closed.
func (w *targetWatch) wait() bool {
	conn, err := w.SyscallConn()
	if err != nil {
		return false
	}
	gone := false
	err = conn.Read(func(uintptr) bool {
		gone = w.over()
		return gone
	})
	return gone && err == nil
}
