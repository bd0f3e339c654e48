package sandbox

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// What of the host's the command of a sandbox must not reach by the files it shares with
// the caller, because it is a way around the network: sockets with a path. A network
// namespace confines abstract sockets, and no others.
//
// Always covered are the registries of Sluice, whoever's, and the daemons that the C
// library asks for names. Under a policy all sockets are that can be found: those that the
// kernel lists for this network namespace, those that the environment names, those in
// /tmp, and whatever is in the directories that hold nothing but what runs.

// resolverDirs and resolverSockets answer for names: nscd, nslcd, avahi, sssd, winbind and
// systemd-resolved. (systemd-resolved's directory has resolv.conf in it, too.)
var (
	resolverDirs = []string{
		"/run/nscd", "/var/run/nscd", "/run/nslcd", "/run/avahi-daemon", "/var/lib/sss/pipes",
		"/run/samba/winbindd", "/var/lib/samba/winbindd_privileged",
	}
	resolverSockets = []string{"/run/systemd/resolve/io.systemd.Resolve", "/run/systemd/resolve/io.systemd.Resolve.Monitor"}
)

// runtimeDirs hold what runs: sockets, locks, process numbers.
func runtimeDirs() []string {
	dirs := []string{"/run", "/tmp/.X11-unix", "/tmp/.ICE-unix", fmt.Sprintf("/tmp/tmux-%d", os.Geteuid())}
	if fi, err := os.Lstat("/var/run"); err == nil && fi.IsDir() {
		dirs = append(dirs, "/var/run")
	}
	if xdg := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(xdg) && !strings.HasPrefix(xdg, "/run/") {
		if fi, err := os.Stat(xdg); err == nil && fi.IsDir() && ownerOf(fi) == os.Geteuid() {
			dirs = append(dirs, xdg)
		}
	}
	return dirs
}

// cover plans what the guest covers.
func (m *monitor) cover(r *Registry) error {
	g := &m.cfg.Guest
	g.HideDirs = append(g.HideDirs, r.registriesToHide()...)
	for _, path := range m.cfg.ReadOnly {
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() {
			g.ReadOnly = append(g.ReadOnly, path)
		}
	}
	if m.cfg.HostSockets {
		return nil
	}
	for _, path := range m.cfg.AllowSockets {
		real, err := filepath.EvalSymlinks(path)
		if err == nil {
			real, err = filepath.Abs(real)
		}
		if err != nil {
			return fmt.Errorf("leave the socket %s in reach: %w", path, err)
		}
		g.AllowSockets = append(g.AllowSockets, real)
	}
	for _, dir := range resolverDirs {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() && !slices.Contains(g.AllowSockets, dir) {
			g.HideDirs = append(g.HideDirs, dir)
		}
	}
	g.HideSockets = append(g.HideSockets, resolverSockets...)
	if !m.cfg.UnderPolicy {
		return nil
	}
	g.WithoutSockets = append(g.WithoutSockets, runtimeDirs()...)
	listed, err := listedSockets("/proc/thread-self/net/unix")
	if err != nil {
		return fmt.Errorf("find the host's sockets: %w", err)
	}
	for _, path := range slices.Concat(listed, socketsIn("/tmp", 2), socketsNamed(os.Environ())) {
		hidden := slices.ContainsFunc(g.HideDirs, func(dir string) bool { return strings.HasPrefix(path, dir+"/") })
		if !hidden && !slices.Contains(g.HideSockets, path) {
			g.HideSockets = append(g.HideSockets, path)
		}
	}
	return nil
}

// maxListed bounds what is read of the kernel's list, in lines.
const maxListed = 100_000

// listedSockets are the paths of the sockets that the kernel lists: unix(7) ones that are
// bound, of all types.
func listedSockets(list string) (paths []string, err error) {
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

// socketsIn finds sockets in a directory and depth levels below it, also of network
// namespaces that the kernel does not list here.
func socketsIn(dir string, depth int) (paths []string) {
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
			paths = append(paths, socketsIn(path, depth-1)...)
		}
	}
	return paths
}

// socketsNamed finds sockets that variables name, such as SSH_AUTH_SOCK=/tmp/x/agent.1,
// DOCKER_HOST=unix:///home/u/docker.sock and DBUS_SESSION_BUS_ADDRESS=unix:path=/x,guid=1.
func socketsNamed(env []string) (paths []string) {
	for _, kv := range env {
		for _, word := range strings.FieldsFunc(kv, func(r rune) bool { return strings.ContainsRune("=:;,", r) }) {
			if path := filepath.Clean(word); strings.HasPrefix(path, "/") && isSocket(path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// filesOfRoot is what it means that root's sandbox has root's files: it maps every id to
// itself. A range of other ids would keep it from writing to the directory that it was
// started for.
const filesOfRoot = "started by root, uid 0 inside owns all files of root's and can change the host by them: start it as another user where that matters"

// covered says in a line what is between the command and the host beside the network, or
// nothing where nobody has to know.
func (m *monitor) covered() string {
	root := os.Geteuid() == 0
	switch {
	case m.cfg.Quiet:
		return ""
	case !m.cfg.UnderPolicy && root:
		return filesOfRoot
	case !m.cfg.UnderPolicy:
		return ""
	}
	var b strings.Builder
	b.WriteString("the network of the command is confined, its files are the caller's; out of its reach: other sandboxes, ")
	if m.cfg.HostSockets {
		b.WriteString("but not the host's sockets")
	} else {
		fmt.Fprintf(&b, "%d sockets of the host (--allow-socket, --host-sockets)", m.guest.Covered())
	}
	b.WriteString(", the caller's terminal, AF_VSOCK, IPC")
	if len(m.cfg.Guest.ReadOnly) > 0 {
		fmt.Fprintf(&b, "; read-only: %s", strings.Join(m.cfg.Guest.ReadOnly, ", "))
	}
	if root {
		b.WriteString("; " + filesOfRoot)
	}
	return b.String()
}
