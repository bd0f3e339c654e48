package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The monitor's cgroup. The runtime starts us in its own cgroup, and a service manager that
// restarts the runtime kills everything in it. If the pod's cgroup is known, the monitor and its
// worker move there and are charged to the pod; if not, they move to a cgroup of Sluice's own in
// the hierarchies that service managers use.

// ownCgroup is the cgroup of monitors whose pod's is unknown, and the one made inside a pod's where
// cgroup v2 allows processes only in leaves.
const ownCgroup = "sluice"

// hierarchy is a mounted cgroup hierarchy and our place in it.
type hierarchy struct {
	mount       string
	controllers string // as listed in /proc/self/cgroup; "" is v2
	self        string
}

// cgroupDirs returns where to move a monitor, and makes missing directories. podPath is the
// capability cgroupPath.
func cgroupDirs(podPath string) ([]string, error) {
	list, err := hierarchies("/proc/self/mountinfo", "/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	podPath, err = expandSlice(podPath)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, h := range list {
		dir, err := h.target(podPath)
		if err != nil {
			return nil, fmt.Errorf("make a cgroup for the monitor: %w", err)
		}
		if dir != "" {
			out = append(out, dir)
		}
	}
	return out, nil
}

// target returns the directory to move to in one hierarchy; "" means stay.
func (h hierarchy) target(podPath string) (string, error) {
	v2 := h.controllers == ""
	if podPath != "" {
		dir := filepath.Join(h.mount, podPath)
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
			if v2 {
				return mkdir(filepath.Join(dir, ownCgroup))
			}
			return dir, nil
		}
	}
	if !v2 && h.controllers != "name=systemd" || h.self == "/" {
		return "", nil
	}
	return mkdir(filepath.Join(h.mount, ownCgroup))
}

// mkdir makes a cgroup. Where the hierarchy is not ours to change, as inside a container, there is
// no service manager to escape from either.
func mkdir(dir string) (string, error) {
	err := os.Mkdir(dir, 0o755)
	switch {
	case err == nil, errors.Is(err, fs.ErrExist):
		return dir, nil
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission), errors.Is(err, fs.ErrNotExist):
		return "", nil
	}
	return "", err
}

// removeCgroups removes what cgroupDirs made, if it is empty: a monitor that is just ending may
// still be in it. A cgroup inside a pod's is removed with the pod's; the other is there only once.
func removeCgroups(dirs []string) {
	for _, dir := range dirs {
		if filepath.Base(dir) == ownCgroup {
			_ = os.Remove(dir)
		}
	}
}

// expandSlice expands a systemd slice's name to its path: a-b.slice is in a.slice.
func expandSlice(path string) (string, error) {
	clean := filepath.Clean("/" + path)
	name, isSlice := strings.CutSuffix(clean, ".slice")
	if path == "" || !isSlice || strings.Count(clean, "/") > 1 {
		if path == "" {
			return "", nil
		}
		return clean, nil
	}
	out, prefix := "", ""
	for _, part := range strings.Split(strings.TrimPrefix(name, "/"), "-") {
		if part == "" {
			return "", fmt.Errorf("the cgroup path %q is no name of a slice", path)
		}
		prefix += part
		out += "/" + prefix + ".slice"
		prefix += "-"
	}
	return out, nil
}

// hierarchies pairs mounts with our place in them.
func hierarchies(mountinfo, cgroup string) ([]hierarchy, error) {
	self, err := os.ReadFile(cgroup)
	if err != nil {
		return nil, fmt.Errorf("read our cgroups: %w", err)
	}
	places := make(map[string]string)
	for line := range strings.Lines(string(self)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) == 3 {
			places[parts[1]] = parts[2]
		}
	}
	mounts, err := os.ReadFile(mountinfo)
	if err != nil {
		return nil, fmt.Errorf("read the mounts: %w", err)
	}
	var out []hierarchy
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if len(left) < 5 || len(right) < 3 || left[3] != "/" {
			continue
		}
		switch right[0] {
		case "cgroup2":
			if self, ok := places[""]; ok {
				out = append(out, hierarchy{left[4], "", self})
			}
		case "cgroup":
			for controllers, self := range places {
				if controllers != "" && hasOptions(right[2], controllers) {
					out = append(out, hierarchy{left[4], controllers, self})
				}
			}
		}
	}
	return out, nil
}

// hasOptions reports whether a mount's options name all the controllers.
func hasOptions(options, controllers string) bool {
	have := "," + options + ","
	for _, c := range strings.Split(controllers, ",") {
		if !strings.Contains(have, ","+c+",") {
			return false
		}
	}
	return true
}
