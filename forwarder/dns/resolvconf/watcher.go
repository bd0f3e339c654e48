package resolvconf

// Following resolv.conf.
//
// The file is seldom written in place: it is replaced by rename, is a symlink that is switched, or
// lies in a directory that a daemon makes and removes. So every directory on the way to it is
// watched for the names looked up in it (chain.go), and the file itself for writes. On any change
// the whole chain is walked again, its watches renewed, and the file read.
//
// A writer needs several steps, and between two of them the file may be missing or empty. So the
// file is read once it has been quiet for settle; if it then has no server, that is believed only
// after lossGrace more. Where the chain cannot be watched (no permission to read a directory, no
// watches or inotify instances left), the file is checked every second instead.
//
// systemd-resolved's stub (127.0.0.53) is used as is: upstream sockets are opened in the host's
// network namespace, where it answers, and only the stub knows per-link servers.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/internal/fswatch"
)

const (
	settle    = 50 * time.Millisecond
	settleMax = time.Second // under a stream of changes
	lossGrace = 500 * time.Millisecond

	// maxResolvConf bounds the bytes read; a real file has a few hundred.
	maxResolvConf = 64 << 10

	dirMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
		unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	fileMask = unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB |
		unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
)

// Watcher follows one resolv.conf. It belongs to one goroutine at a time.
type Watcher struct {
	path    string
	fd      *os.File                  // what fswatch opened, in Go's poller
	ticking bool                      // fd says that it is time to look, not what has changed
	names   map[int32]map[string]bool // entries of interest by watch descriptor; none for a file
	blind   bool                      // part of the chain cannot be watched
	last    dns.Upstreams
	err     error
}

// NewWatcher watches path, which need not exist, and reads it for the first time; Upstreams returns
// the result.
func NewWatcher(path string) (*Watcher, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	fd, ticking, err := fswatch.Open()
	if err != nil {
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	w := &Watcher{path: abs, fd: os.NewFile(uintptr(fd), "watch"), ticking: ticking, names: make(map[int32]map[string]bool)}
	w.last, w.err = w.look()
	return w, nil
}

// Upstreams returns the file's latest content, and the error if it could not be read.
func (w *Watcher) Upstreams() (dns.Upstreams, error) { return w.last, w.err }

// Close ends the Watcher; a Run in progress returns.
func (w *Watcher) Close() error { return w.fd.Close() }

// Run calls changed on its own goroutine whenever the file's content differs from before, until ctx
// ends, which is no error, or Close. If the file is missing or cannot be read, changed gets no
// servers and the error.
func (w *Watcher) Run(ctx context.Context, changed func(dns.Upstreams, error)) error {
	events := make(chan []byte)
	var readErr error // set before events is closed
	// Owned by Run; stopped by the read deadline below, or Close.
	go func() {
		defer close(events)
		buf := make([]byte, 16<<10)
		for {
			n, err := w.fd.Read(buf)
			if err != nil {
				readErr = err
				return
			}
			events <- append([]byte(nil), buf[:n]...)
		}
	}()
	defer func() {
		w.fd.SetReadDeadline(time.Unix(1, 0))
		for range events { // until the reader is gone
		}
		w.fd.SetReadDeadline(time.Time{})
	}()

	timer := time.NewTimer(0) // something may have changed before Run
	var since time.Time       // of the first change not yet read
	lossSeen := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case b, ok := <-events:
			if !ok {
				return fmt.Errorf("watching %s: %w", w.path, readErr)
			}
			if !w.concerns(b) {
				continue
			}
			if since.IsZero() {
				since = time.Now()
			}
			lossSeen = false
			timer.Reset(max(min(settle, time.Until(since.Add(settleMax))), 0))
		case <-timer.C:
			since = time.Time{}
			u, err := w.look()
			if len(u.Servers) == 0 && len(w.last.Servers) > 0 && !lossSeen {
				lossSeen = true
				timer.Reset(lossGrace)
				continue
			}
			lossSeen = false
			if w.blind {
				timer.Reset(fswatch.Every)
			}
			if !u.Equal(w.last) || (err == nil) != (w.err == nil) {
				w.last, w.err = u, err
				changed(u, err)
			}
		}
	}
}

// look walks the chain, watches it and reads the file.
func (w *Watcher) look() (dns.Upstreams, error) {
	ch, err := resolveChain(w.path)
	for range 8 { // until nothing changed between walking and watching
		w.renew(ch)
		var again pathChain
		again, err = resolveChain(w.path)
		if again.equal(ch) {
			break
		}
		ch = again
	}
	if err != nil {
		return dns.Upstreams{}, fmt.Errorf("reading %s: %w", w.path, err)
	}
	data, err := readRegular(ch.file)
	if err != nil {
		return dns.Upstreams{}, fmt.Errorf("reading %s: %w", w.path, err)
	}
	return dns.ParseResolvConf(data), nil
}

// renew watches exactly the entries and the file of ch.
func (w *Watcher) renew(ch pathChain) {
	if w.ticking {
		return
	}
	rc, err := w.fd.SyscallConn()
	if err != nil {
		return // closed
	}
	// Not Fd(): that would take the descriptor out of Go's poller.
	rc.Control(func(fd uintptr) { w.renewOn(int(fd), ch) })
}

func (w *Watcher) renewOn(fd int, ch pathChain) {
	w.blind = false
	names := make(map[int32]map[string]bool)
	add := func(path string, mask uint32, entries map[string]bool) {
		wd, err := unix.InotifyAddWatch(fd, path, mask)
		if err != nil {
			w.blind = w.blind || !errors.Is(err, unix.ENOENT)
			return
		}
		have := names[int32(wd)]
		if have == nil {
			have = make(map[string]bool) // one directory by two paths is one watch
			names[int32(wd)] = have
		}
		maps.Copy(have, entries)
	}
	for dir, entries := range ch.entries {
		add(dir, dirMask, entries)
	}
	add(ch.file, fileMask, nil)
	for wd := range w.names {
		if names[wd] == nil {
			// Fails if the kernel has dropped it already, with the inode.
			unix.InotifyRmWatch(fd, uint32(wd))
		}
	}
	w.names = names
}

// concerns reports whether any event in b is about the chain.
func (w *Watcher) concerns(b []byte) bool {
	if w.ticking {
		return true
	}
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(b))
		mask := binary.NativeEndian.Uint32(b[4:])
		n := int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if n > len(b) {
			return true
		}
		entry := strings.TrimRight(string(b[:n]), "\x00")
		b = b[n:]
		if mask&unix.IN_Q_OVERFLOW != 0 {
			return true
		}
		if names, ok := w.names[wd]; ok && (entry == "" || names[entry]) {
			return true
		}
	}
	return false
}

// readRegular reads path only if it is a regular file: opening a FIFO or a device in its place must
// not hang the monitor.
func readRegular(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxResolvConf+1))
	if err == nil && len(data) > maxResolvConf {
		err = &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("longer than %d bytes", maxResolvConf)}
	}
	return data, err
}
