package host

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// CgroupMemory returns the smallest memory limit of the caller's cgroups, v2 or v1, or 0 if there
// is none. The worker has no file system, so it is told the result. It sets its soft limit below
// it, so that it collects garbage rather than dies, and the marks of its budget
// (worker/workermemory.go).
func CgroupMemory() int64 {
	return CgroupMemoryAt("/proc/self/mountinfo", "/proc/self/cgroup")
}

func CgroupMemoryAt(mountinfo, cgroups string) int64 {
	groups := cgroupPaths(cgroups)
	f, err := os.Open(mountinfo)
	if err != nil {
		return 0
	}
	defer f.Close()
	smallest := int64(0)
	for s := bufio.NewScanner(f); s.Scan(); {
		mount, kind, isMemory := cgroupMount(s.Text())
		if !isMemory {
			continue
		}
		file := map[string]string{"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}[kind]
		// The limit of any ancestor applies too. Inside a container the mount may show our own
		// group as its root: then the joined path does not exist, and the root itself is read.
		for dir := filepath.Clean("/" + groups[kind]); ; dir = filepath.Dir(dir) {
			if n := readLimit(filepath.Join(mount, dir, file)); n > 0 && (smallest == 0 || n < smallest) {
				smallest = n
			}
			if dir == "/" {
				break
			}
		}
	}
	return smallest
}

// cgroupPaths reads /proc/PID/cgroup and returns the memory group's path by kind of mount.
func cgroupPaths(file string) map[string]string {
	out := make(map[string]string)
	b, err := os.ReadFile(file)
	if err != nil {
		return out
	}
	for line := range strings.Lines(string(b)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		if parts[0] == "0" && parts[1] == "" {
			out["cgroup2"] = parts[2]
		}
		for _, c := range strings.Split(parts[1], ",") {
			if c == "memory" {
				out["cgroup"] = parts[2]
			}
		}
	}
	return out
}

// cgroupMount parses one line of mountinfo: "… mountpoint … - type source options".
func cgroupMount(line string) (mount, kind string, isMemory bool) {
	before, after, ok := strings.Cut(line, " - ")
	b, a := strings.Fields(before), strings.Fields(after)
	if !ok || len(b) < 5 || len(a) < 3 {
		return "", "", false
	}
	switch a[0] {
	case "cgroup2":
		return b[4], a[0], true
	case "cgroup":
		for _, o := range strings.Split(a[2], ",") {
			if o == "memory" {
				return b[4], a[0], true
			}
		}
	}
	return "", "", false
}

// readLimit reads a limit in bytes; "max" and v1's huge number mean no limit.
func readLimit(file string) int64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil || n <= 0 || n >= 1<<50 {
		return 0
	}
	return n
}
