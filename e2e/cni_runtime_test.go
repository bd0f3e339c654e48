package e2e

// What the tests with real container runtimes share: a node whose runtime keeps its files to
// itself, an image with nothing but the peer, and `sluice`'s view of the containers.

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

// newRuntimeNode returns a node for a container runtime. It has its own /var/lib, where runtimes
// keep images and libcni its results, and its own directory of configuration lists.
func newRuntimeNode(t *testing.T) (n *node, lists string) {
	t.Helper()
	n = newNode(t)
	n.varLib, lists = filepath.Join(n.dir, "lib"), filepath.Join(n.dir, "net.d")
	for _, dir := range []string{n.varLib, lists, filepath.Join(n.dir, "bin")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	n.do(func() {
		err = unix.Mount(n.varLib, "/var/lib", "", unix.MS_BIND, "")
		// crun refuses cgroup v1 with v2 beside it; the containers use neither.
		if e := unix.Unmount("/sys/fs/cgroup/unified", unix.MNT_DETACH); !errors.Is(e, unix.EINVAL) && !errors.Is(e, unix.ENOENT) {
			err = errors.Join(err, e)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return n, lists
}

// conflistFile puts a list where the runtime reads it. A bare one gets sluice as people add it,
// with the keys of w.sluice.
func (n *node) conflistFile(t *testing.T, path string, w network) {
	t.Helper()
	if err := os.WriteFile(path, n.conflistJSON(t, w), 0o644); err != nil {
		t.Fatal(err)
	}
	if !w.bare {
		return
	}
	ok(t, n, 10*time.Second, filepath.Join(n.bin, "sluice-cni"), "install", "--conflist", path,
		"--config", write(t, "keys.json", jsonText(t, w.sluice)), "--bin-dir", filepath.Join(n.dir, "bin"))
}

func jsonText(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// rootfs returns a container's file system as a tar: the static peer, at the path that it has
// outside, so that commands are the same everywhere.
func rootfs(t *testing.T) []byte {
	t.Helper()
	f, err := os.Open(peerBin())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	name := strings.TrimPrefix(peerBin(), "/")
	for i, c := range name {
		if c == '/' {
			err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name[:i+1], Mode: 0o755}))
		}
	}
	err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: fi.Size()}))
	_, copied := io.Copy(w, f)
	if err := errors.Join(err, copied, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// gatedPolicy lets a network's pods reach each other's HTTP, and lets no client in until `sluice
// policy set` names some.
func gatedPolicy(from ...string) map[string]any {
	var in, out []any
	for _, cidr := range from {
		in = append(in, map[string]any{"cidr": cidr})
	}
	for _, cidr := range dual {
		out = append(out, map[string]any{"cidr": cidr})
	}
	spec := map[string]any{"defaultAction": "drop", "egress": []any{map[string]any{
		"name": "pods", "action": "allow", "to": out, "ports": []any{map[string]any{"protocol": "TCP", "port": portHTTP}},
	}}, "ingress": []any{}}
	if in != nil {
		ports := []any{map[string]any{"protocol": "UDP", "port": portWhoami}}
		for _, port := range []int{portHTTP, portEcho, portXfer} {
			ports = append(ports, map[string]any{"protocol": "TCP", "port": port})
		}
		spec["ingress"] = []any{map[string]any{"name": "friends", "action": "allow", "from": in, "ports": ports}}
	}
	return map[string]any{"apiVersion": "sluice.dev/v1alpha1", "kind": "SandboxPolicy", "metadata": map[string]any{"name": "gate"}, "spec": spec}
}

// policyByName lets HTTP out to one name.
func policyByName(domain string) map[string]any {
	return map[string]any{
		"apiVersion": "sluice.dev/v1alpha1", "kind": "SandboxPolicy", "metadata": map[string]any{"name": "names"},
		"spec": map[string]any{"defaultAction": "reject", "egress": []any{map[string]any{
			"name": "web", "action": "allow", "to": []any{map[string]any{"domain": domain}},
			"ports": []any{map[string]any{"protocol": "TCP", "port": portHTTP}},
		}}},
	}
}

// setPolicy lets friends, by their addresses, in to an attachment.
func (n *node) setPolicy(t *testing.T, attachment string, friends ...string) {
	t.Helper()
	var cidrs []string
	for _, a := range friends {
		cidrs = append(cidrs, a+map[bool]string{false: "/32", true: "/128"}[strings.Contains(a, ":")])
	}
	n.sluice(t, "policy", "set", attachment, write(t, "policy.json", jsonText(t, gatedPolicy(cidrs...))))
}

// attachments returns those that `sluice ps` lists for one container.
func (n *node) attachments(t *testing.T, container string) (own []attachment) {
	t.Helper()
	var all []attachment
	n.sluiceJSON(t, &all, "ps", "-o", "json")
	return slices.DeleteFunc(all, func(a attachment) bool { return !strings.HasPrefix(a.Name, container[:12]+"-") })
}

// theAttachment returns the attachment of a container with one network.
func (n *node) theAttachment(t *testing.T, container string) attachment {
	t.Helper()
	own := n.attachments(t, container)
	if len(own) != 1 || own[0].State != "running" {
		t.Fatalf("`sluice ps` lists for the container %s: %+v", container, own)
	}
	return own[0]
}

// wantFlow checks that among an attachment's flows, ended and refused ones included, the line of
// one has all of the words.
func (n *node) wantFlow(t *testing.T, attachment string, words ...string) {
	t.Helper()
	testutil.Within(t, 2*time.Second, func() (bool, string) {
		var all string
		for _, args := range [][]string{{"flows", attachment}, {"flows", "--ended", attachment}} {
			all += n.sluice(t, args...).out
		}
		for line := range strings.Lines(all) {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				return true, ""
			}
		}
		return false, fmt.Sprintf("no flow with %q\n%s", words, all)
	})
}
