package host

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/registry"
)

// What of the host's the command of a sandbox must not reach by the files it shares with
// the caller, because it is a way around the network: sockets with a path. A network
// namespace confines abstract sockets, and no others.
//
// Always covered are the registries of Sluice, whoever's, and the daemons that the C
// library asks for names. Under a policy all sockets are that can be found: those that the
// kernel lists for this network namespace, those that the environment names, those in
// /tmp, and whatever is in the directories that hold nothing but what runs.

// ResolverDirs and ResolverSockets answer for names: nscd, nslcd, avahi, sssd, winbind and
// systemd-resolved. (systemd-resolved's directory has resolv.conf in it, too.)
var (
	ResolverDirs = []string{
		"/run/nscd", "/var/run/nscd", "/run/nslcd", "/run/avahi-daemon", "/var/lib/sss/pipes",
		"/run/samba/winbindd", "/var/lib/samba/winbindd_privileged",
	}
	ResolverSockets = []string{"/run/systemd/resolve/io.systemd.Resolve", "/run/systemd/resolve/io.systemd.Resolve.Monitor"}
)

// RuntimeDirs hold what runs: sockets, locks, process numbers.
func RuntimeDirs() []string {
	dirs := []string{"/run", "/tmp/.X11-unix", "/tmp/.ICE-unix", fmt.Sprintf("/tmp/tmux-%d", os.Geteuid())}
	if fi, err := os.Lstat("/var/run"); err == nil && fi.IsDir() {
		dirs = append(dirs, "/var/run")
	}
	if xdg := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(xdg) && !strings.HasPrefix(xdg, "/run/") {
		if fi, err := os.Stat(xdg); err == nil && fi.IsDir() && registry.OwnerOf(fi) == os.Geteuid() {
			dirs = append(dirs, xdg)
		}
	}
	return dirs
}

// maxListed bounds what is read of the kernel's list, in lines.
const maxListed = 100_000

// ListedSockets are the paths of the sockets that the kernel lists: unix(7) ones that are
// bound, of all types.
func ListedSockets(list string) (paths []string, err error) {
	f, err := os.Open(list)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for n := 0; sc.Scan() && n < maxListed; n++ {
		// Num RefCount Protocol Flags Type St Inode Path, the latter as it is.
		i := strings.Index(sc.Text(), " /")
		if i < 0 || len(strings.Fields(sc.Text()[:i])) != 7 {
			continue
		}
		if path := sc.Text()[i+1:]; isSocket(path) {
			paths = append(paths, path)
		}
	}
	return paths, sc.Err()
}

func isSocket(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && fi.Mode()&fs.ModeSocket != 0 && unix.Access(path, unix.W_OK) == nil
}

// maxScanned bounds how many entries of a directory are looked at.
const maxScanned = 10_000

// SocketsIn finds sockets in a directory and depth levels below it, also of network
// namespaces that the kernel does not list here.
func SocketsIn(dir string, depth int) (paths []string) {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	entries, _ := f.ReadDir(maxScanned)
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch {
		case e.Type()&fs.ModeSocket != 0 && isSocket(path):
			paths = append(paths, path)
		case e.IsDir() && depth > 0:
			paths = append(paths, SocketsIn(path, depth-1)...)
		}
	}
	return paths
}

// SocketsNamed finds sockets that variables name, such as SSH_AUTH_SOCK=/tmp/x/agent.1,
// DOCKER_HOST=unix:///home/u/docker.sock and DBUS_SESSION_BUS_ADDRESS=unix:path=/x,guid=1.
func SocketsNamed(env []string) (paths []string) {
	for _, kv := range env {
		for _, word := range strings.FieldsFunc(kv, func(r rune) bool { return strings.ContainsRune("=:;,", r) }) {
			if path := filepath.Clean(word); strings.HasPrefix(path, "/") && isSocket(path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}
