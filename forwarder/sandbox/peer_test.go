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

	"sluice/forwarder/sandbox/api"
)

// fakePeer is a process that stays where it was started: it connects to a
// control socket, asks, prints the answer, and keeps its namespaces alive
// until its standard input ends.
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
	if len(wrap) > 0 { // /proc/self would be the wrapper's
		exe, err := os.Executable()
		must(t, err)
		args[len(wrap)] = exe
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	cmd.Stderr = os.Stderr
	must(t, cmd.Start())
	t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	buf := make([]byte, 1024)
	n, err := out.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return cmd, strings.TrimSpace(string(buf[:n]))
}

// inUserNamespace clones into a new one, where the caller is root.
func inUserNamespace() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
}

// serveInfo runs a control server that answers with its name.
func serveInfo(t *testing.T, peers peerPolicy) (socket string, log *logRing) {
	t.Helper()
	socket = filepath.Join(shortDir(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	must(t, err)
	log = newLogRing(time.Now, nil)
	s := &controlServer{l: l, peers: peers, log: log}
	s.handle = func(_ context.Context, c *net.UnixConn, req api.Request) error {
		if req.Method != api.MethodInfo {
			return &api.Error{Code: api.CodeBadRequest, Message: "unknown method"}
		}
		return api.WriteResult(c, api.Info{Name: "served"})
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.serve(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return socket, log
}

func TestPeersInsideTheSandboxAreRefused(t *testing.T) {
	sandbox, line := startPeer(t, "-", inUserNamespace())
	if line != "ready" {
		t.Skipf("user namespaces cannot be made here: %s", line)
	}
	ns, err := sandboxNamespace(sandbox.Process.Pid)
	must(t, err)
	if ns == nil {
		t.Fatal("the sandbox's namespace was taken for our own")
	}
	socket, log := serveInfo(t, peerPolicy{uid: os.Geteuid(), sandbox: ns})

	into := []string{"nsenter", "--preserve-credentials", "--user=/proc/" + fmt.Sprint(sandbox.Process.Pid) + "/ns/user"}
	for _, row := range []struct {
		name string
		attr *syscall.SysProcAttr
		wrap []string
		want string
	}{
		{"our own namespace is served", nil, nil, "answer: served"},
		{"a namespace of ours beside the sandbox's is served", inUserNamespace(), nil, "answer: served"},
		{"the sandbox's namespace is refused", nil, into, "error: refused: the peer is inside the sandbox"},
		{"a namespace made inside it is refused", nil, append(into, "unshare", "--user"), "error: refused: "},
	} {
		t.Run(row.name, func(t *testing.T) {
			if len(row.wrap) > 0 {
				if _, err := exec.LookPath(row.wrap[0]); err != nil {
					t.Skip("no nsenter here")
				}
			}
			if _, line := startPeer(t, socket, row.attr, row.wrap...); !strings.HasPrefix(line, row.want) {
				t.Errorf("the peer was told %q, want %q", line, row.want)
			}
		})
	}
	lines, _ := log.last(0)
	if len(lines) != 2 {
		t.Errorf("%d refusals logged, want 2: %v", len(lines), lines)
	}
}

func TestPeersOfOtherUsersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user")
	}
	other := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	socket, _ := serveInfo(t, peerPolicy{uid: os.Geteuid()})
	must(t, os.Chmod(socket, 0o777))
	for dir := filepath.Dir(socket); strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
		must(t, os.Chmod(dir, 0o755))
	}
	if _, line := startPeer(t, socket, other); line != "error: refused: uid 12345 does not own this sandbox" {
		t.Errorf("another user was told %q", line)
	}
	theirs, _ := serveInfo(t, peerPolicy{uid: 12345})
	if _, line := startPeer(t, theirs, nil); line != "answer: served" {
		t.Errorf("root was told %q by another user's sandbox", line)
	}
}

func TestControlServerIsBounded(t *testing.T) {
	socket, _ := serveInfo(t, peerPolicy{uid: os.Geteuid()})
	ask := func(raw string) string {
		t.Helper()
		c, err := net.Dial("unix", socket)
		must(t, err)
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
