package main

import (
	"reflect"
	"testing"
)

func TestHierarchiesAreReadFromMountinfo(t *testing.T) {
	const mountinfo = `30 24 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/systemd rw,relatime - cgroup none rw,xattr,release_agent=/lib/agent,name=systemd
33 30 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
34 24 0:30 / /elsewhere rw,relatime - cgroup2 cgroup2 rw
`
	want := []hierarchy{
		{"cgroup", "/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct"},
		{"cgroup", "/sys/fs/cgroup/systemd", "name=systemd"},
		{"cgroup2", "/sys/fs/cgroup/unified", ""},
	}
	if got := parseHierarchies(mountinfo); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestJoinNeedsACommand(t *testing.T) {
	for _, args := range [][]string{{"join"}, {"join", "--"}, {"elsewhere"}, {"node", "n1"}} {
		if err := run(args); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}
