package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// fakePeer is a process that stays where it was started. It connects to a control socket, asks,
// prints the answer, and keeps its namespaces alive until its standard input ends.
func fakePeer(socket string) int {
	if socket != "-" {
		var i api.Info
		if err := (api.Client{Path: socket}).Call(context.Background(), api.MethodInfo, nil, &i); err != nil {
			fmt.Println("error:", err)
		} else {
			fmt.Println("answer:", i.Name)
		}
	} else {
		fmt.Println("ready")
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// startPeer runs fakePeer and returns its first line.
func startPeer(t *testing.T, socket string, attr *syscall.SysProcAttr, wrap ...string) (*exec.Cmd, string) {
	t.Helper()
	args := append(wrap, "/proc/self/exe", "test-peer", socket)
	if len(wrap) > 0 { // /proc/self would be that of the wrapper
		exe, err := os.Executable()
		testutil.Must(t, err)
		args[len(wrap)] = exe
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	testutil.Must(t, err)
	out, err := cmd.StdoutPipe()
	testutil.Must(t, err)
	cmd.Stderr = os.Stderr
	testutil.Must(t, cmd.Start())
	t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	buf := make([]byte, 1024)
	n, err := out.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return cmd, strings.TrimSpace(string(buf[:n]))
}

// inNamespaces clones into new namespaces; in a new user namespace the caller is root.
func inNamespaces(flags uintptr) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Cloneflags: flags}
	if flags&syscall.CLONE_NEWUSER != 0 {
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return attr
}

// identity is inNamespaces with every id mapped to itself.
func identity(flags uintptr) *syscall.SysProcAttr {
	const all = 1<<32 - 1
	attr := inNamespaces(flags)
	attr.UidMappings = []syscall.SysProcIDMap{{Size: all}}
	attr.GidMappings = []syscall.SysProcIDMap{{Size: all}}
	return attr
}

// fakeMonitor serves at socket under its own identity, until its standard input ends.
func fakeMonitor(socket string) int {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err = errors.Join(err, os.Chmod(socket, 0o777)); err != nil {
		fmt.Println("error:", err)
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); infoServer(l, registry.PeerPolicy{Uid: os.Geteuid()}).serve(ctx) }()
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	cancel()
	<-done
	return 0
}

// serveInfo runs a control server that answers with its name.
func serveInfo(t *testing.T, peers registry.PeerPolicy) (socket string, log *logring.LogRing) {
	t.Helper()
	socket = filepath.Join(testutil.ShortDir(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	testutil.Must(t, err)
	s := infoServer(l, peers)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.serve(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return socket, s.log
}

func infoServer(l *net.UnixListener, peers registry.PeerPolicy) *controlServer {
	s := &controlServer{l: l, peers: peers, log: logring.NewLogRing(time.Now, nil)}
	s.handle = func(_ context.Context, c *net.UnixConn, req api.Request) error {
		if req.Method != api.MethodInfo {
			return &api.Error{Code: api.CodeBadRequest, Message: "unknown method"}
		}
		return api.WriteResult(c, api.Info{Name: "served"})
	}
	return s
}

func TestOnlyPeersOfTheMonitorsNamespacesAreServed(t *testing.T) {
	sandbox, line := startPeer(t, "-", inNamespaces(syscall.CLONE_NEWUSER|syscall.CLONE_NEWNET))
	if line != "ready" {
		t.Skipf("user namespaces cannot be made here: %s", line)
	}
	socket, log := serveInfo(t, registry.PeerPolicy{Uid: os.Geteuid()})
	const (
		wrongUser    = "error: refused: the peer is in another user namespace"
		wrongNetwork = "error: refused: the peer is in another network namespace"
	)
	of := func(kind string) string { return fmt.Sprintf("--%s=/proc/%d/ns/%s", kind, sandbox.Process.Pid, kind) }
	refused := 0
	for _, row := range []struct {
		name     string
		rootOnly bool
		attr     *syscall.SysProcAttr
		wrap     []string
		want     string
	}{
		{"our own namespaces are served", false, nil, nil, "answer: served"},
		{"a sandbox is refused", false, nil, []string{"nsenter", "--preserve-credentials", of("user"), of("net")}, wrongNetwork},
		{"a namespace made inside a sandbox is refused", false, nil, []string{"nsenter", "--preserve-credentials", of("user"), of("net"), "unshare", "--user"}, wrongNetwork},
		{"root of a user namespace in our network is refused", false, inNamespaces(syscall.CLONE_NEWUSER), nil, wrongUser},
		{"what shares our user namespace only, as an attached process or a pod does, is refused", true, inNamespaces(syscall.CLONE_NEWNET), nil, wrongNetwork},
		{"a pod with all its namespaces is refused", true, inNamespaces(syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC), nil, wrongNetwork},
		{"root with every id mapped to itself, as in a sandbox of root's, is refused", true, identity(syscall.CLONE_NEWUSER), nil, wrongUser},
		{"a process of another PID namespace is served", true, inNamespaces(syscall.CLONE_NEWPID), nil, "answer: served"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.rootOnly && os.Geteuid() != 0 {
				t.Skip("only root can make such a peer")
			}
			if len(row.wrap) > 0 {
				if _, err := exec.LookPath(row.wrap[0]); err != nil {
					t.Skip("no nsenter here")
				}
			}
			if !strings.HasPrefix(row.want, "answer") {
				refused++
			}
			if _, line := startPeer(t, socket, row.attr, row.wrap...); !strings.HasPrefix(line, row.want) {
				t.Errorf("the peer was told %q, want %q", line, row.want)
			}
		})
	}
	lines, _ := log.Last(0)
	if len(lines) != refused {
		t.Errorf("%d refusals logged, want %d: %v", len(lines), refused, lines)
	}
}

// Root of the host may command an ordinary user's sandbox. Root in another sandbox, which has the
// same uid for that user's monitor, may not. The monitor may look at neither.
func TestAnOrdinaryUsersMonitorTellsRootFromRootInASandbox(t *testing.T) {
	var st unix.Stat_t
	testutil.Must(t, unix.Stat("/proc/self/ns/user", &st))
	if os.Geteuid() != 0 || st.Ino != registry.InitialUserNS {
		t.Skip("only the host's root can be both")
	}
	dir := testutil.ShortDir(t)
	socket := filepath.Join(dir, "s")
	testutil.Must(t, os.Chown(dir, 12345, 12345))
	for up := filepath.Dir(socket); strings.HasPrefix(up, os.TempDir()+"/"); up = filepath.Dir(up) {
		testutil.Must(t, os.Chmod(up, 0o755))
	}
	monitor := exec.Command(installed(t, 0o755), "test-monitor", socket)
	monitor.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}, Pdeathsig: syscall.SIGKILL}
	in, err := monitor.StdinPipe()
	testutil.Must(t, err)
	out, err := monitor.StdoutPipe()
	testutil.Must(t, err)
	testutil.Must(t, monitor.Start())
	t.Cleanup(func() { in.Close(); _ = monitor.Wait() })
	buf := make([]byte, 64)
	if n, err := out.Read(buf); err != nil || strings.TrimSpace(string(buf[:n])) != "ready" {
		t.Fatalf("the monitor said %q, %v", buf[:n], err)
	}
	for _, row := range []struct {
		name string
		attr *syscall.SysProcAttr
		want string
	}{
		{"the host's root", nil, "answer: served"},
		{"root in a sandbox of root's", identity(syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET), "error: refused: the peer is in another network namespace"},
		{"root in a pod", inNamespaces(syscall.CLONE_NEWNET | syscall.CLONE_NEWPID), "error: refused: the peer is in another network namespace"},
		{"root alone in a user namespace", inNamespaces(syscall.CLONE_NEWUSER), "error: refused: cannot tell where the peer lives"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, line := startPeer(t, socket, row.attr); !strings.HasPrefix(line, row.want) {
				t.Errorf("the peer was told %q, want %q", line, row.want)
			}
		})
	}
}

// Before Linux 6.5 a process number is all there is: it counts if that process has the other end.
func TestAProcessNumberThatPassedOnIsNoPeer(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	testutil.Must(t, err)
	defer unix.Close(fds[0])
	other, line := startPeer(t, "-", nil)
	if line != "ready" {
		t.Fatal(line)
	}
	for _, row := range []struct {
		name string
		pid  int
		open bool
		want string
	}{
		{"the process that has it", os.Getpid(), true, ""},
		{"another process", other.Process.Pid, true, "somebody else's"},
		{"nobody any more", os.Getpid(), false, "somebody else's"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if !row.open {
				unix.Close(fds[1])
			}
			dir, err := unix.Open(fmt.Sprintf("/proc/%d", row.pid), unix.O_PATH|unix.O_CLOEXEC, 0)
			testutil.Must(t, err)
			p := registry.PeerProcess{Dir: dir}
			defer p.Close()
			err = p.HoldsOtherEnd(fds[0])
			if got := fmt.Sprint(err); (err == nil) != (row.want == "") || !strings.Contains(got, row.want) {
				t.Errorf("it says %v, want %q", err, row.want)
			}
		})
	}
}

func TestPeersOfOtherUsersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user")
	}
	other := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	socket, _ := serveInfo(t, registry.PeerPolicy{Uid: os.Geteuid()})
	testutil.Must(t, os.Chmod(socket, 0o777))
	for dir := filepath.Dir(socket); strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
		testutil.Must(t, os.Chmod(dir, 0o755))
	}
	if _, line := startPeer(t, socket, other); line != "error: refused: uid 12345 does not own this sandbox" {
		t.Errorf("another user was told %q", line)
	}
	theirs, _ := serveInfo(t, registry.PeerPolicy{Uid: 12345})
	if _, line := startPeer(t, theirs, nil); line != "answer: served" {
		t.Errorf("root was told %q by another user's sandbox", line)
	}
}

func TestControlServerIsBounded(t *testing.T) {
	socket, _ := serveInfo(t, registry.PeerPolicy{Uid: os.Geteuid()})
	ask := func(raw string) string {
		t.Helper()
		c, err := net.Dial("unix", socket)
		testutil.Must(t, err)
		defer c.Close()
		_, _ = io.WriteString(c, raw)
		b, err := io.ReadAll(c)
		if err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	for _, row := range []struct{ name, raw, want string }{
		{"a request is answered", `{"method":"info"}` + "\n", `"name":"served"`},
		{"an unknown method is refused", `{"method":"reboot"}` + "\n", `"code":"bad-request"`},
		{"an unknown field is refused", `{"method":"info","x":1}` + "\n", `unknown field`},
		{"a second value is refused", `{"method":"info"}{}` + "\n", `more than one JSON value`},
		{"no method is refused", "{}\n", `no \"method\"`},
		{"garbage is refused", "GET / HTTP/1.1\r\n\r\n", `bad request`},
		{"a line without end is cut off", strings.Repeat("x", api.MaxRequest+8192), `line longer than`},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := ask(row.raw); !strings.Contains(got, row.want) {
				t.Errorf("got %q, want %q in it", got, row.want)
			}
		})
	}
}
