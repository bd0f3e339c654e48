package cluster

// A node: containerd, kubelet and kube-proxy in a space, as any node has them.

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// The daemons of a node, for Node.Restart.
const (
	Containerd = "containerd"
	Kubelet    = "kubelet"
	KubeProxy  = "kube-proxy"
)

// Conflist is the node's network configuration list, with ptp, host-local and portmap.
const Conflist = "/etc/cni/net.d/10-main.conflist"

// Node is one that runs.
type Node struct {
	*space
	number int
	cidrs  []string
}

// Name is the node's name in the cluster.
func (n *Node) Name() string { return n.name }

// IPv4 is the node's address.
func (n *Node) IPv4() string { return underlay4(10 + n.number) }

// IPv6 is the node's address.
func (n *Node) IPv6() string { return underlay6(10 + n.number) }

// Command returns a command that runs on the node, in all of its namespaces. It ends with ctx.
func (n *Node) Command(ctx context.Context, argv ...string) *exec.Cmd {
	return n.command(ctx, argv...)
}

// Start starts another daemon on the node, which ends with the node.
func (n *Node) Start(name string, argv ...string) error { return n.start(name, argv...) }

// Restart stops a daemon with SIGTERM and starts it again. A kubelet is started until it answers,
// as an init system does: it ends while the runtime is not ready.
func (n *Node) Restart(ctx context.Context, name string) error {
	if err := n.restart(name); err != nil || name != Kubelet {
		return err
	}
	return until(60*time.Second, func() error {
		if n.alive(name) != nil {
			if err := n.start(name, n.daemons[name].argv...); err != nil {
				return err
			}
		}
		return n.command(ctx, "curl", "-fsS", "-m", "2", "http://127.0.0.1:10248/healthz").Run()
	})
}

// File is where a file of a directory that is the node's own, such as /etc/cni, lies on the machine.
func (n *Node) File(path string) string { return filepath.Join(n.dir, "fs", path) }

func (c *Cluster) startNode(ctx context.Context, number int) error {
	s, err := c.newSpace(fmt.Sprintf("n%d", number))
	if err != nil {
		return err
	}
	n := &Node{space: s, number: number}
	c.nodes = append(c.nodes, n)
	if err := c.control.ip(fmt.Sprintf("link add %s type veth peer name eth0 netns %d\nlink set %[1]s master kb0 up\n", n.name, n.pid)); err != nil {
		return err
	}
	// Without a default route no process of the node's own could reach a service's address.
	if err := n.ip(fmt.Sprintf(`link set lo up
addr add %s/24 dev eth0
addr add %s/64 dev eth0 nodad
link set eth0 up
route add default via %s
route add default via %s
`, n.IPv4(), n.IPv6(), underlay4(1), underlay6(1))); err != nil {
		return err
	}
	if err := c.startContainerd(ctx, n); err != nil {
		return err
	}
	if err := c.startKubelet(n); err != nil {
		return err
	}
	config := filepath.Join(n.dir, "proxy.yaml")
	if err := writeJSON(config, map[string]any{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "nftables",
		"clientConnection": map[string]any{"kubeconfig": c.pki.path("proxy.conf")},
		"clusterCIDR":      pods4 + "," + pods6, "hostnameOverride": n.name,
		// These are the machine's, and a network namespace may not set them.
		"conntrack": map[string]any{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
	}); err != nil {
		return err
	}
	return n.start(KubeProxy, c.builder.path("kube-proxy"), "--config="+config, "-v=2")
}

// containerdConfig is of version 2, which containerd 1 and 2 read. A container gets no oom_score_adj
// below that of its runtime, for machines where root may not lower it.
const containerdConfig = `version = 2
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  disable_apparmor = true
  restrict_oom_score_adj = true
  enable_unprivileged_ports = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
`

func (c *Cluster) startContainerd(ctx context.Context, n *Node) error {
	config := filepath.Join(n.dir, "containerd.toml")
	if err := os.WriteFile(config, []byte(containerdConfig), 0o644); err != nil {
		return err
	}
	if err := n.start(Containerd, "containerd", "-c", config); err != nil {
		return err
	}
	if err := until(60*time.Second, func() error {
		if err := n.alive(Containerd); err != nil {
			return err
		}
		return n.command(ctx, "ctr", "version").Run()
	}); err != nil {
		return fmt.Errorf("waiting for containerd of %s: %w", n.name, err)
	}
	for _, image := range c.images {
		if out, err := n.command(ctx, "ctr", "-n", "k8s.io", "images", "import", image).CombinedOutput(); err != nil {
			return fmt.Errorf("importing %s into %s: %w\n%s", filepath.Base(image), n.name, err, out)
		}
	}
	return nil
}

func (c *Cluster) startKubelet(n *Node) error {
	cert := "kubelet-" + n.name
	if err := c.pki.certificate(cert, "system:node:"+n.name, "system:nodes", n.name, n.IPv4(), n.IPv6()); err != nil {
		return err
	}
	kubeconfig, err := c.pki.kubeconfig(cert)
	if err != nil {
		return err
	}
	none := map[string]string{"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"}
	config := filepath.Join(n.dir, "kubelet.yaml")
	if err := writeJSON(config, map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"authentication": map[string]any{"anonymous": map[string]any{"enabled": false}, "webhook": map[string]any{"enabled": true},
			"x509": map[string]any{"clientCAFile": c.pki.path("ca.crt")}},
		"authorization":            map[string]any{"mode": "Webhook"},
		"tlsCertFile":              c.pki.path(cert + ".crt"),
		"tlsPrivateKeyFile":        c.pki.path(cert + ".key"),
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		// containerd 1 does not tell the kubelet its cgroup driver.
		"cgroupDriver": "cgroupfs", "failCgroupV1": false, "enforceNodeAllocatable": []string{},
		"failSwapOn": false, "clusterDNS": []string{dns4}, "clusterDomain": "cluster.local", "resolvConf": "",
		// Nothing is evicted for what the machine lacks.
		"imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99, "evictionHard": none,
	}); err != nil {
		return err
	}
	return n.start(Kubelet, c.builder.path("kubelet"), "--config="+config, "--kubeconfig="+kubeconfig,
		"--hostname-override="+n.name, "--node-ip="+n.IPv4()+","+n.IPv6(), "-v=2")
}

// network gives each node the main plugin for the addresses that the controller manager has
// given it, and the others routes there.
func (c *Cluster) network(ctx context.Context) error {
	version, err := cniVersion(ctx)
	if err != nil {
		return err
	}
	for _, n := range c.nodes {
		if err := until(60*time.Second, func() error {
			if err := n.alive(Kubelet); err != nil {
				return err
			}
			out, err := c.kubectl(ctx, "", "get", "node", n.name, "-o", "jsonpath={.spec.podCIDRs[*]}")
			if n.cidrs = strings.Fields(out); err == nil && len(n.cidrs) != 2 {
				err = fmt.Errorf("it has the addresses %q", n.cidrs)
			}
			return err
		}); err != nil {
			return fmt.Errorf("waiting for node %s: %w", n.name, err)
		}
		if err := n.installPlugin(c.builder.path("cni"), version); err != nil {
			return err
		}
	}
	// The control plane has these routes too: pods reach it under their own addresses.
	spaces := []*space{c.control}
	for _, n := range c.nodes {
		spaces = append(spaces, n.space)
	}
	for _, s := range spaces {
		var routes strings.Builder
		for _, n := range c.nodes {
			if n.space != s {
				fmt.Fprintf(&routes, "route replace %s via %s\nroute replace %s via %s\n", n.cidrs[0], n.IPv4(), n.cidrs[1], n.IPv6())
			}
		}
		if err := s.ip(routes.String()); err != nil {
			return err
		}
	}
	_, err = c.kubectl(ctx, "", "wait", "--for=condition=Ready", "node", "--all", "--timeout=120s")
	return err
}

// installPlugin lays the plugins and then, in one step, the list that has containerd call them.
func (n *Node) installPlugin(from, version string) error {
	plugins, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, p := range plugins {
		if err := copyFile(filepath.Join(from, p.Name()), n.File("/opt/cni/bin/"+p.Name())); err != nil {
			return err
		}
	}
	type object = map[string]any
	list := n.File(Conflist)
	if err := writeJSON(list+".new", object{"cniVersion": version, "name": "main", "plugins": []object{
		{"type": "ptp", "ipMasq": false, "mtu": 1500, "ipam": object{
			"type":   "host-local",
			"ranges": [][]object{{{"subnet": n.cidrs[0]}}, {{"subnet": n.cidrs[1]}}},
			"routes": []object{{"dst": "0.0.0.0/0"}, {"dst": "::/0"}},
		}},
		{"type": "portmap", "capabilities": object{"portMappings": true}, "snat": true},
	}}); err != nil {
		return err
	}
	return os.Rename(list+".new", list)
}

var containerdVersion = regexp.MustCompile(`\bv?(\d+)\.\d+\.\d+`)

// cniVersion returns the newest version of the specification that containerd speaks: 2 has
// the verbs STATUS and GC, and 1 refuses a list that has them.
func cniVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, Containerd, "--version").Output()
	if err != nil {
		return "", err
	}
	return cniVersionOf(string(out))
}

func cniVersionOf(version string) (string, error) {
	switch m := containerdVersion.FindStringSubmatch(version); {
	case m == nil:
		return "", fmt.Errorf("containerd says no version: %q", version)
	case m[1] == "1":
		return "1.0.0", nil
	}
	return "1.1.0", nil
}

func writeJSON(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
