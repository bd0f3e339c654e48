package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/cover"
	"sluice.dev/sluice/sandbox/internal/explain"
)

// The sandbox's view of the file system: the caller's, except for a few mounts.
//
// /etc/resolv.conf, /etc/hosts and /etc/nsswitch.conf are replaced by files on a
// tmpfs of their own. Three things make that harder than a bind mount:
//
//   - resolv.conf may be a symbolic link, even a dangling one. move_mount(2)
//     does not follow it: the file is mounted on the link itself;
//   - it may be absent, and nothing may be created on the host. Then a
//     read-only overlay over /etc brings it;
//   - the host replaces these files by rename(2), and the kernel then silently
//     drops every mount on the old one, in all mount namespaces. watchMounts
//     sees that happen and mounts again on the new one.
//
// The tmpfs itself must be mounted somewhere to be filled. One thread does that in a throw-away
// mount namespace, from which only the detached tree comes back, so the tmpfs is never visible at
// any path of the sandbox.

const (
	resolvConf   = "/etc/resolv.conf"
	hostsFile    = "/etc/hosts"
	nsswitchConf = "/etc/nsswitch.conf"
)

func (s *stage) mounts() error {
	cfg := &s.spec.Config
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making the mounts private: %w", explain.ExplainInside(err))
	}
	if cfg.PIDNamespace {
		const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
		if err := unix.Mount("proc", "/proc", "proc", flags, ""); err != nil {
			return fmt.Errorf("mounting /proc for the PID namespace: %w (in a container whose /proc is masked, do without --pid)", err)
		}
	}
	if err := remountSys(); err != nil {
		s.note("/sys still shows the caller's network devices: %v", err)
	}
	hosts, err := os.ReadFile(hostsFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.note("the caller's %s is left out: %v", hostsFile, err)
	}
	hostname, _ := os.Hostname()
	files := []*privateFile{
		{path: resolvConf, content: resolvText(cfg)},
		{path: hostsFile, content: hostsText(cfg, hostname, hosts)},
	}
	// Without the file, the C library uses no other sources either.
	if callers, err := os.ReadFile(nsswitchConf); err == nil {
		files = append(files, &privateFile{path: nsswitchConf, content: nsswitchText(callers)})
	} else if !errors.Is(err, os.ErrNotExist) {
		s.note("%s is the caller's, and may name a resolver of the host's: %v", nsswitchConf, err)
	}
	if err := supplyAbsent(files); err != nil {
		s.note("%v; the cure: create an empty one", err)
	}
	for _, f := range files {
		if err := f.place(); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("replacing %s: %w", f.path, err)
		}
	}
	go watchMounts(files)
	return nil
}

// privateFile is a file of the host that the sandbox sees replaced.
type privateFile struct {
	path    string
	content []byte
	mountID uint64 // of the mount that shows it; 0 while there is no mount
}

// place mounts the file on whatever lies at its path now.
func (f *privateFile) place() error {
	tree, err := cover.InScratch(func() (int, error) {
		name := filepath.Join(cover.Staging, "file")
		if err := os.WriteFile(name, f.content, 0o644); err != nil {
			return -1, err
		}
		return unix.OpenTree(unix.AT_FDCWD, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	})
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, f.path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return err
	}
	// The ID of the tree, not of whatever the path shows by now: that may already be the host's
	// next version.
	f.mountID = mountID(tree, "")
	return nil
}

// mountID returns the ID of the mount that path lies on, or 0 if it is unknown. It does not follow
// a symbolic link.
func mountID(dir int, path string) uint64 {
	flags := unix.AT_SYMLINK_NOFOLLOW
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	var st unix.Statx_t
	if err := unix.Statx(dir, path, flags, unix.STATX_MNT_ID, &st); err != nil {
		return 0
	}
	return st.Mnt_id
}

// supplyAbsent mounts an overlay over /etc that holds the files that do not exist.
func supplyAbsent(files []*privateFile) error {
	var absent []*privateFile
	for _, f := range files {
		if _, err := os.Lstat(f.path); errors.Is(err, os.ErrNotExist) {
			absent = append(absent, f)
		}
	}
	if len(absent) == 0 {
		return nil
	}
	tree, err := cover.InScratch(func() (int, error) {
		lower, merged := filepath.Join(cover.Staging, "lower"), filepath.Join(cover.Staging, "merged")
		if err := errors.Join(os.Mkdir(lower, 0o755), os.Mkdir(merged, 0o755)); err != nil {
			return -1, err
		}
		for _, f := range absent {
			if err := os.WriteFile(filepath.Join(lower, filepath.Base(f.path)), nil, 0o644); err != nil {
				return -1, err
			}
		}
		if err := unix.Mount("overlay", merged, "overlay", unix.MS_NOSUID|unix.MS_NODEV, "lowerdir="+lower+":/etc"); err != nil {
			return -1, err
		}
		return unix.OpenTree(unix.AT_FDCWD, merged, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	})
	if err == nil {
		err = unix.MoveMount(tree, "", unix.AT_FDCWD, "/etc", unix.MOVE_MOUNT_F_EMPTY_PATH)
		unix.Close(tree)
	}
	if err != nil {
		return fmt.Errorf("%s does not exist and cannot be brought in: %w", absent[0].path, err)
	}
	return nil
}

// maxReplacements bounds how often watchMounts acts, in case root inside keeps unmounting. A host
// replaces the files a few times a day.
const maxReplacements = 1000

// watchMounts puts the private files back when the host has replaced the files they cover. The
// kernel reports every change of the mount table on mountinfo, so the loop polls only while a file
// is missing altogether. It lives as long as the stage.
func watchMounts(files []*privateFile) {
	// Not os.Open: a change is reported once per open file, and Go's poller would consume it.
	fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	for left, pause := maxReplacements, 10; left > 0; {
		wait := -1
		for _, p := range files {
			if p.mountID != 0 && (mountID(unix.AT_FDCWD, p.path) == p.mountID || stillMounted(p.mountID)) {
				continue // still mounted, under a mount of CMD's own
			}
			if p.place() != nil {
				wait = pause
				continue
			}
			left--
		}
		if pause = min(2*pause, 500); wait < 0 {
			pause = 10
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
		if _, err := unix.Poll(fds, wait); err != nil && err != unix.EINTR {
			return
		}
	}
}

func stillMounted(id uint64) bool {
	mounts, err := readMountinfo()
	if err != nil {
		return true
	}
	for _, m := range mounts {
		if m.id == id {
			return true
		}
	}
	return false
}

type mountPoint struct {
	id, parent uint64
	path       string
}

var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// readMountinfo parses the fields of proc(5)'s mountinfo that are used here.
func readMountinfo() ([]mountPoint, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []mountPoint
	for line := range strings.Lines(string(b)) {
		var m mountPoint
		var dev, root string
		if _, err := fmt.Sscan(line, &m.id, &m.parent, &dev, &root, &m.path); err != nil {
			return nil, fmt.Errorf("reading mountinfo: %q: %w", line, err)
		}
		m.path = unescapeMount.Replace(m.path)
		out = append(out, m)
	}
	return out, nil
}

// remountSys gives the sandbox a /sys of its own network namespace and moves the mounts below the
// old one (cgroups, securityfs …) onto it.
func remountSys() error {
	mounts, err := readMountinfo()
	if err != nil {
		return err
	}
	var sys uint64
	for _, m := range mounts {
		if m.path == "/sys" {
			sys = m.id
		}
	}
	type kept struct {
		path string
		tree int
	}
	var below []kept
	defer func() {
		for _, k := range below {
			unix.Close(k.tree)
		}
	}()
	for _, m := range mounts {
		if m.parent != sys || !strings.HasPrefix(m.path, "/sys/") {
			continue
		}
		tree, err := unix.OpenTree(unix.AT_FDCWD, m.path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return fmt.Errorf("keeping %s: %w", m.path, err)
		}
		below = append(below, kept{m.path, tree})
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err = unix.Mount("sysfs", "/sys", "sysfs", flags, "")
	if errors.Is(err, unix.EPERM) {
		err = unix.Mount("sysfs", "/sys", "sysfs", flags|unix.MS_RDONLY, "")
	}
	if err != nil {
		return err
	}
	for _, k := range below {
		if err := unix.MoveMount(k.tree, "", unix.AT_FDCWD, k.path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			_ = unix.Unmount("/sys", unix.MNT_DETACH)
			return fmt.Errorf("keeping %s: %w", k.path, err)
		}
	}
	return nil
}
