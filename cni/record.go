package cni

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/cni/uplink"
	"sluice.dev/sluice/internal/privdir"
)

// The state directory.
//
//	STATE/attachments/NAME/lock         flock held by the verb that works on it
//	STATE/attachments/NAME/record.json  the Attachment
//	STATE/attachments/NAME/set.json     what was set while it ran: the monitor's
//	STATE/netns/NAME                    the uplink namespace, a bind mount
//
// NAME begins with the container's id, for people, followed by hashes of the network's name and of
// the whole identity. It can be computed from DEL's arguments, and GC can tell without a readable
// record which network something belongs to.
//
// A record is replaced by renaming, so it exists completely or not at all. It is not synced to
// disk: after a power cut nothing that it describes exists, and an unreadable one is treated as
// leftovers.

const (
	attachmentsDir = "attachments"
	netnsDir       = "netns"
	recordFile     = "record.json"
	keepFile       = "set.json"
	lockFile       = "lock"

	// recordVersion changes when an older binary could misread a record.
	recordVersion = 1

	idPrefix = 12 // characters of the container's id in a name
	netHash  = 6  // hexadecimal digits of the network's hash
	allHash  = 10 // and of the identity's
)

// State is how far an attachment has come.
type State string

// An attachment is StateAdding until ADD succeeds; how much of it exists is then unknown. It is
// StateDeleting once a DEL has begun. StatePassed is a container that Select left to the main
// plugin.
const (
	StateAdding   State = "adding"
	StateReady    State = "ready"
	StateDeleting State = "deleting"
	StatePassed   State = "passed"
)

// Attachment is the durable record of one interface of one container.
type Attachment struct {
	Version     int    `json:"version"`
	Network     string `json:"network"`
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
	// NetNS is the pod's namespace. NetNSID distinguishes it from another that has its path now.
	NetNS   string `json:"netns"`
	NetNSID string `json:"netnsID"`
	// BootID is the kernel's boot_id: after a reboot, only the record is left.
	BootID string    `json:"bootID"`
	State  State     `json:"state"`
	Since  time.Time `json:"since"`
	Pod    Pod       `json:"pod,omitzero"`

	// Delegated means that our delegates made the interface, in the uplink namespace.
	Delegated bool `json:"delegated,omitempty"`
	// Result is the delegates' result as they returned it, in the configuration's version.
	Result json.RawMessage `json:"result,omitempty"`
	// Link is the main interface as it was before it was moved.
	Link *uplink.LinkState `json:"link,omitempty"`
	// Launch is everything that the monitor starts with, except the descriptors.
	Launch *LaunchSpec `json:"launch,omitempty"`
	// Monitor is the serving process, identified by its pid and its start time in clock ticks since
	// boot.
	MonitorPID   int    `json:"monitorPID,omitempty"`
	MonitorStart uint64 `json:"monitorStart,omitempty"`
}

// attachmentName returns the name of an attachment's identity.
func attachmentName(network, containerID, ifName string) string {
	all := sha256.Sum256([]byte(network + "\x00" + containerID + "\x00" + ifName))
	id := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, containerID[:min(len(containerID), idPrefix)])
	return id + "-" + hashOfNetwork(network) + hex.EncodeToString(all[:])[:allHash]
}

func hashOfNetwork(network string) string {
	sum := sha256.Sum256([]byte(network))
	return hex.EncodeToString(sum[:])[:netHash]
}

// ofNetwork reports whether name is that of an attachment to network.
func ofNetwork(name, network string) bool {
	i := strings.LastIndexByte(name, '-')
	return i >= 0 && strings.HasPrefix(name[i+1:], hashOfNetwork(network))
}

// bootID identifies this boot of the machine.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// store is a state directory.
type store struct{ path string }

// held is an attachment's directory with its lock.
type held struct {
	store store
	name  string
	lock  *os.File
}

var (
	errNoRecord = errors.New("no record of this attachment")
	errTorn     = errors.New("the attachment's record cannot be read")
)

// lockWait bounds the wait for another verb that works on the same attachment.
const lockWait = 30 * time.Second

// openStore makes the state directory if necessary. Only root may write to it, its contents and the
// path to it: records say what DEL removes, and with which programs.
func openStore(path string) (store, error) {
	uid := os.Geteuid()
	err := privdir.MakeAll(path, uid, 0o022)
	for _, dir := range []string{attachmentsDir, netnsDir} {
		if err == nil {
			err = privdir.Make(filepath.Join(path, dir), uid, 0o022)
		}
	}
	if err != nil {
		return store{}, fmt.Errorf("the state directory: %w", err)
	}
	return store{path}, nil
}

func (s store) dir(name string) string { return filepath.Join(s.path, attachmentsDir, name) }

func (s store) netns(name string) string { return filepath.Join(s.path, netnsDir, name) }

// runtimeDir is where monitors keep their control sockets: the place where the other commands look
// for root's or, for a custom state directory, a place below it, where the commands look with
// XDG_RUNTIME_DIR set to it.
func (s store) runtimeDir() string {
	if s.path == DefaultStateDir {
		return "/run/sluice"
	}
	return filepath.Join(s.path, "sluice")
}

// names returns every attachment with leftovers, records or namespaces.
func (s store) names() ([]string, error) {
	seen := make(map[string]bool)
	var out []string
	for _, dir := range []string{attachmentsDir, netnsDir} {
		entries, err := os.ReadDir(filepath.Join(s.path, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list the attachments: %w", err)
		}
		for _, e := range entries {
			if !seen[e.Name()] {
				seen[e.Name()] = true
				out = append(out, e.Name())
			}
		}
	}
	return out, nil
}

// hold takes an attachment's lock, and makes its directory. A verb that was killed has lost its
// lock.
func (s store) hold(ctx context.Context, name string) (*held, error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for {
		h, err := s.tryHold(name)
		if err == nil {
			return h, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("lock the attachment %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lock the attachment %s: another call holds it: %w", name, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (s store) tryHold(name string) (*held, error) {
	if err := os.Mkdir(s.dir(name), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	path := filepath.Join(s.dir(name), lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, err
	}
	// The directory was removed by a holder of the lock of a deleted file.
	mine, err := f.Stat()
	if err == nil {
		var there fs.FileInfo
		if there, err = os.Lstat(path); err == nil && !os.SameFile(mine, there) {
			err = fs.ErrNotExist
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &held{s, name, f}, nil
}

// lend makes the processes that f starts hold the lock too. A delegate may outlive a killed plugin,
// and must finish before the next verb looks at what it made.
func (h *held) lend(f func() error) error {
	if _, err := unix.FcntlInt(h.lock.Fd(), unix.F_SETFD, 0); err != nil {
		return fmt.Errorf("lend the lock: %w", err)
	}
	defer unix.CloseOnExec(int(h.lock.Fd()))
	return f()
}

// release releases the lock; the record stays.
func (h *held) release() { _ = h.lock.Close() }

// read returns the record, errNoRecord if there is none, or errTorn if it cannot be decoded.
func (h *held) read() (*Attachment, error) {
	b, err := os.ReadFile(filepath.Join(h.store.dir(h.name), recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoRecord
	}
	if err != nil {
		return nil, fmt.Errorf("read the record: %w", err)
	}
	a := &Attachment{}
	if err := json.Unmarshal(b, a); err != nil {
		return nil, fmt.Errorf("%w: %w", errTorn, err)
	}
	if a.Version != recordVersion || attachmentName(a.Network, a.ContainerID, a.IfName) != h.name {
		return nil, fmt.Errorf("%w: it is of version %d and names %s/%s/%s", errTorn, a.Version, a.Network, a.ContainerID, a.IfName)
	}
	return a, nil
}

// write replaces the record in one step.
func (h *held) write(a *Attachment) error {
	b, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return fmt.Errorf("write the record: %w", err)
	}
	path := filepath.Join(h.store.dir(h.name), recordFile)
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write the record: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write the record: %w", err)
	}
	return nil
}

// remove removes the record, and the lock with it: the last step of DEL.
func (h *held) remove() error {
	dir := h.store.dir(h.name)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the record: %w", err)
	}
	for _, e := range entries {
		if e.Name() != lockFile {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the record: %w", err)
	}
	_ = os.Remove(filepath.Join(dir, lockFile))
	// Another verb waiting for the lock may have made a new lock file; the directory is then its
	// own.
	_ = os.Remove(dir)
	return nil
}
