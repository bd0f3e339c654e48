// Command pid1 is the first process of a node, and of a pod's sandbox.
//
//	pid1                        reaps children; ends on SIGTERM or SIGINT
//	pid1 node NAME DIR CGROUP…  makes the namespaces that it was started in a node's, then does the same
//	pid1 join CGROUP… -- ARGV…  executes ARGV in the cgroups
//
// A node has its own mount, network, PID, UTS, IPC and cgroup namespaces, but the machine's root
// file system. What containerd, a kubelet and CNI plugins write below it lies in DIR. A node ends
// with its pid1: the kernel then kills all its processes and removes its mounts and links.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// own are the directories that a node does not share with the machine.
var own = []string{"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/log/pods", "/var/log/containers", "/etc/cni", "/opt/cni"}

func init() {
	// Namespaces belong to a thread, and exec keeps those of its caller.
	runtime.LockOSThread()
}

func main() {
	err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "pid1: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 0:
		reap()
		return nil
	case args[0] == "node" && len(args) >= 3:
		return node(args[1], args[2], args[3:])
	case args[0] == "join":
		i := slices.Index(args, "--")
		if i < 0 || i+1 == len(args) {
			return errors.New("usage: join CGROUP... -- ARGV")
		}
		if err := join(args[1:i]); err != nil {
			return err
		}
		return execute(args[i+1:])
	}
	return fmt.Errorf("unknown arguments %q", args)
}

func reap() {
	c := make(chan os.Signal, 8)
	signal.Notify(c, unix.SIGTERM, unix.SIGINT, unix.SIGCHLD)
	for {
		for {
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
		if s := <-c; s != unix.SIGCHLD {
			return
		}
	}
}

func join(cgroups []string) error {
	for _, dir := range cgroups {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
	}
	return nil
}

func execute(argv []string) error {
	path := argv[0]
	if !strings.Contains(path, "/") {
		for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
			if candidate := filepath.Join(dir, argv[0]); unix.Access(candidate, unix.X_OK) == nil {
				path = candidate
				break
			}
		}
	}
	return fmt.Errorf("executing %s: %w", path, unix.Exec(path, argv, os.Environ()))
}

// node waits on standard input for the word that its parent has recorded it, and writes a
// word to standard output when it is ready. If the parent dies before, so does the node.
func node(name, dir string, cgroups []string) error {
	var word [1]byte
	if n, _ := os.Stdin.Read(word[:]); n != 1 {
		return errors.New("the parent has gone")
	}
	if err := join(cgroups); err != nil {
		return err
	}
	// The cgroups joined become the roots of the node's view.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("making a cgroup namespace: %w", err)
	}
	hierarchies, err := hierarchies()
	if err != nil {
		return err
	}
	if err := mounts(dir, hierarchies); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	for _, sysctl := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/"+sysctl, []byte("1"), 0); err != nil {
			return err
		}
	}
	if _, err := os.Stdout.WriteString("ready\n"); err != nil {
		return err
	}
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	return execute([]string{self})
}

// mounts makes the node's file system.
func mounts(dir string, hierarchies []hierarchy) error {
	all := []mount{
		{target: "/", flags: unix.MS_REC | unix.MS_PRIVATE},
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
	}
	if len(hierarchies) > 1 {
		all = append(all, mount{"cgroups", "/sys/fs/cgroup", "tmpfs", 0, "mode=755"})
	}
	for _, h := range hierarchies {
		all = append(all, mount{h.kind, h.target, h.kind, 0, h.options})
	}
	all = append(all, mount{"run", "/run", "tmpfs", 0, "mode=755"})
	for _, path := range own {
		all = append(all, mount{filepath.Join(dir, path), path, "", unix.MS_BIND, ""})
	}
	all = append(all, mount{target: "/", flags: unix.MS_REC | unix.MS_SHARED})
	for _, m := range all {
		if err := m.make(); err != nil {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	for _, path := range []string{"/run/netns", "/run/lock", "/opt/cni/bin", "/etc/cni/net.d"} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
	}
	return nil
}

type mount struct {
	source, target, kind string
	flags                uintptr
	options              string
}

func (m mount) make() error {
	if m.flags&unix.MS_BIND != 0 {
		if err := os.MkdirAll(m.source, 0o755); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	return unix.Mount(m.source, m.target, m.kind, m.flags, m.options)
}

// hierarchy is one of the machine's cgroup hierarchies: each controller of version 1, and version 2.
type hierarchy struct{ kind, target, options string }

// hierarchies reads them from the machine's mounts, before the node has its own.
func hierarchies() ([]hierarchy, error) {
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseHierarchies(string(text)), nil
}

// parseHierarchies reads mountinfo, as proc_pid_mountinfo(5) describes it.
func parseHierarchies(mountinfo string) []hierarchy {
	var all []hierarchy
	for line := range strings.Lines(mountinfo) {
		left, right, _ := strings.Cut(line, " - ")
		place, super := strings.Fields(left), strings.Fields(right)
		if len(place) < 5 || len(super) < 3 || !strings.HasPrefix(place[4], "/sys/fs/cgroup") {
			continue
		}
		switch super[0] {
		case "cgroup":
			// What is no controller and no name belongs to the whole hierarchy, which is mounted already.
			options := slices.DeleteFunc(strings.Split(super[2], ","), func(o string) bool {
				return o == "rw" || o == "ro" || o == "xattr" || o == "clone_children" || strings.HasPrefix(o, "release_agent")
			})
			all = append(all, hierarchy{"cgroup", place[4], strings.Join(options, ",")})
		case "cgroup2":
			all = append(all, hierarchy{kind: "cgroup2", target: place[4]})
		}
	}
	return all
}
