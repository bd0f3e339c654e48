package e2e

// Real programs under a policy by name.

import (
	"archive/zip"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// An index as pip reads it, with files on another host, and a repository over its protocols.
func TestGateClients(t *testing.T) {
	area(t, "gate.clients", "curl", "nginx", "git")
	w := newWorld(t)
	w.zone(t, gateZone...)
	dir, www := packageIndex(t, w.far)
	os.WriteFile(filepath.Join(www, "simple/demo/index.html"), []byte(`<a href="https://a.files.test:8443/packages/demo-1.0.tar.gz">demo-1.0.tar.gz</a>`), 0o644)
	os.WriteFile(filepath.Join(www, "packages/demo-1.0.tar.gz"), []byte("a package\n"), 0o644)
	work, repo := t.TempDir(), filepath.Join(www, "repo.git")
	ok(t, w.far, 20*time.Second, "sh", "-ec", fmt.Sprintf(`
cd %s
git init -q -b main
echo data >data
git add data
git -c user.name=t -c user.email=t@t.test commit -q -m one
git clone -q --bare . %s
git -C %[2]s update-server-info`, work, repo))
	daemon := w.far.start(t, "git", "daemon", "--export-all", "--reuseaddr", "--base-path="+www, "--verbose")
	daemon.waitStream(t, &daemon.err, 5*time.Second, "ready git daemon", func(s string) bool { return strings.Contains(s, "Ready to rumble") })
	log := filepath.Join(t.TempDir(), "flows")
	spec := strings.Replace(gateSpec, "ports: [{protocol: TCP, port: 8080}]", "ports: [{protocol: TCP, port: 8080}, {protocol: TCP, port: 8443}]", 1)
	sb := w.host.sandbox(t, "--policy", policyFile(t, spec), "--flow-log", log)
	t.Run("an index and its files", func(t *testing.T) {
		ok(t, sb, 20*time.Second, "sh", "-ec", `
link=$(curl -sSkL https://pypi.test:8443/simple/demo/ | sed 's/.*href="\([^"]*\)".*/\1/')
curl -sSkL "$link"`).wantOut(t, "a package")
	})
	for _, u := range []string{"http://git.test:8080/repo.git", "https://git.test:8443/repo.git", "git://git.test/repo.git"} {
		t.Run("git clone "+u, func(t *testing.T) {
			ok(t, sb, 30*time.Second, "sh", "-ec", `d=$(mktemp -d); git -c http.sslCAInfo="$1" clone -q "$0" "$d/r"; cat "$d/r/data"; rm -r "$d"`, u, filepath.Join(dir, "cert.pem")).wantOut(t, "data")
		})
	}
	t.Run("what they do not need stays closed", func(t *testing.T) {
		if r := run(t, sb, 10*time.Second, "git", "ls-remote", "git://"+other4+"/repo.git"); r.status == 0 {
			t.Errorf("an address that nobody granted answers\n%s", r)
		}
		if r := run(t, sb, 10*time.Second, "git", "ls-remote", "git://evil.test/repo.git"); r.status == 0 {
			t.Errorf("a name that no rule has answers\n%s", r)
		}
	})
}

const pip = "/usr/bin/pip3" // Debian's own, whatever else is on PATH

// wheel builds a package of one module.
func wheel(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z := zip.NewWriter(f)
	for _, file := range []struct{ name, text string }{
		{"demo.py", "print('hello from a package')\n"},
		{"demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n"},
		{"demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"},
		{"demo-1.0.dist-info/RECORD", "demo.py,,\ndemo-1.0.dist-info/METADATA,,\ndemo-1.0.dist-info/WHEEL,,\ndemo-1.0.dist-info/RECORD,,\n"},
	} {
		w, err := z.Create(file.name)
		if err == nil {
			_, err = w.Write([]byte(file.text))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
}

// packageIndex serves the folders of a package index, with nginx in dir.
func packageIndex(t *testing.T, in place) (dir, www string) {
	t.Helper()
	dir = nginx(t, in, 8080, true)
	www = filepath.Join(dir, "www")
	for _, d := range []string{"simple/demo", "packages"} {
		if err := os.MkdirAll(filepath.Join(www, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir, www
}

func TestGatePip(t *testing.T) {
	area(t, "gate.pip", "nginx", pip)
	w := newWorld(t)
	w.zone(t, gateZone...)
	dir, www := packageIndex(t, w.far)
	const file = "demo-1.0-py3-none-any.whl"
	wheel(t, filepath.Join(www, "packages", file))
	page := fmt.Sprintf(`<!DOCTYPE html><html><body><a href="https://a.files.test:8443/packages/%[1]s">%[1]s</a></body></html>`, file)
	if err := os.WriteFile(filepath.Join(www, "simple/demo/index.html"), []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
	sb := w.host.sandbox(t, "--policy", policyFile(t, gateSpec))
	install := func(index string, flags ...string) result {
		t.Helper()
		argv := append([]string{pip, "--isolated", "--disable-pip-version-check", "--no-cache-dir", "install", "--no-deps", "--retries", "0", "--timeout", "5",
			"--target", filepath.Join(t.TempDir(), "lib"), "--cert", filepath.Join(dir, "cert.pem"), "--index-url", index}, flags...)
		return run(t, sb, 60*time.Second, append(argv, "demo")...)
	}
	r := install("https://pypi.test:8443/simple")
	r.wantStatus(t, 0).wantOut(t, "Successfully installed demo-1.0")
	for _, row := range []struct {
		what, index string
		rule        string // empty where there is no flow to refuse
	}{
		{"a name that no rule has", "https://evil.test:8443/simple", ""},
		{"the bare address", "https://" + at(far4, 8443) + "/simple", "egress[0] index"},
		{"the bare IPv6 address", "https://" + at(far6, 8443) + "/simple", "egress[0] index"},
		{"another address of the server", "https://" + at(other4, 8443) + "/simple", "default"},
	} {
		t.Run(row.what, func(t *testing.T) {
			before := sb.refusals(t)
			r := install(row.index, "--trusted-host", strings.TrimSuffix(strings.TrimPrefix(row.index, "https://"), "/simple"))
			if r.status == 0 {
				t.Errorf("it is installed from there\n%s", r)
			}
			testutil.Within(t, 10*time.Second, func() (bool, string) {
				after := sb.refusals(t)
				return row.rule == "" || after[row.rule] > before[row.rule], fmt.Sprintf("no refusal by %q: %v, before %v\n%s", row.rule, after, before, r)
			})
		})
	}
}
