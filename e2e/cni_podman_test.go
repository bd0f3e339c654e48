package e2e

// podman with its CNI backend makes the namespaces and calls libcni, and conmon calls podman again
// when a container has ended.

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// podman is an instance with its own files, storage and networks, in a node.
type podman struct {
	n    *node
	conf string
}

const podmanImage = "localhost/peer"

// podmanConf gives containers no cgroups, which belong to the machine, and limits that a root
// without CAP_SYS_RESOURCE can set.
const podmanConf = `
[containers]
cgroups = "disabled"
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[network]
network_backend = "cni"
cni_plugin_dirs = [%q, %q, %q]
network_config_dir = %q
default_network = %q
[engine]
cgroup_manager = "cgroupfs"
runtime = "crun"
events_logger = "none"
lock_type = "file"
tmp_dir = "/var/lib/podman/tmp"
`

const podmanStorage = `
[storage]
driver = "vfs"
graphroot = "/var/lib/podman/storage"
runroot = "/var/lib/podman/run"
`

func newPodman(t *testing.T, n *node, lists string) *podman {
	t.Helper()
	dir := t.TempDir()
	p := &podman{n, filepath.Join(dir, "containers.conf")}
	for path, text := range map[string]string{
		p.conf:            fmt.Sprintf(podmanConf, filepath.Join(n.dir, "bin"), n.bin, debianPlugins, lists, cniNetwork),
		p.conf + ".store": podmanStorage,
		dir + "/rootfs":   string(rootfs(t)),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p.ok(t, "import", "--quiet", dir+"/rootfs", podmanImage)
	t.Cleanup(func() { p.ok(t, "rm", "--all", "--force", "--time", "0") })
	return p
}

func (p *podman) argv(args ...string) []string {
	return append([]string{"env", "CONTAINERS_CONF=" + p.conf, "CONTAINERS_STORAGE_CONF=" + p.conf + ".store", "podman"}, args...)
}

func (p *podman) ok(t *testing.T, args ...string) result {
	t.Helper()
	return ok(t, p.n, 30*time.Second, p.argv(args...)...)
}

// podmanContainer is a running container, and a place for commands.
type podmanContainer struct {
	p        *podman
	name, id string
}

// run starts a container that serves.
func (p *podman) run(t *testing.T, name string, flags ...string) *podmanContainer {
	t.Helper()
	args := append([]string{"run", "--detach", "--name", name}, flags...)
	r := p.ok(t, append(args, podmanImage, peerBin(), "serve")...)
	return &podmanContainer{p, name, strings.TrimSpace(r.out)}
}

func (c *podmanContainer) String() string { return "container " + c.name }

func (c *podmanContainer) start(t *testing.T, argv ...string) *proc {
	t.Helper()
	return c.p.n.start(t, c.p.argv(append([]string{"exec", c.name}, argv...)...)...)
}

// addr returns the container's address in the gated network, as podman knows it.
func (c *podmanContainer) addr(t *testing.T, six bool) string {
	t.Helper()
	key := map[bool]string{false: "IPAddress", true: "GlobalIPv6Address"}[six]
	r := c.p.ok(t, "inspect", "--format", fmt.Sprintf("{{(index .NetworkSettings.Networks %q).%s}}", cniNetwork, key), c.name)
	a := strings.TrimSpace(r.out)
	if net.ParseIP(a) == nil {
		t.Fatalf("podman knows no address of %s\n%s", c, r)
	}
	return a
}

func (c *podmanContainer) attachment(t *testing.T) attachment { return c.p.n.theAttachment(t, c.id) }

func (c *podmanContainer) netns(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(c.p.ok(t, "inspect", "--format", "{{.NetworkSettings.SandboxKey}}", c.name).out)
}

func TestCNIPodman(t *testing.T) {
	cniArea(t, "cni.podman", "podman", "conmon", "crun", "curl", "iptables")
	for _, row := range []struct {
		name string
		network
	}{
		{"installed after bridge and portmap", network{version: "1.0.0", main: "bridge", subnets: dual, portmap: true, bare: true}},
		// portmap is not a delegate here: when podman has an address to give, as at `network
		// reload`, it passes the first plugin of the list nothing else.
		{"with bridge as delegate and portmap after", network{version: "1.0.0", main: "bridge", subnets: dual, portmap: true, alone: true, portmapLast: true}},
	} {
		t.Run(row.name, func(t *testing.T) {
			n, lists := newRuntimeNode(t)
			row.sluice = map[string]any{"policy": gatedPolicy()}
			n.conflistFile(t, filepath.Join(lists, "gated.conflist"), row.network)
			p := newPodman(t, n, lists)
			server := p.run(t, "server", "--publish", fmt.Sprintf("8088:%d", portHTTP), "--publish", fmt.Sprintf("8085:%d/udp", portWhoami))
			friend, stranger := p.run(t, "friend"), p.run(t, "stranger")
			published := func(t *testing.T, error string) {
				t.Helper()
				for _, six := range []bool{false, true} {
					if d, r := dial(t, n.far, "-timeout", "500ms", "-send", "GET / HTTP/1.0\r\n\r\n", at(nodeAddr(six), 8088)); d.Error != error {
						t.Errorf("a published port: %q, not %q\n%s", d.Error, error, r)
					}
				}
			}
			published(t, "timeout")

			n.setPolicy(t, server.attachment(t).Name, friend.addr(t, false), friend.addr(t, true), far4, far6)
			for _, six := range []bool{false, true} {
				to := server.addr(t, six)
				r := ok(t, friend, 10*time.Second, peerBin(), "get", url(to, portHTTP, "/addr"))
				if !strings.Contains(r.out, friend.addr(t, six)) {
					t.Errorf("the server saw not %s\n%s", friend.addr(t, six), r)
				}
				if d, r := dial(t, stranger, "-timeout", "500ms", at(to, portHTTP)); d.Error != "timeout" {
					t.Errorf("the stranger: %q\n%s", d.Error, r)
				}
				r = ok(t, n.far, 10*time.Second, "curl", "-gsS", "-m", "5", url(nodeAddr(six), 8088, "/addr"))
				if !strings.Contains(r.out, farAddr(six)) {
					t.Errorf("through the published port the server saw not %s\n%s", farAddr(six), r)
				}
				if d, r := udp(t, n.far, at(nodeAddr(six), 8085)); !strings.Contains(d.Got, farAddr(six)) {
					t.Errorf("through the published UDP port the server saw not %s\n%s", farAddr(six), r)
				}
				n.wantFlow(t, server.attachment(t).Name, "tcp", at(to, portHTTP), friend.addr(t, six), "ingress[0] friends")
				n.wantFlow(t, server.attachment(t).Name, "tcp", at(to, portHTTP), stranger.addr(t, six), "DROPPED", "default")
			}
			if out := n.sluice(t, "ps").out; !strings.Contains(out, "pod /stranger eth0 network gated") {
				t.Errorf("`sluice ps` does not say which container it is\n%s", out)
			}

			for _, again := range [][]string{{"restart", "--time", "1", "server"}, {"network", "reload", "server"}} {
				t.Run(again[0], func(t *testing.T) {
					before, addr := server.attachment(t), server.addr(t, true)
					p.ok(t, again...)
					after := server.attachment(t)
					if after.PID == before.PID {
						t.Errorf("before %+v, now %+v", before, after)
					}
					if now := server.addr(t, true); again[0] == "network" && now != addr {
						t.Errorf("the address was %s and is %s", addr, now)
					}
					published(t, "timeout") // its policy is that of the network again
					n.setPolicy(t, after.Name, far4, far6)
					published(t, "")
				})
			}
			if row.bare {
				t.Run("a second network", func(t *testing.T) { podmanSecondNetwork(t, p, lists, friend) })
			}
			t.Run("a container that ends", func(t *testing.T) {
				p.ok(t, "kill", "stranger")
				testutil.Within(t, 5*time.Second, func() (bool, string) {
					left := n.attachments(t, stranger.id)
					return len(left) == 0, fmt.Sprintf("still attached: %+v", left)
				})
				p.ok(t, "rm", "stranger")
			})
			p.ok(t, "stop", "--time", "1", "server", "friend")
			published(t, "ECONNREFUSED")
			p.ok(t, "rm", "server", "friend")
			n.clean(t)
		})
	}
}

// podmanSecondNetwork joins a running container to another network and removes it again.
func podmanSecondNetwork(t *testing.T, p *podman, lists string, c *podmanContainer) {
	path := filepath.Join(lists, "second.conflist")
	p.n.conflistFile(t, path, network{version: "1.0.0", main: "bridge", subnets: []string{"10.89.0.0/16"}, bare: true, sluice: map[string]any{}})
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text = []byte(strings.NewReplacer(`"`+cniNetwork+`"`, `"second"`, `"cni0"`, `"cni0-second"`).Replace(string(text)))
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	defaults := func(want ...string) {
		t.Helper()
		r := ok(t, p.n, 5*time.Second, "nsenter", "--net="+c.netns(t), "ip", "-4", "route", "show", "default")
		var got []string
		for line := range strings.Lines(r.out) {
			got = append(got, strings.Fields(line)[2])
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("the container's default routes are by %q, not %q\n%s", got, want, r)
		}
	}
	defaults("10.88.0.1")
	p.ok(t, "network", "connect", "second", c.name)
	defaults("10.89.0.1", "10.88.0.1")
	if own := p.n.attachments(t, c.id); len(own) != 2 {
		t.Errorf("a container in two networks has these attachments: %+v", own)
	}
	p.ok(t, "network", "disconnect", "second", c.name)
	defaults("10.88.0.1")
	if own := p.n.attachments(t, c.id); len(own) != 1 {
		t.Errorf("back in one network the container has these attachments: %+v", own)
	}
}
