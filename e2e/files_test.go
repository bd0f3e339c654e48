package e2e

// ssh, rsync and git, against servers in the far namespace.

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sshServer starts sshd in the far namespace and returns the client's command line up to the host.
func sshServer(t *testing.T, w *world) (ssh []string) {
	t.Helper()
	dir := t.TempDir()
	hostKey, clientKey := filepath.Join(dir, "host"), filepath.Join(dir, "id")
	for _, key := range []string{hostKey, clientKey} {
		ok(t, w.far, 10*time.Second, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	}
	public, err := os.ReadFile(clientKey + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(dir, "authorized"), public, 0o600)
	conf := filepath.Join(dir, "sshd_config")
	os.WriteFile(conf, fmt.Appendf(nil, `
Port 2222
ListenAddress 0.0.0.0
ListenAddress ::
HostKey %[1]s/host
AuthorizedKeysFile %[1]s/authorized
PidFile %[1]s/pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
`, dir), 0o600)
	p := w.far.start(t, "/usr/sbin/sshd", "-D", "-e", "-f", conf)
	p.waitStream(t, &p.err, 5*time.Second, "listening sshd", func(s string) bool { return strings.Count(s, "Server listening") >= 2 })
	return []string{"ssh", "-F", "none", "-p", "2222", "-i", clientKey, "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no",
		"-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"}
}

func randomFile(t *testing.T, path string, size int) [32]byte {
	t.Helper()
	b := make([]byte, size)
	rand.Read(b)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

func sumOf(path string) [32]byte {
	b, _ := os.ReadFile(path)
	return sha256.Sum256(b)
}

func TestSSHAndRsync(t *testing.T) {
	area(t, "ssh", "ssh", "sshd", "rsync")
	w := newWorld(t)
	ssh := sshServer(t, w)
	sb := w.host.sandbox(t)
	user := "root"
	if !privileged {
		user = "tester"
	}
	dir := t.TempDir()
	for _, f := range families {
		t.Run(f.name+" ssh runs a command and gives its status", func(t *testing.T) {
			run(t, sb, 20*time.Second, append(ssh, user+"@"+f.far, "echo there; exit 5")...).wantStatus(t, 5).wantOut(t, "there")
		})
		t.Run(f.name+" rsync over ssh, up and back down", func(t *testing.T) {
			a, b, c := filepath.Join(dir, f.name+"a"), filepath.Join(dir, f.name+"b"), filepath.Join(dir, f.name+"c")
			sum := randomFile(t, a, 16<<20)
			remote := user + "@" + f.far
			if f.name == "IPv6" {
				remote = user + "@[" + f.far + "]"
			}
			ok(t, sb, 30*time.Second, "rsync", "-e", strings.Join(ssh, " "), a, remote+":"+b)
			ok(t, sb, 30*time.Second, "rsync", "-e", strings.Join(ssh, " "), remote+":"+b, c)
			if sumOf(b) != sum || sumOf(c) != sum {
				t.Errorf("the copies differ")
			}
		})
	}
}

func TestGitClones(t *testing.T) {
	area(t, "git", "git", "nginx", "ssh", "sshd")
	w := newWorld(t)
	ssh := sshServer(t, w)
	web := nginx(t, w.far, 8080, false)
	repo := filepath.Join(web, "www", "repo.git")
	work := t.TempDir()
	sum := randomFile(t, filepath.Join(work, "data"), 4<<20)
	ok(t, w.far, 30*time.Second, "sh", "-ec", fmt.Sprintf(`
cd %s
git init -q -b main
git -c user.name=t -c user.email=t@t.test add data
git -c user.name=t -c user.email=t@t.test commit -q -m one
git clone -q --bare . %s
git -C %[2]s update-server-info`, work, repo))
	daemon := w.far.start(t, "git", "daemon", "--export-all", "--reuseaddr", "--base-path="+filepath.Join(web, "www"), "--verbose")
	daemon.waitStream(t, &daemon.err, 5*time.Second, "ready git daemon", func(s string) bool { return strings.Contains(s, "Ready to rumble") })
	sb := w.host.sandbox(t)
	user := "root"
	if !privileged {
		user = "tester"
	}
	for _, row := range []struct{ what, url string }{
		{"over http", url(far4, 8080, "/repo.git")},
		{"over http and IPv6", url(far6, 8080, "/repo.git")},
		{"over git's own protocol", "git://" + far4 + "/repo.git"},
		{"over ssh", "ssh://" + user + "@" + at(far4, 2222) + repo},
	} {
		t.Run(row.what, func(t *testing.T) {
			into := filepath.Join(t.TempDir(), "clone")
			ok(t, sb, 30*time.Second, "env", "GIT_SSH_COMMAND="+strings.Join(ssh, " "), "git", "clone", "-q", row.url, into)
			if sumOf(filepath.Join(into, "data")) != sum {
				t.Errorf("the clone's file differs")
			}
		})
	}
}
