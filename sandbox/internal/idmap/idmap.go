package idmap

import (
	"bufio"
	"bytes"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Who is who in the sandbox's user namespace. Three cases:
//
//   - root maps every id it has to itself: files keep their owners, and root
//     inside is root over the files but not over the host's network, which
//     belongs to the user namespace outside;
//   - an ordinary user maps one id, to itself or to 0. The kernel then wants
//     setgroups(2) denied, or dropping a group could open files closed to it;
//   - with ranges of /etc/subuid and /etc/subgid the set-user-ID tools
//     newuidmap and newgidmap write the maps, the caller's id in its place
//     and the ranges around it.

// idExtent maps Count ids starting at Outside to those starting at Inside.
type idExtent struct{ Inside, Outside, Count uint32 }

// ids are CMD's own ids, as seen inside.
type ids struct{ uid, gid uint32 }

type idMaps struct {
	uid, gid []idExtent
	single   bool // one id each, written without privileges
	tools    bool // written by newuidmap and newgidmap
	insideID ids
}

// maxExtents is the kernel's UID_GID_MAP_MAX_EXTENTS.
const maxExtents = 340

func PlanMaps(mode UserMode, subIDs bool) (*idMaps, []string, error) {
	euid, egid := uint32(os.Geteuid()), uint32(os.Getegid())
	m := &idMaps{}
	if euid == 0 && HasCaps(unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETFCAP) {
		var err error
		if m.uid, err = OwnMap("/proc/self/uid_map"); err != nil {
			return nil, nil, err
		}
		if m.gid, err = OwnMap("/proc/self/gid_map"); err != nil {
			return nil, nil, err
		}
		m.insideID.gid = egid
		return m, nil, nil
	}
	m.insideID.uid, m.insideID.gid = euid, egid
	if mode == MapRoot {
		m.insideID.uid, m.insideID.gid = 0, 0
	}
	if subIDs {
		uids, gids, why := subordinate(euid)
		if why == "" {
			m.tools = true
			m.uid = surround(m.insideID.uid, euid, uids)
			m.gid = surround(m.insideID.gid, egid, gids)
			return m, nil, nil
		}
		return m.mapOne(euid, egid), []string{"only the caller's own id is mapped: " + why}, nil
	}
	return m.mapOne(euid, egid), nil, nil
}

func (m *idMaps) mapOne(euid, egid uint32) *idMaps {
	m.single = true
	m.uid = []idExtent{{m.insideID.uid, euid, 1}}
	m.gid = []idExtent{{m.insideID.gid, egid, 1}}
	return m
}

// PingGroups returns the value of net.ipv4.ping_group_range that lets everyone inside ping. Both
// ends must be mapped ids.
func (m *idMaps) PingGroups() string {
	for _, e := range m.gid {
		if g := m.insideID.gid; e.Inside <= g && g-e.Inside < e.Count {
			return fmt.Sprintf("%d %d", e.Inside, min(e.Inside+(e.Count-1), math.MaxInt32))
		}
	}
	return fmt.Sprintf("%d %d", m.insideID.gid, m.insideID.gid)
}

// surround maps the caller's id to inside, and the subordinate ranges to the ids from 0 upwards
// around it.
func surround(inside, caller uint32, ranges []idExtent) []idExtent {
	out := []idExtent{{inside, caller, 1}}
	next := uint32(0)
	if inside == 0 {
		next = 1
	}
	for _, r := range ranges {
		for from, left := r.Outside, r.Count; left > 0 && len(out) < maxExtents; {
			if next == inside {
				next++
			}
			n := min(left, math.MaxUint32-next)
			if next < inside {
				n = min(n, inside-next)
			}
			if n == 0 {
				return out
			}
			out = append(out, idExtent{next, from, n})
			next, from, left = next+n, from+n, left-n
		}
	}
	return out
}

// subordinate returns the caller's ranges, or the reason why they cannot be used.
func subordinate(uid uint32) (uids, gids []idExtent, why string) {
	for _, tool := range []string{"newuidmap", "newgidmap"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, nil, tool + " is not installed (Debian: uidmap, Fedora: shadow-utils)"
		}
	}
	name := ""
	if u, err := user.LookupId(strconv.Itoa(int(uid))); err == nil {
		name = u.Username
	}
	for _, f := range []struct {
		path string
		to   *[]idExtent
	}{{"/etc/subuid", &uids}, {"/etc/subgid", &gids}} {
		b, err := os.ReadFile(f.path)
		if err != nil {
			return nil, nil, err.Error()
		}
		if *f.to = parseSubIDs(b, name, uid); len(*f.to) == 0 {
			return nil, nil, fmt.Sprintf("%s grants uid %d no range (a line such as %q does)", f.path, uid, fmt.Sprintf("%d:100000:65536", uid))
		}
	}
	return uids, gids, ""
}

// parseSubIDs parses subuid(5): name or uid, first id, count.
func parseSubIDs(b []byte, name string, uid uint32) []idExtent {
	var out []idExtent
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		f := strings.Split(strings.TrimSpace(sc.Text()), ":")
		if len(f) != 3 || (f[0] != strconv.Itoa(int(uid)) && (name == "" || f[0] != name)) {
			continue
		}
		first, err1 := strconv.ParseUint(f[1], 10, 32)
		count, err2 := strconv.ParseUint(f[2], 10, 32)
		if err1 != nil || err2 != nil || count == 0 || first+count > math.MaxUint32 {
			continue
		}
		out = append(out, idExtent{0, uint32(first), uint32(count)})
	}
	return out
}

// OwnMap returns the identity map of every id in this process's namespace.
func OwnMap(path string) ([]idExtent, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the id map: %w", err)
	}
	var out []idExtent
	for line := range strings.Lines(string(b)) {
		var e idExtent
		if _, err := fmt.Sscan(line, &e.Inside, &e.Outside, &e.Count); err != nil {
			return nil, fmt.Errorf("reading the id map %s: %q: %w", path, line, err)
		}
		out = append(out, idExtent{e.Inside, e.Inside, e.Count})
	}
	return out, nil
}

func (m *idMaps) Write(pid int) error {
	if m.tools {
		if err := runMapTool("newuidmap", pid, m.uid); err != nil {
			return err
		}
		return runMapTool("newgidmap", pid, m.gid)
	}
	if m.single {
		err := os.WriteFile(fmt.Sprintf("/proc/%d/setgroups", pid), []byte("deny"), 0)
		if err != nil {
			return err
		}
	}
	for name, extents := range map[string][]idExtent{"uid_map": m.uid, "gid_map": m.gid} {
		var text strings.Builder
		for _, e := range extents {
			fmt.Fprintf(&text, "%d %d %d\n", e.Inside, e.Outside, e.Count)
		}
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s", pid, name), []byte(text.String()), 0); err != nil {
			return err
		}
	}
	return nil
}

func runMapTool(tool string, pid int, extents []idExtent) error {
	args := []string{strconv.Itoa(pid)}
	for _, e := range extents {
		for _, v := range []uint32{e.Inside, e.Outside, e.Count} {
			args = append(args, strconv.FormatUint(uint64(v), 10))
		}
	}
	out, err := exec.Command(tool, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", tool, err, bytes.TrimSpace(out))
	}
	return nil
}

// HasCaps reports whether all these capabilities are effective in this process.
func HasCaps(caps ...int) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return !slices.ContainsFunc(caps, func(c int) bool {
		return data[c/32].Effective&(1<<(c%32)) == 0
	})
}
