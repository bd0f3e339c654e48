package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// needed are the programs of the machine that a cluster consists of, with their Debian packages.
var needed = []struct{ program, pkg string }{
	{"bash", "bash"},
	{"busybox", "busybox"},
	{"conntrack", "conntrack"},
	{"containerd", "containerd"},
	{"containerd-shim-runc-v2", "containerd"},
	{"ctr", "containerd"},
	{"curl", "curl"},
	{"dash", "dash"},
	{"dig", "bind9-dnsutils"},
	{"getent", "libc-bin"},
	{"ip", "iproute2"},
	{"iptables", "iptables"},
	{"ldd", "libc-bin"},
	{"nc.openbsd", "netcat-openbsd"},
	{"nft", "nftables"},
	{"nsenter", "util-linux"},
	{"ps", "procps"},
	{"runc", "runc"},
	{"ss", "iproute2"},
}

// Needs reports what the machine lacks for a cluster, or nil.
func Needs() error {
	var packages []string
	for _, n := range needed {
		if _, err := exec.LookPath(n.program); err != nil && !slices.Contains(packages, n.pkg) {
			packages = append(packages, n.pkg)
		}
	}
	var lacks []string
	if os.Getuid() != 0 {
		lacks = append(lacks, "nodes are made of namespaces: run it as root")
	}
	if len(packages) > 0 {
		lacks = append(lacks, "not installed: apt-get install --no-install-recommends "+strings.Join(packages, " "))
	}
	if hierarchies, _ := cgroupHierarchies(); len(hierarchies) < 2 {
		lacks = append(lacks, "no hierarchy of cgroup version 1 is mounted below /sys/fs/cgroup: the nodes' cgroups are made in those (boot with systemd.unified_cgroup_hierarchy=0)")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		lacks = append(lacks, "no /dev/net/tun: modprobe tun")
	}
	if len(lacks) > 0 {
		return fmt.Errorf("this machine cannot run a cluster:\n  %s", strings.Join(lacks, "\n  "))
	}
	return nil
}

// cgroupHierarchies returns the directories in which the machine's cgroup hierarchies are mounted.
func cgroupHierarchies() ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var dirs []string
	for line := range strings.Lines(string(text)) {
		left, right, _ := strings.Cut(line, " - cgroup")
		if f := strings.Fields(left); right != "" && len(f) > 4 && filepath.Dir(f[4]) == cgroupRoot {
			dirs = append(dirs, f[4])
		}
	}
	return dirs, nil
}

const cgroupRoot = "/sys/fs/cgroup"
