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

// What CMD must not reach in a file system that it shares with the caller: sockets of the
// host's daemons, and what is Sluice's own. All of it is done by the outer stage.
//
// A mount on a path goes with the path: a daemon that starts again unlinks its socket, or
// the directory it is in, and the kernel drops the mount on it. So the directories that
// hold nothing but what runs, such as /run, are seen as a copy: a tmpfs with everything in
// it that is not a socket, each entry the host's own by a bind mount, directories with
// sockets in them copied the same way. What the host puts there later is not seen.

const (
	// MaxCopied bounds the entries of such directories that are looked at; the rest is
	// left out.
	MaxCopied = 100_000
	// maxDepth bounds how deep they are.
	maxDepth = 32
)

// Coverer covers for one sandbox.
type Coverer struct {
	Allowed []string // paths left in reach, with what is below
	Left    int      // entries that may still be looked at
	Sockets int      // how many were left out or covered
}

func Hide(dir string) error {
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err := unix.Mount("tmpfs", dir, "tmpfs", flags, "mode=0555,size=4k,nr_inodes=2")
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// HideFile puts an empty file over a socket.
func (c *Coverer) HideFile(path string) error {
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

// attachTree mounts on path what build makes in a scratch mount namespace.
func attachTree(path string, build func() (int, error)) error {
	tree, err := InScratch(build)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// Replace covers a directory by a copy of it without the sockets.
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

// copy makes the directory to with what is in from. What cannot be brought there is left
// out.
func (c *Coverer) copy(from, to string, dev uint64, depth int) error {
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
		return holdsNone // in none that CMD could reach
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
func (c *Coverer) isAllowed(path string) bool {
	for _, a := range c.Allowed {
		if path == a || strings.HasPrefix(path, a+"/") {
			return true
		}
	}
	return false
}
