package e2e

// containerd as a kubelet drives it: by the CRI, on a socket of its own. It starts everything in
// the node's namespaces.

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	neturl "net/url"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sluice.dev/sluice/internal/testutil"
)

const criImage = "sluice.test/peer:1"

// criConfig switches off what containerd would ask of the machine: cgroups, oom scores, directories
// outside its own.
const criConfig = `
version = 2
root = "/var/lib/containerd"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "%[1]s/sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + criImage + `"
  stream_server_address = "127.0.0.1"
  disable_cgroup = true
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "%[2]s"
    conf_dir = "%[3]s"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    default_runtime_name = "crun"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]
        BinaryName = "%[4]s"
`

type containerd struct {
	cri.RuntimeServiceClient
	n      *node
	dir    string // short enough for a socket's path
	daemon *proc
}

// newContainerd starts containerd in a node, with the lists as its networks.
func newContainerd(t *testing.T, n *node, lists string) *containerd {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "cri")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	// This containerd looks for plugins in one directory only.
	bin := filepath.Join(n.dir, "bin")
	for _, plugin := range []string{"bridge", "host-local", "loopback", "portmap", "ptp"} {
		if err := os.Symlink(filepath.Join(debianPlugins, plugin), filepath.Join(bin, plugin)); err != nil {
			t.Fatal(err)
		}
	}
	// It is already there if it was installed.
	if err := os.Symlink(filepath.Join(n.bin, "sluice-cni"), filepath.Join(bin, "sluice-cni")); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	crun := filepath.Join(bin, "crun")
	for path, text := range map[string]string{
		dir + "/config.toml": fmt.Sprintf(criConfig, dir, bin, lists, crun),
		crun:                 "#!/bin/sh\nexec /usr/bin/env crun --cgroup-manager=disabled \"$@\"\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := grpc.NewClient("unix://"+dir+"/sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := &containerd{RuntimeServiceClient: cri.NewRuntimeServiceClient(conn), n: n, dir: dir}
	c.up(t)
	ok(t, n, 30*time.Second, "ctr", "--address", dir+"/sock", "--namespace", "k8s.io", "images", "import", "--no-unpack", ociArchive(t, criImage, peerBin(), "pause"))
	testutil.Within(t, 5*time.Second, func() (bool, string) { // the CRI learns of it by an event
		r, err := cri.NewImageServiceClient(conn).ImageStatus(c.ctx(t), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: criImage}})
		return err == nil && r.Image != nil, fmt.Sprintf("the image is not known: %v", err)
	})
	return c
}

// up starts containerd and waits until it and its network are ready.
func (c *containerd) up(t *testing.T) {
	t.Helper()
	c.daemon = c.n.start(t, "containerd", "--config", c.dir+"/config.toml")
	testutil.Within(t, 15*time.Second, func() (bool, string) {
		ctx, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		r, err := c.Status(ctx, &cri.StatusRequest{})
		if err != nil {
			return false, err.Error() + "\n" + c.daemon.result("").String()
		}
		ready := true
		for _, what := range r.Status.Conditions {
			ready = ready && what.Status
		}
		return ready, fmt.Sprintf("containerd is not ready: %v", r.Status)
	})
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { c.removeAll(t) }) // runs before the clean-up that ends this containerd
}

func (c *containerd) ctx(t *testing.T) context.Context {
	t.Helper()
	// Not the test's own context, because clean-up must be able to call too.
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(stop)
	return ctx
}

// removeAll removes the pods that a failed test left.
func (c *containerd) removeAll(t *testing.T) {
	t.Helper()
	select {
	case <-c.daemon.done:
		return // another call has done it, or nothing can
	default:
	}
	all, err := c.ListPodSandbox(c.ctx(t), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Errorf("listing the pods: %v", err)
		return
	}
	for _, s := range all.Items {
		_, stop := c.StopPodSandbox(c.ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: s.Id})
		_, remove := c.RemovePodSandbox(c.ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: s.Id})
		t.Logf("the pod %s was left; stopped: %v, removed: %v", s.Id, stop, remove)
	}
}

// criPod is a pod with one container, and a place for commands: in that container.
type criPod struct {
	c                   *containerd
	name, id, container string
	addr4, addr6        string
	config              *cri.PodSandboxConfig
}

func (p *criPod) String() string { return "pod " + p.name }

func (p *criPod) addr(six bool) string { return map[bool]string{false: p.addr4, true: p.addr6}[six] }

// runPod does what a kubelet does for a pod: sandbox, container, start. The container
// serves.
func (c *containerd) runPod(t *testing.T, name string, annotations map[string]string, ports ...*cri.PortMapping) *criPod {
	t.Helper()
	logs := filepath.Join(c.n.dir, "logs", name)
	p := &criPod{c: c, name: name, config: &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name},
		Hostname: name, LogDirectory: logs, Annotations: annotations, PortMappings: ports,
		DnsConfig: &cri.DNSConfig{Servers: []string{far4}},
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}}
	sandbox, err := c.RunPodSandbox(c.ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		t.Fatalf("RunPodSandbox: %v\n%s", err, c.daemon.result(""))
	}
	p.id = sandbox.PodSandboxId
	made, err := c.CreateContainer(c.ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "server"}, Image: &cri.ImageSpec{Image: criImage},
		Command: []string{peerBin(), "serve"}, LogPath: "server.log",
	}})
	if err != nil {
		t.Fatalf("CreateContainer: %v", err)
	}
	p.container = made.ContainerId
	if _, err := c.StartContainer(c.ctx(t), &cri.StartContainerRequest{ContainerId: p.container}); err != nil {
		t.Fatalf("StartContainer: %v", err)
	}
	status, err := c.PodSandboxStatus(c.ctx(t), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatalf("PodSandboxStatus: %v", err)
	}
	ips := []string{status.Status.Network.GetIp()}
	for _, ip := range status.Status.Network.GetAdditionalIps() {
		ips = append(ips, ip.Ip)
	}
	for _, ip := range ips {
		if net.ParseIP(ip).To4() != nil {
			p.addr4 = ip
		} else {
			p.addr6 = ip
		}
	}
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		log, err := os.ReadFile(filepath.Join(logs, "server.log"))
		return bytes.Contains(log, []byte("listening")), fmt.Sprintf("the pod's server does not start: %s %v", log, err)
	})
	return p
}

// stop is StopPodSandbox, which calls the plugin's DEL and may be called again; remove is
// RemovePodSandbox.
func (p *criPod) stop(t *testing.T) {
	t.Helper()
	if _, err := p.c.StopPodSandbox(p.c.ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Errorf("StopPodSandbox: %v\n%s", err, p.c.daemon.result(""))
	}
}

func (p *criPod) remove(t *testing.T) {
	t.Helper()
	if _, err := p.c.RemovePodSandbox(p.c.ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Errorf("RemovePodSandbox: %v\n%s", err, p.c.daemon.result(""))
	}
}

// die kills the process that holds the pod's namespaces, as the kernel does when memory
// runs out.
func (p *criPod) die(t *testing.T) {
	t.Helper()
	r, err := p.c.PodSandboxStatus(p.c.ctx(t), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		t.Fatalf("PodSandboxStatus: %v", err)
	}
	var info struct{ PID int }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		t.Fatalf("PodSandboxStatus: %v: %q", err, r.Info)
	}
	kill(t, info.PID)
}

// start is ExecSync. It has no input, and no signal reaches what it started.
func (p *criPod) start(t *testing.T, argv ...string) *proc {
	t.Helper()
	run := newProc(p.String(), argv)
	ctx := p.c.ctx(t)
	go func() { // ends with the call, which has a time limit
		r, err := p.c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: argv, Timeout: 30})
		if err != nil {
			fmt.Fprintf(run.stream(&run.err), "ExecSync: %v", err)
			run.finish(-1)
			return
		}
		run.stream(&run.out).Write(r.Stdout)
		run.stream(&run.err).Write(r.Stderr)
		run.finish(int(r.ExitCode))
	}()
	return run
}

// forward is PortForward of one port: it sends text and returns the answer, by the protocol that
// kubectl speaks over a WebSocket. A message begins with its channel, 0 for data and 1 for errors;
// the first message on each names the port.
func (p *criPod) forward(t *testing.T, port uint16, text string) (answer string) {
	t.Helper()
	r, err := p.c.PortForward(p.c.ctx(t), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{int32(port)}})
	if err != nil {
		t.Fatalf("PortForward: %v", err)
	}
	at, err := neturl.Parse(r.Url)
	if err != nil {
		t.Fatal(err)
	}
	at.Scheme, at.RawQuery = "ws", fmt.Sprintf("port=%d", port)
	config, err := websocket.NewConfig(at.String(), r.Url)
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	var conn net.Conn
	p.c.n.do(func() { conn, err = net.DialTimeout("tcp", at.Host, 5*time.Second) })
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	ws, err := websocket.NewClient(config, conn)
	if err != nil {
		t.Fatalf("PortForward: %v", err)
	}
	if err := websocket.Message.Send(ws, append([]byte{0}, text...)); err != nil {
		t.Fatalf("PortForward: %v", err)
	}
	var named [2]bool
	for {
		var m []byte
		switch err := websocket.Message.Receive(ws, &m); {
		case err == io.EOF:
			return answer
		case err != nil:
			t.Fatalf("PortForward, after %q: %v", answer, err)
		case len(m) == 0 || m[0] > 1:
			t.Fatalf("PortForward: a message of no channel: %q", m)
		case !named[m[0]]:
			if named[m[0]] = true; len(m) != 3 || binary.LittleEndian.Uint16(m[1:]) != port {
				t.Fatalf("PortForward: the channel %d begins with %q", m[0], m[1:])
			}
		case m[0] == 1:
			t.Fatalf("PortForward: %s", m[1:])
		default:
			answer += string(m[1:])
		}
	}
}

// down ends containerd; the pods that it started stay.
func (c *containerd) down(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(c.daemon.pid, s); err != nil {
		t.Fatal(err)
	}
	c.daemon.wait(t, 15*time.Second)
}
