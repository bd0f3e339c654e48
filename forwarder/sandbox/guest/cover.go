package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// What CMD must not reach in a file system that it shares with the caller: sockets of the
// host's daemons, and what is Sluice's own. All of it is done by the outer stage.
//
// A mount on a path goes with the path: a daemon that starts again unlinks its socket, or
// the directory it is in, and the kernel drops the mount on it. So the directories that
// hold nothing but what runs, such as /run, are seen as a copy: a tmpfs with everything in
// it that is not a socket, each entry the host's own by a bind mount, directories with
// sockets in them copied the same way. What the host puts there later is not seen.

const (
	// maxCopied bounds the entries of such directories that are looked at; the rest is
	// left out.
	maxCopied = 100_000
	// maxDepth bounds how deep they are.
	maxDepth = 32
)

// coverer covers for one sandbox.
type coverer struct {
	allowed []string // paths left in reach, with what is below
	left    int      // entries that may still be looked at
	sockets int      // how many were left out or covered
}

// cover makes the mounts that CMD cannot undo, and returns how many sockets are behind
// them.
func (s *stage) cover() (int, error) {
	cfg := &s.spec.Config
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, fmt.Errorf("making the mounts private: %w", explainInside(err))
	}
	c := &coverer{allowed: cfg.AllowSockets, left: maxCopied}
	for _, dir := range cfg.WithoutSockets {
		if err := c.replace(dir); err != nil {
			return 0, fmt.Errorf("covering the host's sockets in %s: %w", dir, err)
		}
	}
	for _, path := range cfg.HideSockets {
		if err := c.hideFile(path); err != nil {
			return 0, fmt.Errorf("covering the socket %s: %w", path, err)
		}
	}
	for _, dir := range cfg.HideDirs {
		if err := hide(dir); err != nil {
			return 0, fmt.Errorf("hiding %s: %w", dir, err)
		}
	}
	for _, path := range cfg.ReadOnly {
		if err := readOnly(path); err != nil {
			return 0, fmt.Errorf("making %s read-only: %w", path, err)
		}
	}
	return c.sockets, nil
}

func hide(dir string) error {
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err := unix.Mount("tmpfs", dir, "tmpfs", flags, "mode=0555,size=4k,nr_inodes=2")
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// hideFile puts an empty file over a socket.
func (c *coverer) hideFile(path string) error {
	path, err := filepath.EvalSymlinks(path)
	var fi fs.FileInfo
	if err == nil {
		fi, err = os.Lstat(path)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil // also CMD's
	}
	if err != nil || fi.Mode()&fs.ModeSocket == 0 || c.isAllowed(path) {
		return err
	}
	c.sockets++
	return attachTree(path, func() (int, error) {
		name := filepath.Join(staging, "covered")
		if err := os.WriteFile(name, nil, 0); err != nil {
			return -1, err
		}
		return unix.OpenTree(unix.AT_FDCWD, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	})
}

// readOnly keeps CMD from changing a file by its path.
func readOnly(path string) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return err
	}
	return unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// attachTree mounts on path what build makes in a scratch mount namespace.
func attachTree(path string, build func() (int, error)) error {
	tree, err := inScratch(build)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// replace covers a directory by a copy of it without the sockets.
func (c *coverer) replace(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return err
	}
	return attachTree(dir, func() (int, error) {
		top := filepath.Join(staging, "copy")
		if err := c.copy(dir, top, st.Dev, maxDepth); err != nil {
			return -1, err
		}
		return unix.OpenTree(unix.AT_FDCWD, top, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	})
}

// copy makes the directory to with what is in from. What cannot be brought there is left
// out.
func (c *coverer) copy(from, to string, dev uint64, depth int) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	_ = os.Lchown(to, int(st.Uid), int(st.Gid)) // an id that is not mapped stays ours
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return nil // CMD cannot read it either
	}
	for _, e := range entries {
		if c.left--; c.left < 0 {
			return nil
		}
		src, dst := filepath.Join(from, e.Name()), filepath.Join(to, e.Name())
		switch mode := e.Type(); {
		case c.isAllowed(src):
			bind(src, dst, mode.IsDir())
		case mode&fs.ModeSocket != 0:
			c.sockets++
		case mode&fs.ModeSymlink != 0:
			if target, err := os.Readlink(src); err == nil {
				_ = os.Symlink(target, dst)
			}
		case mode.IsDir():
			switch c.look(src, dev, depth) {
			case holdsSockets:
				_ = c.copy(src, dst, deviceOf(src), depth-1)
			case holdsNone:
				bind(src, dst, true)
			}
		default:
			bind(src, dst, false)
		}
	}
	return nil
}

// bind shows src at dst, or leaves it out.
func bind(src, dst string, dir bool) {
	var err error
	if dir {
		err = os.Mkdir(dst, 0o755)
	} else {
		err = os.WriteFile(dst, nil, 0o644)
	}
	if err == nil && unix.Mount(src, dst, "", unix.MS_BIND|unix.MS_REC, "") != nil {
		_ = os.Remove(dst)
	}
}

// finding is what a directory holds.
type finding int

const (
	unknown finding = iota // left out
	holdsNone
	holdsSockets
)

// look finds out whether there is a socket in a directory, or something allowed, for which
// it is copied too. Another file system below is only looked into if it is a tmpfs: any
// other holds files that somebody mounted there. Overlays are the roots of containers.
func (c *coverer) look(dir string, dev uint64, depth int) finding {
	if depth <= 0 {
		return unknown
	}
	if own := deviceOf(dir); own != dev {
		var st unix.Statfs_t
		switch err := unix.Statfs(dir, &st); {
		case err != nil || st.Type == unix.OVERLAYFS_SUPER_MAGIC:
			return unknown
		case st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC:
			return holdsNone
		}
		dev = own
	}
	for _, path := range c.allowed {
		if strings.HasPrefix(path, dir+"/") {
			return holdsSockets
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return holdsNone // in none that CMD could reach
	}
	for _, e := range entries {
		if c.left--; c.left < 0 {
			return unknown
		}
		if e.Type()&fs.ModeSocket != 0 {
			return holdsSockets
		}
		if e.IsDir() {
			if f := c.look(filepath.Join(dir, e.Name()), dev, depth-1); f != holdsNone {
				return holdsSockets // something to leave out
			}
		}
	}
	return holdsNone
}

func deviceOf(path string) uint64 {
	fi, err := os.Lstat(path)
	if err != nil {
		return 0
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Dev
	}
	return 0
}

// isAllowed reports whether a path was asked to be left in reach, or is below one.
func (c *coverer) isAllowed(path string) bool {
	for _, a := range c.allowed {
		if path == a || strings.HasPrefix(path, a+"/") {
			return true
		}
	}
	return false
}
