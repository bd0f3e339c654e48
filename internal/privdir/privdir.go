// Package privdir makes directories that no other user can enter, replace or redirect.
//
// A path is walked from the root by descriptors (openat, O_NOFOLLOW, fstat), so that what was
// checked is what is used. Every directory and symbolic link on the way must belong to root or the
// caller, and no directory may be writable by others without a sticky bit: otherwise a writer could
// replace what was checked. The last name must be a directory of the caller's own, never a link.
//
// The package does not know what the directories are for.
package privdir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ModeError means that a directory is open to others.
type ModeError struct {
	Path string
	Mode fs.FileMode // its permission bits
}

func (e *ModeError) Error() string {
	return fmt.Sprintf("%s is open to others (mode %#o): chmod 700 it", e.Path, e.Mode)
}

// OwnerError means that a directory belongs to another user, who may have made it first on purpose.
type OwnerError struct {
	Path       string
	Owner, UID int
}

func (e *OwnerError) Error() string {
	return fmt.Sprintf("%s belongs to uid %d, not to %d", e.Path, e.Owner, e.UID)
}

// Make makes the directory at path with mode 0700 if it does not exist, and checks it and the way
// to it. The directory must belong to uid and have no permission bit of forbid. Its parent must
// exist.
func Make(path string, uid int, forbid fs.FileMode) error { return open(path, uid, forbid, false) }

// MakeAll is Make, but also makes missing directories on the way.
func MakeAll(path string, uid int, forbid fs.FileMode) error { return open(path, uid, forbid, true) }

// maxLinks bounds the symbolic links of one path, as the kernel does (path_resolution(7)).
const maxLinks = 40

func open(path string, uid int, forbid fs.FileMode, parents bool) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return fmt.Errorf("%s: want an absolute path without dot components", path)
	}
	w := walker{path: path, uid: uid, at: -1}
	defer w.close()
	dir, last := filepath.Split(path)
	if err := w.walk(strings.Split(dir, "/"), parents); err != nil {
		return err
	}
	if w.mode&0o022 != 0 && w.mode&unix.S_ISVTX == 0 {
		return fmt.Errorf("%s can be replaced by others: its parent is writable to them and has no sticky bit", path)
	}
	if err := unix.Mkdirat(w.at, last, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make %s: %w", path, err)
	}
	fd, st, err := w.look(last)
	if err != nil {
		return err
	}
	_ = unix.Close(fd)
	switch mode := fs.FileMode(st.Mode & 0o777); {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return fmt.Errorf("%s is a symbolic link: remove it", path)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a directory: remove it", path)
	case int(st.Uid) != uid:
		return &OwnerError{path, int(st.Uid), uid}
	case mode&forbid != 0:
		return &ModeError{path, mode}
	}
	return nil
}

// walker is at one directory of a path.
type walker struct {
	path  string // for errors
	uid   int
	at    int    // an O_PATH descriptor, or -1 before the root
	mode  uint32 // mode of at
	links int
}

func (w *walker) close() {
	if w.at >= 0 {
		_ = unix.Close(w.at)
	}
}

// look opens a name in at, whatever its type.
func (w *walker) look(name string) (fd int, st unix.Stat_t, err error) {
	fd, err = unix.Openat(w.at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil {
		if err = unix.Fstat(fd, &st); err != nil {
			_ = unix.Close(fd)
		}
	}
	if err != nil {
		return -1, st, &fs.PathError{Op: "open", Path: w.path, Err: err}
	}
	return fd, st, nil
}

// walk goes from the root through names, skipping empty ones.
func (w *walker) walk(names []string, parents bool) error {
	if err := w.root(); err != nil {
		return err
	}
	for len(names) > 0 {
		name := names[0]
		names = names[1:]
		if name == "" || name == "." {
			continue
		}
		fd, st, err := w.look(name)
		if errors.Is(err, fs.ErrNotExist) && parents {
			if err := unix.Mkdirat(w.at, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("make %s: %w", w.path, err)
			}
			fd, st, err = w.look(name)
		}
		if err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			if err := w.enter(fd, st, name); err != nil {
				return err
			}
			continue
		}
		target, err := w.follow(fd, st, name)
		if err != nil {
			return err
		}
		names = append(strings.Split(target, "/"), names...)
		if filepath.IsAbs(target) {
			if err := w.root(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *walker) root() error {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: "/", Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return &fs.PathError{Op: "stat", Path: "/", Err: err}
	}
	return w.enter(fd, st, "/")
}

// enter moves on to a directory if it can be trusted, and takes ownership of fd. It accepts a
// directory further up that a group may write to, which is the system's business: some
// distributions have those.
func (w *walker) enter(fd int, st unix.Stat_t, name string) error {
	var err error
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		err = &fs.PathError{Op: "open", Path: w.path, Err: unix.ENOTDIR}
	case !trusted(int(st.Uid), w.uid):
		err = fmt.Errorf("%s can be replaced by uid %d, to whom the directory %s on its way belongs", w.path, st.Uid, name)
	case st.Mode&0o002 != 0 && st.Mode&unix.S_ISVTX == 0:
		err = fmt.Errorf("%s can be replaced by others: the directory %s on its way is writable to them and has no sticky bit", w.path, name)
	}
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	w.close()
	w.at, w.mode = fd, st.Mode
	return nil
}

// follow reads a link that only root or the caller can have made, and takes ownership of fd.
func (w *walker) follow(fd int, st unix.Stat_t, name string) (string, error) {
	defer unix.Close(fd)
	if !trusted(int(st.Uid), w.uid) {
		return "", fmt.Errorf("%s can be led elsewhere by uid %d, to whom the symbolic link %s on its way belongs", w.path, st.Uid, name)
	}
	if w.links++; w.links > maxLinks {
		return "", &fs.PathError{Op: "open", Path: w.path, Err: unix.ELOOP}
	}
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", b)
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: w.path, Err: err}
	}
	return string(b[:n]), nil
}

// unmapped is the owner that the kernel shows in a user namespace for an owner that has no id
// there.
const unmapped = 65534

// trusted reports whether an owner is root or uid. In a user namespace without root, root's files
// appear to belong to nobody.
func trusted(owner, uid int) bool {
	return owner == 0 || owner == uid || owner == unmapped && inUserNamespace()
}

// inUserNamespace reports whether some users of the machine have no id here.
func inUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(b)), " ") != "0 0 4294967295"
}
