package main

// What /proc says about a candidate's processes.

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// usage is what a process has consumed so far.
type usage struct {
	cpu      int64 // nanoseconds on a processor, all threads
	switches int64 // voluntary and involuntary, all threads
}

type memory struct{ rss, private int64 } // bytes

func procUsage(pid int) (u usage, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(tasks) == 0 {
		return u, errors.Join(err, fmt.Errorf("process %d is gone", pid))
	}
	for _, t := range tasks {
		sched, err1 := os.ReadFile(t + "/schedstat")
		status, err2 := os.ReadFile(t + "/status")
		if errors.Is(errors.Join(err1, err2), os.ErrNotExist) {
			continue // a thread that ended
		}
		if err := errors.Join(err1, err2); err != nil {
			return u, err
		}
		if f := strings.Fields(string(sched)); len(f) > 0 {
			n, _ := strconv.ParseInt(f[0], 10, 64)
			u.cpu += n
		}
		s := string(status)
		u.switches += field(s, "voluntary_ctxt_switches:") + field(s, "nonvoluntary_ctxt_switches:")
	}
	return u, nil
}

// procMemory needs the right to trace the process. The run has it as the parent of its namespaces
// or as root.
func procMemory(pid int) (memory, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return memory{}, err
	}
	s := string(b)
	return memory{
		rss:     field(s, "Rss:") << 10,
		private: (field(s, "Private_Clean:") + field(s, "Private_Dirty:")) << 10,
	}, nil
}

// field returns the number after a key at the start of a line.
func field(s, key string) int64 {
	for line := range strings.Lines(s) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			if f := strings.Fields(rest); len(f) > 0 {
				n, _ := strconv.ParseInt(f[0], 10, 64)
				return n
			}
		}
	}
	return 0
}

type procEntry struct {
	pid, parent int
	args        []string
}

// tree returns a process and all its descendants, parents first.
func tree(root int) ([]procEntry, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	children := map[int][]procEntry{}
	var out []procEntry
	for _, d := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(d))
		status, err1 := os.ReadFile(d + "/status")
		cmdline, err2 := os.ReadFile(d + "/cmdline")
		if errors.Join(err1, err2) != nil {
			continue // ended meanwhile
		}
		p := procEntry{pid: pid, parent: int(field(string(status), "PPid:")), args: strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")}
		if pid == root {
			out = append(out, p)
		}
		children[p.parent] = append(children[p.parent], p)
	}
	for i := 0; i < len(out); i++ {
		out = append(out, children[out[i].pid]...)
	}
	return out, nil
}

// parts returns a candidate's own processes: all except the agent. sluice's worker is the process
// started as such; a peer's is its only process.
func (i *instance) parts() (all []int, worker int, err error) {
	root := i.cmd.Process.Pid
	if i.helper != 0 {
		root = i.helper
	}
	procs, err := tree(root)
	if err != nil {
		return nil, 0, err
	}
	for _, p := range procs {
		if len(p.args) > 1 && filepath.Base(p.args[0]) == "bench" {
			continue
		}
		all = append(all, p.pid)
		if len(p.args) > 1 && p.args[1] == "worker" {
			worker = p.pid
		}
	}
	if len(all) == 0 {
		return nil, 0, errors.New("no process of its own was found")
	}
	if worker == 0 {
		worker = all[0]
	}
	return all, worker, nil
}
