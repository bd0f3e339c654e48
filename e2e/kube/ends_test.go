package kube

// After the last pod nothing of any pod may be left on a node, and after the cluster no process.

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"sluice.dev/sluice/e2e/kube/cluster"
)

func (s *suite) ends(t *testing.T) {
	list, err := s.podList()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.Nodes() {
		for _, line := range list.podsOf(n.Name()) {
			for _, ip := range strings.Fields(line)[1:] {
				s.addresses[ip] = true
			}
		}
	}
	for _, n := range s.Nodes() {
		t.Run("what pods have is found on "+n.Name(), func(t *testing.T) { s.remains(t, n) })
	}
	t.Run("all pods are deleted", func(t *testing.T) {
		s.kubectl(t, "delete", "deployments,pods", "-A", "--all", "--wait")
		eventually(t, func() error {
			if left := s.kubectl(t, "get", "pods", "-A", "-o", "name"); left != "" {
				return errors.New(left)
			}
			return nil
		})
	})
	for _, n := range s.Nodes() {
		t.Run("nothing is left on "+n.Name(), func(t *testing.T) {
			eventually(t, func() error {
				left, err := s.left(n)
				if err == nil && len(left) > 0 {
					err = errors.New(strings.Join(left, "\n"))
				}
				return err
			})
		})
	}
	t.Run("no sandbox failed to start or to end", s.noFailures)
	for _, n := range s.Nodes() {
		t.Run("uninstall on "+n.Name(), func(t *testing.T) {
			s.on(t, n, s.plugin, "uninstall", "--conflist", cluster.Conflist)
			before := decode[any](t, s.conflists[n.Name()])
			if after := decode[any](t, s.on(t, n, "cat", cluster.Conflist)); !reflect.DeepEqual(before, after) {
				t.Errorf("the list before\n%v\nafter\n%v", before, after)
			}
		})
	}
}

// findLeft prints what pods have on a node, each with its kind. Its arguments are pods' addresses.
const findLeft = `
shopt -s nullglob
for f in /run/sluice/* /run/sluice-cni/*/* /run/netns/cni-* /var/lib/cni/results/* /var/lib/cni/networks/*/[0-9a-f]*[.:]*; do echo "file $f"; done
ip -o link | grep -v -e ': lo:' -e ': eth0@' | sed 's/^/device /'
grep -e sluice-cni -e /run/sluice -e /netns/cni- /proc/self/mountinfo | sed 's/^/mount /'
ps -eo pid,args | grep '[s]luice-cni' | sed 's/^/process /'
find /sys/fs/cgroup -type d \( -name 'pod*' -o -name '*-pod*' -o -name sluice \) | sed 's/^/cgroup /'
rules=$(nft list ruleset 2>/dev/null)
for a in sluice "$@"; do grep -wF -- "$a" <<<"$rules" | sed 's/^/rule /'; done
true`

func (s *suite) left(n *cluster.Node) ([]string, error) {
	// On standard input: on its command line the script would find itself.
	cmd := n.Command(s.ctx, append([]string{"bash", "-s", "--"}, slices.Sorted(maps.Keys(s.addresses))...)...)
	cmd.Stdin = strings.NewReader(findLeft)
	out, err := try(cmd)
	if err != nil || out == "" {
		return nil, err
	}
	return strings.Split(out, "\n"), nil
}

// While there are pods, left finds all kinds that there are to find.
func (s *suite) remains(t *testing.T, n *cluster.Node) {
	left, err := s.left(n)
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"file", "device", "mount", "process", "cgroup", "rule"} {
		if !slices.ContainsFunc(left, func(l string) bool { return strings.HasPrefix(l, kind+" ") }) {
			t.Errorf("no %s found in\n%s", kind, strings.Join(left, "\n"))
		}
	}
}

func (s *suite) noFailures(t *testing.T) {
	list := decode[struct {
		Items []struct {
			Reason, Message string
			InvolvedObject  struct{ Name string }
		}
	}](t, s.kubectl(t, "get", "events", "-A", "-o", "json"))
	if len(list.Items) == 0 {
		t.Error("there are no events at all")
	}
	for _, e := range list.Items {
		if e.Reason == "FailedCreatePodSandBox" || e.Reason == "FailedKillPod" {
			t.Errorf("%s: %s", e.InvolvedObject.Name, e.Message)
		}
	}
}

// noProcess: no process runs a binary that a node had, and no cgroup of the cluster is there.
func (s *suite) noProcess(t *testing.T) {
	if len(s.binaries) != len(s.Nodes()) {
		t.Fatalf("%d binaries are known", len(s.binaries))
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := os.Stat(filepath.Join("/proc", e.Name(), "exe"))
		if err != nil {
			continue // no process, or one of the kernel's
		}
		if slices.ContainsFunc(s.binaries, func(b os.FileInfo) bool { return os.SameFile(b, info) }) {
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%s/cmdline", e.Name()))
			t.Errorf("process %s runs: %q", e.Name(), line)
		}
	}
}
