package flowlog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// The flow log's file, which the monitor opens, renames and hands to its workers.
//
//	FILE.2 ─► gone     FILE.1 ─► FILE.2     FILE ─► FILE.1     FILE, new, to the worker
//
// It grows no further than FlowLogMaxSize: then the files are renamed the way logrotate does it,
// and the worker (flowsink.go) gets a new one. Only a regular file that still has the name it was
// opened by is rotated: no pipe, device or standard output. A symbolic link is not rotated either,
// so that a user who can put one in our way cannot make us rename its target.
//
// Any number of sandboxes may append to one file. A monitor that finds it full takes a lock on it
// (flock(2), on the file itself) and checks whether it still has its name. If not, another monitor
// has rotated it, and all that is left to do is to open the file that is there now. The same holds
// after logrotate has renamed it. Each rename is atomic, so a monitor that is killed between two of
// them leaves every record in some file, and the next one continues from there.

const (
	// DefaultFlowLogMaxSize and DefaultFlowLogMaxFiles bound a flow log if the caller sets no
	// bounds.
	DefaultFlowLogMaxSize  = 100 << 20
	DefaultFlowLogMaxFiles = 3
	// FlowLogUnbounded as the maximum size means that the file is never rotated.
	FlowLogUnbounded = -1

	minFlowLogFiles, maxFlowLogFiles = 2, 1000
	// MinFlowLogSize has room for any record, unless the sandbox makes records large on purpose.
	MinFlowLogSize = 4 << 10

	// flowLockTries times flowLockPoll is how long to wait for the lock.
	flowLockTries = 50
	flowLockPoll  = 10 * time.Millisecond
)

// ParseFlowLogSize parses the maximum size of a flow log's file: bytes with an optional suffix, as
// in policies, or 0 for a file that is never rotated.
func ParseFlowLogSize(text string) (int64, error) {
	var b policy.Bytes
	if text == "0" {
		return FlowLogUnbounded, nil
	}
	if err := b.UnmarshalText([]byte(text)); err != nil {
		return 0, fmt.Errorf("%w, or 0 for no limit", err)
	}
	return int64(b), checkFlowLogBounds(int64(b), 0)
}

// CheckFlowLogFiles returns an error unless a flow log can have n files.
func CheckFlowLogFiles(n int) error {
	if n < minFlowLogFiles || n > maxFlowLogFiles {
		return fmt.Errorf("%d: want %d to %d files, the one being written included", n, minFlowLogFiles, maxFlowLogFiles)
	}
	return nil
}

// checkFlowLogBounds checks the bounds that are not left to their defaults.
func checkFlowLogBounds(size int64, files int) error {
	if size > 0 && size < MinFlowLogSize {
		return fmt.Errorf("a flow log of %d bytes: want at least %v, or 0 for no limit", size, policy.Bytes(MinFlowLogSize))
	}
	if files != 0 {
		return CheckFlowLogFiles(files)
	}
	return nil
}

// FlowFile is the monitor's side of the flow log.
type FlowFile struct {
	Path     string // for renaming and reopening; "" if the file is never renamed or reopened
	MaxSize  int64  // 0 means never rotated
	maxFiles int
	log      *logring.LogRing
	Rename   func(from, to string) error

	work   sync.Mutex // serialises renaming and opening; taken before mu
	failed bool       // whether the last rotation failed
	closed bool

	mu sync.Mutex
	F  *os.File // changed under work and mu
}

// ErrNoFlowFile means that the flow log is not a file that still has its own name.
var ErrNoFlowFile = errors.New("the flow log is no file that can be opened again")

// OpenFlowFile opens a flow log for appending. "-" means standard output, "" none. A zero maxSize
// or maxFiles means the default.
func OpenFlowFile(name string, maxSize int64, maxFiles int, log *logring.LogRing) (*FlowFile, error) {
	if err := checkFlowLogBounds(maxSize, maxFiles); err != nil {
		return nil, fmt.Errorf("--flow-log: %w", err)
	}
	l := &FlowFile{MaxSize: maxSize, maxFiles: maxFiles, log: log, Rename: os.Rename}
	switch name {
	case "":
		return nil, nil
	case "-":
		fd, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, fmt.Errorf("--flow-log -: standard output: %w", err)
		}
		l.F, l.MaxSize = os.NewFile(uintptr(fd), "standard output"), 0
		return l, nil
	}
	if l.MaxSize == 0 {
		l.MaxSize = DefaultFlowLogMaxSize
	}
	l.MaxSize = max(0, l.MaxSize) // FlowLogUnbounded
	if l.maxFiles == 0 {
		l.maxFiles = DefaultFlowLogMaxFiles
	}
	path, err := filepath.Abs(name)
	if err != nil {
		return nil, fmt.Errorf("--flow-log: %w", err)
	}
	if l.F, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("--flow-log: %w", err)
	}
	if named, err := l.Named(path); err == nil && named {
		l.Path = path
		return l, nil
	}
	if st, err := l.F.Stat(); err == nil && st.Mode().IsRegular() && l.MaxSize > 0 && !strings.HasPrefix(path, "/dev/") && !strings.HasPrefix(path, "/proc/") {
		log.Warnf("monitor", "the flow log %s is a symbolic link and is not rotated: name the file itself, or say --flow-log-max-size 0", path)
	}
	l.MaxSize = 0
	return l, nil
}

// Named reports whether path is the regular file that is open. It does not follow a symbolic link.
func (l *FlowFile) Named(path string) (bool, error) {
	ours, err := l.F.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && there.Mode().IsRegular() && os.SameFile(ours, there), err
}

// Dup returns a descriptor of the current file for a worker. The caller closes it.
func (l *FlowFile) Dup() (*os.File, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fd, err := unix.FcntlInt(uintptr(channel.FDOf(l.F)), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("pass the flow log on: %w", err)
	}
	return os.NewFile(uintptr(fd), "flow log"), nil
}

// Mend ends the line that a killed worker was writing, so that the next record gets a line of its
// own. It must not be called while a worker writes.
func (l *FlowFile) Mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.Path == "" {
		return
	}
	r, err := os.Open("/proc/self/fd/" + strconv.Itoa(channel.FDOf(l.F)))
	if err != nil {
		return // the file may be written but not read
	}
	defer r.Close()
	last := make([]byte, 1)
	if st, err := r.Stat(); err != nil || st.Size() == 0 {
		return
	} else if _, err := r.ReadAt(last, st.Size()-1); err == nil && last[0] != '\n' {
		_, _ = l.F.WriteString("\n")
	}
}

// Rotate makes room: it renames the file if it is about full, and opens the next one. On error the
// current file stays in use. Of several errors in a row, only the first is logged.
func (l *FlowFile) Rotate() (err error) {
	l.work.Lock()
	defer l.work.Unlock()
	if l.closed || l.MaxSize == 0 {
		return ErrNoFlowFile
	}
	defer func() {
		if err != nil && !l.failed {
			l.log.Warnf("monitor", "the flow log cannot be rotated, and grows beyond %v: %v", policy.Bytes(l.MaxSize), err)
		} else if err == nil && l.failed {
			l.log.Infof("monitor", "the flow log can be rotated again")
		}
		l.failed = err != nil
	}()
	if err := l.lock(); err != nil {
		return err
	}
	defer func() { _ = unix.Flock(channel.FDOf(l.F), unix.LOCK_UN) }()
	st, err := l.F.Stat()
	if err != nil {
		return err
	}
	named, err := l.Named(l.Path)
	switch {
	case err != nil:
		return err
	case !named:
		return l.open(st) // it was renamed or removed
	case st.Size() < l.MaxSize/2:
		// The worker has the previous file. Or it lies: then it must write as much as any other
		// before the oldest records go.
		return nil
	}
	if err := l.shift(); err != nil {
		return err
	}
	if err := l.open(st); err != nil {
		if berr := unix.Renameat2(unix.AT_FDCWD, l.Path+".1", unix.AT_FDCWD, l.Path, unix.RENAME_NOREPLACE); berr != nil {
			err = errors.Join(err, fmt.Errorf("and it is now %s.1: %w", l.Path, berr))
		}
		return err
	}
	return nil
}

// Reopen opens the file that is at the path now, for programs that rename the file themselves.
func (l *FlowFile) Reopen() error {
	l.work.Lock()
	defer l.work.Unlock()
	if l.closed || l.Path == "" {
		return ErrNoFlowFile
	}
	st, err := l.F.Stat()
	if err != nil {
		return err
	}
	return l.open(st)
}

// shift renames FILE to FILE.1, FILE.1 to FILE.2 and so on, up to the first free number. If none is
// free, the oldest file goes.
func (l *FlowFile) shift() error {
	free := l.maxFiles - 1
	for i := 1; i < l.maxFiles; i++ {
		st, err := os.Lstat(l.numbered(i))
		if errors.Is(err, fs.ErrNotExist) {
			free = i
			break
		}
		if err != nil {
			return err
		}
		if st.IsDir() {
			return fmt.Errorf("%s is a directory: remove it", l.numbered(i))
		}
	}
	for i := free; i > 0; i-- {
		if err := l.Rename(l.numbered(i-1), l.numbered(i)); err != nil {
			return err
		}
	}
	return nil
}

func (l *FlowFile) numbered(i int) string {
	if i == 0 {
		return l.Path
	}
	return l.Path + "." + strconv.Itoa(i)
}

// open makes the file at the path the flow log. A new file gets the owner and mode of old. A file
// that somebody else may have put there must be like the previous one.
func (l *FlowFile) open(old os.FileInfo) error {
	const flags = unix.O_WRONLY | unix.O_APPEND | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
	fail := func(err error) error { return &fs.PathError{Op: "open", Path: l.Path, Err: err} }
	fd, err := unix.Open(l.Path, flags|unix.O_CREAT|unix.O_EXCL, 0o600)
	made := err == nil
	if errors.Is(err, unix.EEXIST) {
		fd, err = unix.Open(l.Path, flags, 0)
	}
	if err != nil {
		return fail(err)
	}
	f := os.NewFile(uintptr(fd), l.Path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = f.Close()
		return fail(err)
	}
	if made {
		_ = f.Chmod(old.Mode().Perm())
		_ = f.Chown(registry.OwnerOf(old), groupOf(old)) // only root may do that
	} else if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 || int(st.Uid) != registry.OwnerOf(old) && int(st.Uid) != os.Geteuid() {
		_ = f.Close()
		return fail(errors.New("it is no file of ours with no other name: remove it"))
	}
	l.mu.Lock()
	before := l.F
	l.F = f
	l.mu.Unlock()
	_ = unix.Flock(channel.FDOf(before), unix.LOCK_UN) // the worker has it open too
	_ = before.Close()
	return nil
}

func groupOf(fi fs.FileInfo) int {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Gid)
	}
	return -1
}

// Close closes the flow log, after any rotation in progress.
func (l *FlowFile) Close() {
	l.work.Lock()
	defer l.work.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	_ = l.F.Close()
}

// lock locks the file for a rotation.
func (l *FlowFile) lock() error {
	for range flowLockTries {
		err := unix.Flock(channel.FDOf(l.F), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		time.Sleep(flowLockPoll)
	}
	return fmt.Errorf("%s is locked by another process (see lslocks)", l.Path)
}
