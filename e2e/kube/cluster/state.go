package cluster

// What a cluster has on the machine is in its state file before it exists, so that a later
// process can remove it. A process is known by its number and its start time.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// state is the content of the state file.
type state struct {
	path string

	// First processes of the namespaces, in the order of their start.
	Processes []process `json:"processes"`
	Cgroups   []string  `json:"cgroups"`
	// Sysctls are the values to put back.
	Sysctls map[string]string `json:"sysctls"`
}

type process struct {
	PID   int    `json:"pid"`
	Start string `json:"start"`
}

// sysctls are those of the whole machine that kubelets set, or that many of them need.
var sysctls = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	"fs/inotify/max_user_instances", "fs/inotify/max_user_watches",
}

func readState(path string) (*state, error) {
	s := &state{path: path}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return s, nil
}

func (s *state) write() error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(s.path+".new", s.path)
}

// addProcess records a process that waits to be recorded.
func (s *state) addProcess(pid int) error {
	start, ok := startTime(pid)
	if !ok {
		return fmt.Errorf("process %d has ended", pid)
	}
	s.Processes = append(s.Processes, process{pid, start})
	return s.write()
}

// keepSysctls records the machine's values, then sets those that a cluster needs larger.
func (s *state) keepSysctls() error {
	s.Sysctls = make(map[string]string)
	for _, name := range sysctls {
		if value, err := os.ReadFile("/proc/sys/" + name); err == nil {
			s.Sysctls[name] = strings.TrimSpace(string(value))
		}
	}
	if err := s.write(); err != nil {
		return err
	}
	for name, least := range map[string]int{"fs/inotify/max_user_instances": 1024, "fs/inotify/max_user_watches": 524288} {
		if now, err := strconv.Atoi(s.Sysctls[name]); err == nil && now < least {
			if err := os.WriteFile("/proc/sys/"+name, []byte(strconv.Itoa(least)), 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// clear removes all that is recorded, and then the record. It may be repeated.
func (s *state) clear() error {
	var failed error
	for _, p := range slices.Backward(s.Processes) {
		failed = errors.Join(failed, p.kill())
	}
	for _, dir := range s.Cgroups {
		failed = errors.Join(failed, removeCgroup(dir))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Sysctls)) {
		path := "/proc/sys/" + name
		if now, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(now)) != s.Sysctls[name] {
			failed = errors.Join(failed, os.WriteFile(path, []byte(s.Sysctls[name]), 0))
		}
	}
	if failed != nil {
		return failed
	}
	s.Processes, s.Cgroups, s.Sysctls = nil, nil, nil
	if err := os.Remove(s.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// startTime returns field 22 of proc_pid_stat(5); false if there is no such process, or
// only its exit status is left.
func startTime(pid int) (start string, lives bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", false
	}
	// The name, field 2, is in parentheses and may hold anything.
	f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return "", false
	}
	return f[19], true
}

func (p process) lives() bool {
	start, ok := startTime(p.PID)
	return ok && start == p.Start
}

// kill returns when the process has ended. A PID namespace's first process ends after all others of it.
func (p process) kill() error {
	if !p.lives() {
		return nil
	}
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return until(20*time.Second, func() error {
		if p.lives() {
			return fmt.Errorf("process %d does not end", p.PID)
		}
		return nil
	})
}

// removeCgroup removes a cgroup with those below it. Processes that were killed leave them late.
func removeCgroup(dir string) error {
	return until(10*time.Second, func() error {
		var below []string
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && d.IsDir() {
				below = append(below, path)
			}
			return err
		})
		for _, path := range slices.Backward(below) {
			if removed := os.Remove(path); !errors.Is(removed, fs.ErrNotExist) {
				err = errors.Join(err, removed)
			}
		}
		return err
	})
}

// until repeats ok while it fails, and returns its last error at the deadline. It is for
// states that no event tells of.
func until(limit time.Duration, ok func() error) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(100 * time.Millisecond) {
		err := ok()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}
