package sandbox

// The parts of the host that a sandbox covers, and how they are reported.

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sluice.dev/sluice/sandbox/internal/host"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// cover plans the paths that the guest covers.
func (m *run) cover(r *registry.Registry) error {
	g := &m.cfg.Guest
	g.HideDirs = append(g.HideDirs, r.RegistriesToHide()...)
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
	for _, dir := range host.ResolverDirs {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() && !slices.Contains(g.AllowSockets, dir) {
			g.HideDirs = append(g.HideDirs, dir)
		}
	}
	g.HideSockets = append(g.HideSockets, host.ResolverSockets...)
	if !m.cfg.UnderPolicy {
		return nil
	}
	g.WithoutSockets = append(g.WithoutSockets, host.RuntimeDirs()...)
	listed, err := host.ListedSockets("/proc/thread-self/net/unix")
	if err != nil {
		return fmt.Errorf("find the host's sockets: %w", err)
	}
	for _, path := range slices.Concat(listed, host.SocketsIn("/tmp", 2), host.SocketsNamed(os.Environ())) {
		hidden := slices.ContainsFunc(g.HideDirs, func(dir string) bool { return strings.HasPrefix(path, dir+"/") })
		if !hidden && !slices.Contains(g.HideSockets, path) {
			g.HideSockets = append(g.HideSockets, path)
		}
	}
	return nil
}

// filesOfRoot explains that root's sandbox has access to root's files, because it maps every id to
// itself. Mapping other ids would keep it from writing to the directory that it was started for.
const filesOfRoot = "started by root, uid 0 inside owns all files of root's and can change the host by them: start it as another user where that matters"

// covered returns a line about the barriers between the command and the host besides the network,
// or the empty string if there is nothing to say.
func (m *run) covered() string {
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
