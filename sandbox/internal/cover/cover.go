package cover

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// This package hides what CMD must not reach in the file system that it shares with the caller:
// sockets of the host's daemons, and Sluice's own files. The outer stage does all of it.
//
// A mount on a path goes away with the path: a daemon that restarts unlinks its socket, or its
// directory, and the kernel drops the mount on it. So directories that hold only runtime state,
// such as /run, are replaced by a copy. The copy is a tmpfs with everything that is not a socket:
// each entry is the host's own by a bind mount, and directories with sockets in them are copied the
// same way. Files that the host adds there later are not visible.

const (
	// MaxCopied bounds how many entries of such directories are examined; the rest is left out.
	MaxCopied = 100_000
	// maxDepth bounds how deep such directories may nest.
	maxDepth = 32
)

// Coverer makes the covers of one sandbox.
type Coverer struct {
	Allowed []string // paths left reachable, with everything below them
	Left    int      // entries that may still be examined
	Sockets int      // number of sockets left out or covered
}

func Hide(dir string) error {
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err := unix.Mount("tmpfs", dir, "tmpfs", flags, "mode=0555,size=4k,nr_inodes=2")
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// HideFile covers a socket with an empty file.
func (c *Coverer) HideFile(path string) error {
	path, err := filepath.EvalSymlinks(path)
	var fi fs.FileInfo
	if err == nil {
		fi, err = os.Lstat(path)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil // CMD cannot reach it either
	}
	if err != nil || fi.Mode()&fs.ModeSocket == 0 || c.isAllowed(path) {
		return err
	}
	c.Sockets++
	return attachTree(path, func() (int, error) {
		name := filepath.Join(Staging, "covered")
		if err := os.WriteFile(name, nil, 0); err != nil {
			return -1, err
		}
		return unix.OpenTree(unix.AT_FDCWD, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	})
}

// ReadOnly keeps CMD from changing a file by its path.
func ReadOnly(path string) error {
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

// attachTree mounts on path the tree that build makes in a scratch mount namespace.
func attachTree(path string, build func() (int, error)) error {
	tree, err := InScratch(build)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// Replace covers a directory with a copy of it that has no sockets.
func (c *Coverer) Replace(dir string) error {
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
		top := filepath.Join(Staging, "copy")
		if err := c.copy(dir, top, st.Dev, maxDepth); err != nil {
			return -1, err
		}
		return unix.OpenTree(unix.AT_FDCWD, top, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	})
}

// copy makes the directory to with the contents of from. Entries that cannot be copied are left
// out.
func (c *Coverer) copy(from, to string, dev uint64, depth int) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	_ = os.Lchown(to, int(st.Uid), int(st.Gid)) // an unmapped id leaves it ours
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return nil //nolint:nilerr // CMD cannot read it either
	}
	for _, e := range entries {
		if c.Left--; c.Left < 0 {
			return nil
		}
		src, dst := filepath.Join(from, e.Name()), filepath.Join(to, e.Name())
		switch mode := e.Type(); {
		case c.isAllowed(src):
			bind(src, dst, mode.IsDir())
		case mode&fs.ModeSocket != 0:
			c.Sockets++
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

// bind mounts src at dst, or leaves it out if that fails.
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

// finding says what a directory holds.
type finding int

const (
	unknown finding = iota // left out
	holdsNone
	holdsSockets
)

// look finds out whether a directory holds a socket, or an allowed path, which is a reason to copy
// it too. It looks into another file system below only if that is a tmpfs: any other holds files
// that somebody mounted there. Overlays are the roots of containers.
func (c *Coverer) look(dir string, dev uint64, depth int) finding {
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
	for _, path := range c.Allowed {
		if strings.HasPrefix(path, dir+"/") {
			return holdsSockets
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return holdsNone // none that CMD could reach
	}
	for _, e := range entries {
		if c.Left--; c.Left < 0 {
			return unknown
		}
		if e.Type()&fs.ModeSocket != 0 {
			return holdsSockets
		}
		if e.IsDir() {
			if f := c.look(filepath.Join(dir, e.Name()), dev, depth-1); f != holdsNone {
				return holdsSockets // it has something to leave out
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

// isAllowed reports whether path is one of the paths left reachable, or below one.
func (c *Coverer) isAllowed(path string) bool {
	for _, a := range c.Allowed {
		if path == a || strings.HasPrefix(path, a+"/") {
			return true
		}
	}
	return false
}
