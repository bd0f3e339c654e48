package e2e

// The examples that people copy, run with real clients.

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"sluice.dev/sluice/examples"
)

func example(t *testing.T, name string) string {
	t.Helper()
	b, err := examples.Files.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestExamplePolicies(t *testing.T) {
	area(t, "examples", "curl", "nginx")
	w := newWorld(t)
	var records []string
	for _, name := range []string{"api.anthropic.com", "pypi.org", "registry.npmjs.org", "github.com", "gist.github.com", "deb.debian.org", "api.payments.example"} {
		records = append(records, fmt.Sprintf("%s. %[1]s. 3600 A %s", name, far4), fmt.Sprintf("%s. %[1]s. 3600 AAAA %s", name, far6))
	}
	w.zone(t, records...)
	dir := t.TempDir()
	certificate(t, dir, "", webNames...)
	nginxIn(t, w.far, dir, 80, fmt.Sprintf("listen 443 ssl; listen [::]:443 ssl; ssl_certificate %s/cert.pem; ssl_certificate_key %[1]s/key.pem;", dir))
	if err := os.Mkdir(filepath.Join(dir, "www", "debian"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "www", "debian", "InRelease"), []byte("hello from apt\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		file            string
		answered, isNot []string
	}{
		{"coding-agent.yaml",
			[]string{"https://api.anthropic.com/", "https://pypi.org/", "https://github.com/"},
			[]string{"https://gist.github.com/", "http://pypi.org/", "https://" + far4 + "/"}},
		{"ci.yaml",
			[]string{"https://pypi.org/", "https://registry.npmjs.org/", "https://github.com/", "http://deb.debian.org/debian/InRelease"},
			[]string{"http://deb.debian.org/", "https://deb.debian.org/", "https://gist.github.com/"}},
		{"web-app.yaml",
			[]string{"https://api.payments.example/"},
			[]string{"https://pypi.org/", "http://api.payments.example/"}},
	} {
		t.Run(row.file, func(t *testing.T) {
			sb := w.host.sandbox(t, "--policy", write(t, row.file, example(t, row.file)))
			for _, u := range row.answered {
				ok(t, sb, 15*time.Second, "curl", "-gsSfk", "-m", "10", u).wantOut(t, "hello from")
			}
			for _, u := range row.isNot {
				if r := run(t, sb, 15*time.Second, "curl", "-gsSfk", "-m", "10", u); r.status == 0 || strings.Contains(r.out, "hello from") {
					t.Errorf("%s is answered\n%s", u, r)
				}
			}
		})
	}
}

func TestCNIExamples(t *testing.T) {
	cniArea(t, "cni.examples")
	t.Run("podman", func(t *testing.T) {
		n, lists := newRuntimeNode(t)
		t.Cleanup(func() { n.ip(t, "link del demo0") }) // bridges outlive their containers
		list := filepath.Join(lists, "demo.conflist")
		if err := os.WriteFile(list, []byte(example(t, "podman/demo.conflist")), 0o644); err != nil {
			t.Fatal(err)
		}
		containers := write(t, "containers.yaml", example(t, "podman/containers.yaml"))
		keys := strings.ReplaceAll(example(t, "podman/keys.json"), "/etc/sluice/containers.yaml", containers)
		ok(t, n, 10*time.Second, filepath.Join(n.bin, "sluice-cni"), "install", "--conflist", list,
			"--config", write(t, "keys.json", keys), "--bin-dir", filepath.Join(n.dir, "bin"))
		installed, err := libcni.ConfListFromFile(list)
		if err != nil {
			t.Fatal(err)
		}
		// As podman does for --ip. podman itself is in TestCNIPodman, and in make demo-cni with
		// these files.
		alice := n.add(t, installed, map[string]any{"ips": []string{"10.5.0.10/24"}})
		bob := n.add(t, installed, map[string]any{"ips": []string{"10.5.0.11/24"}})
		serve(t, alice)
		serve(t, bob)
		if d, r := dial(t, alice, "-timeout", "5s", "-send", "GET / HTTP/1.0\r\n\r\n", at("10.5.0.11", portHTTP)); d.Error != "" || d.Got == "" {
			t.Errorf("alice is not answered\n%s", r)
		}
		if d, r := dial(t, bob, "-timeout", "5s", at("10.5.0.10", portHTTP)); d.Error != "ECONNREFUSED" {
			t.Errorf("bob reaches alice\n%s", r)
		}
	})
	t.Run("cni", func(t *testing.T) {
		n, _ := newRuntimeNode(t)
		t.Cleanup(func() { n.ip(t, "link del gated0") })
		list, err := libcni.NetworkConfFromBytes([]byte(example(t, "cni/10-gated.conflist")))
		if err != nil {
			t.Fatal(err)
		}
		p := n.add(t, list)
		if !slices.ContainsFunc(p.addrs(), func(a string) bool { return strings.HasPrefix(a, "10.5.") }) {
			t.Errorf("the pod has %v, not an address of the example's range", p.addrs())
		}
		if err := p.check(); err != nil {
			t.Errorf("CHECK: %v", err)
		}
		n.far.start(t, peerBin(), "serve", "-base", "443", far4).waitText(t, "listening", 5*time.Second)
		if d, r := dial(t, p, "-timeout", "5s", "-send", "x", at(far4, 443)); d.Error != "" || d.Got != "x" {
			t.Errorf("port 443 is not open\n%s", r)
		}
		if d, r := dial(t, p, "-timeout", "5s", at(far4, 444)); d.Error != "ECONNREFUSED" {
			t.Errorf("port 444 is open\n%s", r)
		}
	})
}
