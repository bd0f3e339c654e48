package e2e

// Pods of a real containerd: what its CRI passes to the plugin, and what happens to the pods when
// it ends and restarts.

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestCNIContainerd(t *testing.T) {
	cniArea(t, "cni.containerd", "containerd", "ctr", "crun", "curl", "iptables")
	for _, row := range []struct {
		name string
		end  syscall.Signal // for containerd, in between
		network
	}{
		{"installed after ptp and portmap", syscall.SIGTERM, network{version: "1.0.0", main: "ptp", subnets: dual, portmap: true, bare: true}},
		{"with bridge and portmap as delegates", syscall.SIGKILL, network{version: "1.0.0", main: "bridge", subnets: dual, portmap: true, alone: true}},
	} {
		t.Run(row.name, func(t *testing.T) {
			n, lists := newRuntimeNode(t)
			serve(t, n.far)
			n.far.start(t, peerBin(), "dns", "-web", far4+","+far6, far4).waitText(t, `"listening"`, 5*time.Second)
			row.sluice = map[string]any{
				"policyDir": policyDir(t, n),
				"select":    map[string]any{"annotations": map[string]string{"sluice.dev/gate": "yes"}},
			}
			if row.alone { // otherwise they are what `install` declares
				row.sluice["capabilities"] = map[string]any{"portMappings": true, "bandwidth": true, "dns": true, "ipRanges": true,
					"cgroupPath": true, "io.kubernetes.cri.pod-annotations": true}
			}
			n.conflistFile(t, filepath.Join(lists, "10-gated.conflist"), row.network)
			c := newContainerd(t, n, lists)
			gate := map[string]string{"sluice.dev/gate": "yes"}
			server := c.runPod(t, "server", map[string]string{"sluice.dev/gate": "yes",
				"kubernetes.io/ingress-bandwidth": "40M", "kubernetes.io/egress-bandwidth": "1G"},
				&cri.PortMapping{Protocol: cri.Protocol_TCP, HostPort: 8088, ContainerPort: portHTTP},
				&cri.PortMapping{Protocol: cri.Protocol_UDP, HostPort: 8085, ContainerPort: portWhoami})
			friend, other := c.runPod(t, "friend", gate), c.runPod(t, "other", nil)

			if left := n.attachments(t, other.id); len(left) > 0 {
				t.Errorf("a pod that is not selected is attached: %+v", left)
			}
			att := n.theAttachment(t, server.id)
			if out := n.sluice(t, "ps").out; !strings.Contains(out, "pod default/server eth0 network gated") {
				t.Errorf("`sluice ps` does not say which pod it is\n%s", out)
			}
			traffic := func(t *testing.T) {
				t.Helper()
				for _, six := range []bool{false, true} {
					r := ok(t, friend, 10*time.Second, peerBin(), "get", url(server.addr(six), portHTTP, "/addr"))
					if !strings.Contains(r.out, friend.addr(six)) {
						t.Errorf("the server saw not %s\n%s", friend.addr(six), r)
					}
					if d, r := dial(t, other, "-timeout", "400ms", at(server.addr(six), portHTTP)); d.Error != "timeout" {
						t.Errorf("a pod that the policy does not name: %q\n%s", d.Error, r)
					}
					n.wantFlow(t, att.Name, "tcp", at(server.addr(six), portHTTP), friend.addr(six), "ingress[0] friends")
					n.wantFlow(t, att.Name, "tcp", at(server.addr(six), portHTTP), other.addr(six), "DROPPED", "default")
					r = ok(t, n.far, 10*time.Second, "curl", "-gsS", "-m", "5", url(nodeAddr(six), 8088, "/addr"))
					if !strings.Contains(r.out, farAddr(six)) {
						t.Errorf("by the host's port the server saw not %s\n%s", farAddr(six), r)
					}
					if d, r := udp(t, n.far, at(nodeAddr(six), 8085)); !strings.Contains(d.Got, farAddr(six)) {
						t.Errorf("by the host's UDP port the server saw not %s\n%s", farAddr(six), r)
					}
				}
				answer := server.forward(t, portHTTP, "GET / HTTP/1.0\r\n\r\n")
				if !strings.Contains(answer, "hello from peer") {
					t.Errorf("port forwarding answers %q", answer)
				}
			}
			n.setPolicy(t, att.Name, friend.addr4, friend.addr6, far4, far6)
			traffic(t)

			// By the runtime's resolv.conf, through a pod that belongs to the main plugin alone.
			r := ok(t, other, 10*time.Second, peerBin(), "get", url("web.test.", portHTTP, "/addr"))
			if !strings.Contains(r.out, other.addr4) && !strings.Contains(r.out, other.addr6) {
				t.Errorf("the server saw not %s\n%s", other, r)
			}

			// The runtime says whom to ask under a policy by name.
			n.sluice(t, "policy", "set", n.theAttachment(t, friend.id).Name, write(t, "names.json", jsonText(t, policyByName("web.test"))))
			ok(t, friend, 10*time.Second, peerBin(), "get", url("web.test", portHTTP, "/")).wantOut(t, "hello from peer")
			for what, u := range map[string]string{"another name": url("tag.test", portHTTP, "/"), "a bare address": url(far4, portHTTP, "/")} {
				if r := run(t, friend, 10*time.Second, peerBin(), "get", u); strings.Contains(r.out, "hello") {
					t.Errorf("%s is let through\n%s", what, r)
				}
			}
			n.setPolicy(t, n.theAttachment(t, friend.id).Name, friend.addr4, friend.addr6)

			// 5 MB at 40 Mbit/s.
			r = ok(t, n.far, 20*time.Second, peerBin(), "xfer", "-streams", "1", "-size", "5000000", "-dir", "up", at(server.addr4, portXfer))
			if r.took < 600*time.Millisecond {
				t.Errorf("the annotation's bandwidth is exceeded\n%s", r)
			}

			before := n.theAttachment(t, friend.id)
			held := n.far.start(t, peerBin(), "hold", "-count", "20", at(server.addr4, portEcho))
			held.waitText(t, `"held","open":20`, 10*time.Second)
			c.down(t, row.end)
			r = ok(t, n.far, 10*time.Second, "curl", "-gsS", "-m", "5", url(nodeAddr(false), 8088, "/"))
			if !strings.Contains(r.out, "hello") {
				t.Errorf("without containerd the server does not answer\n%s", r)
			}
			c.up(t)
			if now := n.theAttachment(t, friend.id); now != before {
				t.Errorf("before containerd ended %+v, now %+v", before, now)
			}
			held.write([]byte("echo\n"))
			held.waitText(t, `"echoed","open":20`, 10*time.Second)
			held.stop(t, syscall.SIGKILL)
			traffic(t)

			friend.die(t)
			for range 2 { // a kubelet repeats a call that it is not sure of
				for _, p := range []*criPod{server, friend, other} {
					p.stop(t)
				}
			}
			if left := n.attachments(t, server.id); len(left) > 0 {
				t.Errorf("after StopPodSandbox: %+v", left)
			}
			if d, r := dial(t, n.far, "-timeout", "500ms", at(pair4, 8088)); d.Error != "ECONNREFUSED" {
				t.Errorf("the host's port after StopPodSandbox: %q\n%s", d.Error, r)
			}
			for _, p := range []*criPod{server, friend, other} {
				p.remove(t)
			}
			n.clean(t)
		})
	}
}

// policyDir returns a directory with a policy that lets no client in to the pods of the namespace
// default.
func policyDir(t *testing.T, n *node) string {
	t.Helper()
	dir := filepath.Join(n.dir, "policies")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "default.yaml"), []byte(jsonText(t, gatedPolicy())), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}
