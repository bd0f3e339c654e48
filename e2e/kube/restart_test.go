package kube

// containerd and the kubelets are restarted under pods whose connections go on.

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"sluice.dev/sluice/e2e/kube/cluster"
)

func (s *suite) restarts(t *testing.T) {
	processes, containers := s.processes(t), s.containers(t)
	before := make(map[string]int)
	for _, f := range families {
		before[f.held] = s.heldLines(t, f)
	}
	for _, n := range s.Nodes() {
		for _, daemon := range []string{cluster.Containerd, cluster.Kubelet} {
			if err := n.Restart(s.ctx, daemon); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Run("the kubelets answer", func(t *testing.T) {
		eventually(t, func() error {
			for _, n := range s.Nodes() {
				if _, err := try(s.Command(s.ctx, "kubectl", "get", "--raw", "/api/v1/nodes/"+n.Name()+"/proxy/healthz")); err != nil {
					return err
				}
			}
			for _, pod := range []string{"held-server", "held-client"} {
				if _, err := try(s.Command(s.ctx, "kubectl", "exec", pod, "-c", "v4", "--", "true")); err != nil {
					return err
				}
			}
			return nil
		})
	})
	t.Run("the nodes are ready", func(t *testing.T) {
		s.kubectl(t, "wait", "--for=condition=Ready", "node", "--all", "--timeout=60s")
	})
	t.Run("monitors and workers are the same", func(t *testing.T) { same(t, processes, s.processes(t)) })
	t.Run("containers are the same", func(t *testing.T) { same(t, containers, s.containers(t)) })
	for _, f := range families {
		t.Run("an open connection goes on, "+f.name, func(t *testing.T) { s.goesOn(t, f, before[f.held]) })
	}
	t.Run("a policy by name on one pod", s.namesStillHold)
}

func (s *suite) afterRestarts(t *testing.T) {
	t.Run("every pod is attached", s.everyPodAttached)
	for _, f := range families {
		t.Run("an open connection goes on, "+f.name, func(t *testing.T) { s.goesOn(t, f, s.heldLines(t, f)) })
	}
}

func (s *suite) namesStillHold(t *testing.T) { s.namerAsks(t, "after the restarts") }

// processes are the monitors and workers of all nodes.
func (s *suite) processes(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, n := range s.Nodes() {
		list, err := s.sandboxes(n)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range list {
			all = append(all, fmt.Sprintf("%s %s monitor %d worker %d restarts %d", n.Name(), b.pod(), b.PID, b.WorkerPID, b.Restarts))
		}
	}
	slices.Sort(all)
	return all
}

// containers are those of all pods, which a restarted runtime must leave alone.
func (s *suite) containers(t *testing.T) []string {
	t.Helper()
	list, err := s.podList()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, p := range list.Items {
		for _, c := range p.Status.ContainerStatuses {
			all = append(all, fmt.Sprintf("%s/%s %s %s restarts %d", p.Metadata.Namespace, p.Metadata.Name, p.Metadata.UID, c.ContainerID, c.RestartCount))
		}
	}
	slices.Sort(all)
	return all
}

func same(t *testing.T, before, after []string) {
	t.Helper()
	if len(before) == 0 || !slices.Equal(before, after) {
		t.Errorf("before\n  %s\nafter\n  %s", strings.Join(before, "\n  "), strings.Join(after, "\n  "))
	}
}

// heldLines is how many lines have come by the connection that was opened first. Each must have
// come once and in its order.
func (s *suite) heldLines(t *testing.T, f family) int {
	t.Helper()
	n, err := s.countLines(f)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (s *suite) countLines(f family) (int, error) {
	out, err := try(s.Command(s.ctx, "kubectl", "exec", "held-server", "-c", f.held, "--", "awk", "$1 != NR - 1 {exit 1} END {print NR}", "/tmp/lines"))
	if err != nil {
		return 0, fmt.Errorf("lines are missing: %w", err)
	}
	return strconv.Atoi(out)
}

// goesOn waits for lines beyond the first ones.
func (s *suite) goesOn(t *testing.T, f family, first int) {
	eventually(t, func() error {
		n, err := s.countLines(f)
		if err == nil && n <= first {
			err = fmt.Errorf("no line has come after the first %d", first)
		}
		return err
	})
}

// The runtime's STATUS finds a monitor that was killed. The pod has no network until then, and
// the same address afterwards.
func (s *suite) replaced(t *testing.T) {
	n := s.Nodes()[0]
	list := decode[struct{ CNIVersion string }](t, s.on(t, n, "cat", cluster.Conflist))
	if list.CNIVersion != "1.1.0" {
		t.Skip("containerd 1 does not call STATUS")
	}
	before := s.sandboxOf(t, n, "web")
	s.on(t, n, "kill", "-9", strconv.Itoa(before.PID))
	url := "http://" + s.addressesOf(t, "web").four + ":8080/hostname"
	eventually(t, func() error {
		_, err := try(s.Nodes()[1].Command(s.ctx, get(url)...))
		return err
	})
	if after := s.sandboxOf(t, n, "web"); after.PID == before.PID {
		t.Errorf("monitor %d was not killed", before.PID)
	}
}
