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

// The sockets with a path that a sandbox's command must not reach through the files it shares with
// the caller, because they are a way around the network. A network namespace confines abstract
// sockets only.
//
// Sluice's registries, of every user, and the daemons that the C library asks for names are always
// covered. Under a policy so are all sockets that can be found: those that the kernel lists for
// this network namespace, those that the environment names, those in /tmp, and those in directories
// that hold only runtime state.

// ResolverDirs and ResolverSockets belong to daemons that resolve names: nscd, nslcd, avahi, sssd,
// winbind and systemd-resolved. (The directory of systemd-resolved also holds resolv.conf.)
var (
	ResolverDirs = []string{
		"/run/nscd", "/var/run/nscd", "/run/nslcd", "/run/avahi-daemon", "/var/lib/sss/pipes",
		"/run/samba/winbindd", "/var/lib/samba/winbindd_privileged",
	}
	ResolverSockets = []string{"/run/systemd/resolve/io.systemd.Resolve", "/run/systemd/resolve/io.systemd.Resolve.Monitor"}
)

// RuntimeDirs returns the directories of runtime state: sockets, locks, process IDs.
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

// maxListed bounds how many lines of the kernel's list are read.
const maxListed = 100_000

// ListedSockets returns the paths of the sockets that the kernel lists: bound unix(7) sockets, of
// all types.
func ListedSockets(list string) (paths []string, err error) {
	f, err := os.Open(list)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for n := 0; sc.Scan() && n < maxListed; n++ {
		// Num RefCount Protocol Flags Type St Inode Path, where Path is not escaped.
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

// maxScanned bounds how many entries of a directory are examined.
const maxScanned = 10_000

// SocketsIn finds sockets in a directory and depth levels below it, including sockets of network
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

// SocketsNamed finds sockets that environment variables name, such as SSH_AUTH_SOCK=/tmp/x/agent.1,
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
