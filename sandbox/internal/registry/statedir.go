package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/privdir"
)

// The state directory.
//
//	RUNTIME/NAME/lock          flock held by the monitor for as long as it lives
//	RUNTIME/NAME/control.sock  the control socket
//	RUNTIME/NAME/state.json    what `ps` shows of a sandbox that does not answer
//
// RUNTIME is $XDG_RUNTIME_DIR/sluice, /run/sluice for root, and otherwise
// /tmp/sluice-UID. All of it is 0700 and the caller's own: a RUNTIME or NAME
// that is a symbolic link, someone else's, or open to others is refused, and so is one
// that others could replace (package privdir), so nobody can make a sandbox put its socket
// where they can reach it.
//
// The lock, not a pid, proves life: the kernel drops it with the process, kill
// -9 included. Who can take it may clean up. A cleaner removes the directory
// while it holds the lock, and a claimer that got a lock checks that the file
// is still the one at that path, so neither destroys the other's work.

const (
	LockFile    = "lock"
	SocketFile  = "control.sock"
	StateFile   = "state.json"
	MaxNameLen  = 48
	maxSockPath = 107 // sun_path without its NUL

	// coveredMode is that of the empty directory which lies over RUNTIME inside
	// a sandbox.
	coveredMode = 0o555
)

// ErrNameInUse means that a sandbox of that name is alive.
var ErrNameInUse = errors.New("name in use")

// ErrNoSandbox means that no sandbox of that name is alive.
var ErrNoSandbox = errors.New("no such sandbox")

// State is the content of state.json.
type State struct {
	Name    string    `json:"name"`
	PID     int       `json:"pid"`
	Command []string  `json:"command"`
	Started time.Time `json:"started"`
	// Start is when the process started, in clock ticks since boot: together with it PID is unique.
	// It is 0 if the process must not be signalled.
	Start uint64 `json:"start,omitempty"`
	// Keep is AttachmentConfig.Keep: where to set a policy that the monitor cannot accept.
	Keep string `json:"keep,omitempty"`
}

// Registry is the runtime directory of one user.
type Registry struct {
	Path string
	uid  int
	// System is searched as well: it has the sandboxes that root started outside a session, such as
	// those of pods, if a session has its own directory. nil if there is none.
	System *Registry
}

const (
	// systemDir is root's own runtime directory.
	systemDir = "/run/sluice"
	// tmpDir and a uid form the directory of a user without a session.
	tmpDir = "/tmp/sluice-"
)

// Open finds the caller's runtime directory, makes it if necessary, and checks that it is safe to
// use.
func Open() (*Registry, error) {
	uid := os.Geteuid()
	return OpenBoth(RuntimeDir(uid, os.Getenv("XDG_RUNTIME_DIR")), systemDir, uid)
}

// OpenBoth opens the registry at path and, for root, makes sandboxes at system visible too.
func OpenBoth(path, system string, uid int) (*Registry, error) {
	r, err := OpenIn(path, uid)
	if err != nil || uid != 0 || path == system {
		return r, err
	}
	if _, err := os.Lstat(system); errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	r.System, err = OpenIn(system, uid)
	return r, err
}

// RuntimeDir returns where sandboxes of uid keep their state. It ignores an XDG_RUNTIME_DIR that is
// not uid's own, as sudo and su leave it.
func RuntimeDir(uid int, xdg string) string {
	if filepath.IsAbs(xdg) {
		if fi, err := os.Stat(xdg); err == nil && fi.IsDir() && OwnerOf(fi) == uid {
			return filepath.Join(xdg, "sluice")
		}
	}
	if uid == 0 {
		return systemDir
	}
	return tmpDir + strconv.Itoa(uid)
}

// registryPatterns are where sandboxes keep their sockets and their records, whoever's
// they are: RuntimeDir's three places, and the CNI plugin's state.
var registryPatterns = []string{systemDir, "/run/sluice-cni", "/run/user/[0-9]*/sluice", tmpDir + "[0-9]*"}

// RegistriesToHide returns the existing registry directories that the caller could enter, with r's
// own.
func (r *Registry) RegistriesToHide() []string {
	dirs := []string{r.Path}
	for _, pattern := range registryPatterns {
		found, err := filepath.Glob(pattern)
		if err != nil {
			continue // a pattern of ours is well formed
		}
		for _, dir := range found {
			if id, ok := strings.CutPrefix(dir, tmpDir); ok && strings.Trim(id, "0123456789") != "" {
				continue
			}
			fi, err := os.Lstat(dir)
			if err == nil && fi.IsDir() && dir != r.Path && (r.uid == 0 || OwnerOf(fi) == r.uid) {
				dirs = append(dirs, dir)
			}
		}
	}
	return dirs
}

// At opens the registry in a directory, or the caller's own.
func At(dir string) (*Registry, error) {
	if dir == "" {
		return Open()
	}
	return OpenIn(dir, os.Geteuid())
}

func OpenIn(path string, uid int) (*Registry, error) {
	if err := privateDir(path, uid); err != nil {
		return nil, fmt.Errorf("the runtime directory: %w", err)
	}
	return &Registry{Path: path, uid: uid}, nil
}

// privateDir makes path, or checks that it is a directory of uid's that no other user can enter or
// replace.
func privateDir(path string, uid int) error {
	err := privdir.Make(path, uid, 0o077)
	var owner *privdir.OwnerError
	var mode *privdir.ModeError
	switch {
	case errors.As(err, &owner):
		return fmt.Errorf("%w: set XDG_RUNTIME_DIR to a directory of your own, such as /run/user/%d, or have uid %d or root remove it", err, uid, owner.Owner)
	case errors.As(err, &mode) && mode.Mode == coveredMode:
		return fmt.Errorf("%s is covered here: from inside a sandbox, sandboxes cannot be controlled (set XDG_RUNTIME_DIR to nest one)", path)
	}
	return err
}

func OwnerOf(fi fs.FileInfo) int {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

// CheckName returns an error if a sandbox may not be called name.
func CheckName(name string) error {
	if name == "" || len(name) > MaxNameLen {
		return fmt.Errorf("the name %q: want 1 to %d characters", name, MaxNameLen)
	}
	for i, r := range name {
		alnum := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune("-_.", r)) {
			return fmt.Errorf("the name %q: want letters, digits, '-', '_' and '.', the first a letter or digit", name)
		}
	}
	return nil
}

// Dir is the claimed state directory of a living sandbox.
type Dir struct {
	Root string
	Lock *os.File
}

// Claim takes a name for the caller's lifetime. Remains of a dead sandbox of
// that name are removed.
func (r *Registry) Claim(name string) (*Dir, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	path := filepath.Join(r.Path, name)
	if n := len(filepath.Join(path, SocketFile)); n > maxSockPath {
		return nil, fmt.Errorf("the control socket's path would be %d bytes long, more than a unix socket's %d: use a shorter --name or XDG_RUNTIME_DIR", n, maxSockPath)
	}
	// A claimer loses the race against a cleaner at most once per cleaner, so
	// the bound is never met; it turns a surprise into an error.
	for range 100 {
		d, err := r.tryClaim(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if errors.Is(err, ErrNameInUse) {
			return nil, fmt.Errorf("a sandbox named %q is running: %w", name, ErrNameInUse)
		}
		return d, err
	}
	return nil, fmt.Errorf("claim %s: it keeps being removed", path)
}

// tryClaim fails with fs.ErrNotExist when a cleaner removed the directory
// under it.
func (r *Registry) tryClaim(path string) (*Dir, error) {
	if err := privateDir(path, r.uid); err != nil {
		return nil, err
	}
	lock, err := takeLock(path, unix.O_CREAT)
	if err != nil {
		return nil, err
	}
	d := &Dir{Root: path, Lock: lock}
	for _, f := range []string{SocketFile, StateFile} {
		if err := os.RemoveAll(filepath.Join(path, f)); err != nil {
			_ = lock.Close()
			return nil, err
		}
	}
	return d, nil
}

// takeLock takes the lock of the directory at path, without waiting, and makes
// sure that the file locked is the one that is there.
func takeLock(path string, flags int) (*os.File, error) {
	name := filepath.Join(path, LockFile)
	f, err := os.OpenFile(name, os.O_RDWR|flags|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrNameInUse
	}
	if err == nil {
		var mine, there fs.FileInfo
		if mine, err = f.Stat(); err == nil {
			there, err = os.Lstat(name)
		}
		if err == nil && !os.SameFile(mine, there) {
			err = fs.ErrNotExist
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// Socket is the path of the control socket.
func (d *Dir) Socket() string { return filepath.Join(d.Root, SocketFile) }

// Inherited is the directory of a sandbox whose lock another of our processes held.
func (r *Registry) Inherited(name string, lock *os.File) *Dir {
	return &Dir{Root: filepath.Join(r.Path, name), Lock: lock}
}

// Path returns the directory's path.
func (d *Dir) Path() string { return d.Root }

// WriteState replaces state.json in one step.
func (d *Dir) WriteState(s State) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	tmp := filepath.Join(d.Root, StateFile+".new")
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write the state file: %w", err)
	}
	if err := os.Rename(tmp, filepath.Join(d.Root, StateFile)); err != nil {
		return fmt.Errorf("write the state file: %w", err)
	}
	return nil
}

// Remove releases the name.
func (d *Dir) Remove() error {
	err := removeLocked(d.Root)
	_ = d.Lock.Close()
	return err
}

// removeLocked removes a directory whose lock the caller holds. The lock goes
// last and the directory only if it is empty then: a claimer that comes in
// between has made a lock of its own, and keeps its directory.
func removeLocked(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != LockFile {
			err = errors.Join(err, os.RemoveAll(filepath.Join(path, e.Name())))
		}
	}
	if err := errors.Join(err, os.Remove(filepath.Join(path, LockFile))); err != nil {
		return err
	}
	_ = os.Remove(path)
	return nil
}

// Socket is the path of the control socket of the sandbox called name.
func (r *Registry) Socket(name string) (string, error) {
	if err := CheckName(name); err != nil {
		return "", err
	}
	alive, err := r.Reap(name)
	if err != nil {
		return "", err
	}
	if !alive {
		if r.System != nil {
			return r.System.Socket(name)
		}
		return "", fmt.Errorf("%q: %w", name, ErrNoSandbox)
	}
	return filepath.Join(r.Path, name, SocketFile), nil
}

// List returns the sandboxes that are alive, oldest first, and cleans up after
// those that are not.
func (r *Registry) List() ([]State, error) {
	out, err := r.list()
	if err == nil && r.System != nil {
		var more []State
		more, err = r.System.list()
		out = append(out, more...)
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].Started.Before(out[j].Started) })
	return out, err
}

func (r *Registry) list() ([]State, error) {
	entries, err := os.ReadDir(r.Path)
	if err != nil {
		return nil, fmt.Errorf("list the sandboxes: %w", err)
	}
	var out []State
	for _, e := range entries {
		if CheckName(e.Name()) != nil || !e.IsDir() {
			continue
		}
		alive, err := r.Reap(e.Name())
		if err != nil || !alive {
			continue
		}
		out = append(out, r.State(e.Name()))
	}
	return out, nil
}

// State reads State.json. A sandbox that is just starting has none yet: its name
// is enough.
func (r *Registry) State(name string) State {
	var s State
	if b, err := os.ReadFile(filepath.Join(r.Path, name, StateFile)); err == nil {
		_ = json.Unmarshal(b, &s)
	}
	s.Name = name
	return s
}

// Reap reports whether the sandbox called name is alive, and removes what a dead one left.
func (r *Registry) Reap(name string) (alive bool, err error) {
	path := filepath.Join(r.Path, name)
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !fi.IsDir() || OwnerOf(fi) != r.uid {
		return false, fmt.Errorf("%s is not a sandbox's state directory", path)
	}
	lock, err := takeLock(path, 0)
	switch {
	case errors.Is(err, ErrNameInUse):
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		// A claimer between its mkdir and its lock, or the remains of a cleaner:
		// an empty directory goes, anything else stays.
		_ = os.Remove(path)
		return false, nil
	case err != nil:
		return false, err
	}
	err = removeLocked(path)
	_ = lock.Close()
	return false, err
}
