package kube

// The ways in which a cluster uses its pods' network. The pods of these checks come and go; a
// watch sees that each was attached meanwhile.

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice.dev/sluice/e2e/kube/cluster"
)

//go:embed cluster_test.yaml
var clusterPods string

func (s *suite) clusterWays(t *testing.T) {
	s.watch(t)
	t.Cleanup(func() { s.deleteClusterPods(t) }) // before the watch is asked
	manifest := strings.NewReplacer("IMAGE", cluster.AgnhostImage, "NODE2", s.Nodes()[1].Name(), "NODE1", s.Nodes()[0].Name()).Replace(clusterPods)
	s.apply(t, manifest)
	t.Run("pods become ready", func(t *testing.T) {
		s.kubectl(t, "wait", "--for=condition=Ready", "pod/srv", "pod/cli", "pod/privileged", "--timeout=60s")
	})
	if t.Failed() {
		t.FailNow()
	}
	s.addressesOf(t, "cli")
	srv := s.addressesOf(t, "srv")
	services := strings.Fields(s.kubectl(t, "get", "service", "srv", "-o", "jsonpath={.spec.clusterIPs[*]}"))
	if len(services) != 2 {
		t.Fatalf("the service has the addresses %q", services)
	}
	n1, n2 := s.Nodes()[0], s.Nodes()[1]
	here := func(argv ...string) *exec.Cmd { return s.Command(s.ctx, argv...) }
	cli := func(argv ...string) *exec.Cmd { return s.in("cli", argv...) }
	second := func(argv ...string) *exec.Cmd { return n2.Command(s.ctx, argv...) }
	const hostname = "/hostname"
	for _, c := range []struct {
		name, want string
		cmd        *exec.Cmd
	}{
		{"a pod asks a pod, IPv4", "^srv$", cli(get("http://" + srv.four + ":8080" + hostname)...)},
		{"a pod asks a pod, IPv6", "^srv$", cli(get("http://[" + srv.six + "]:8080" + hostname)...)},
		{"a pod's address is a pod's", `^10\.244\.`, cli(get("http://" + srv.four + ":8080/clientip")...)},
		{"a pod asks a service, IPv4", "^srv$", cli(get("http://" + services[0] + hostname)...)},
		{"a pod asks a service, IPv6", "^srv$", cli(get("http://[" + services[1] + "]" + hostname)...)},
		{"a pod asks a service, UDP", "", cli("/agnhost", "connect", "--protocol", "udp", "--timeout", "3s", services[0]+":81")},
		{"a pod asks a service by name", "^srv$", cli(get("http://srv" + hostname)...)},
		{"DNS answers", "^" + regexp.QuoteMeta(services[0]) + "$", cli("dig", "+short", "+timeout=2", "srv.default.svc.cluster.local")},
		{"DNS answers in reverse", "srv.default.svc", cli("dig", "+short", "+timeout=2", "-x", services[0])},
		{"a pod asks the API server", "401|403|Unauthorized|Forbidden", cli(get("https://kubernetes.default/api", "-k")...)},
		{"a node's port from outside, IPv4", "^srv$", here(get("http://" + n1.IPv4() + ":30080" + hostname)...)},
		{"a node's port from outside, IPv6", "^srv$", here(get("http://[" + n1.IPv6() + "]:30080" + hostname)...)},
		{"the other node's port from outside", "^srv$", here(get("http://" + n2.IPv4() + ":30080" + hostname)...)},
		{"a host port from outside", "^srv$", here(get("http://" + n1.IPv4() + ":38080" + hostname)...)},
		{"a node asks a service", "^srv$", second(get("http://" + services[0] + hostname)...)},
		{"a node asks a pod", "^srv$", second(get("http://" + srv.four + ":8080" + hostname)...)},
		{"a pod asks itself by its service", "^srv$", s.in("srv", get("http://srv.default"+hostname)...)},
		{"logs", "Started HTTP server", here("kubectl", "logs", "srv")},
		{"exec", "uid=0", s.in("srv", "sh", "-c", "id")},
		{"a privileged pod has the node's network", "eth0", s.in("privileged", "ip", "-br", "link")},
		{"a NetworkPolicy is accepted", "deny-all", here("kubectl", "get", "networkpolicies")},
	} {
		t.Run(c.name, func(t *testing.T) {
			if out := output(t, c.cmd); !regexp.MustCompile(c.want).MatchString(out) {
				t.Errorf("%q does not match %q", out, c.want)
			}
		})
	}
	t.Run("port-forward", s.portForward)
	t.Run("a pod whose probes fail is restarted", func(t *testing.T) {
		eventually(t, func() error {
			status := s.kubectl(t, "get", "pod", "sick", "-o", "jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}")
			if !regexp.MustCompile("^[1-9][0-9]* false$").MatchString(status) {
				return fmt.Errorf("restarts and readiness: %s", status)
			}
			return nil
		})
	})
	t.Run("an address is free after its pod", func(t *testing.T) {
		lease := "/var/lib/cni/networks/main/" + srv.four
		s.on(t, n1, "ls", lease)
		s.kubectl(t, "delete", "pod", "srv", "--wait")
		eventually(t, func() error {
			if out, err := try(n1.Command(s.ctx, "ls", lease)); err == nil {
				return fmt.Errorf("%s is still there", out)
			}
			return nil
		})
	})
}

func (s *suite) deleteClusterPods(t *testing.T) {
	s.kubectl(t, "delete", "--ignore-not-found", "--wait", "pod/srv", "pod/cli", "pod/sick", "pod/privileged", "service/srv", "networkpolicy/deny-all")
}

// portForward asks the pod by a connection that the API server and the kubelet carry.
func (s *suite) portForward(t *testing.T) {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	cmd := s.Command(ctx, "kubectl", "port-forward", "pod/srv", ":8080")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	port := regexp.MustCompile(`127\.0\.0\.1:(\d+)`).FindStringSubmatch(line)
	if port == nil {
		cancel()
		cmd.Wait()
		t.Fatalf("it says %q, %v\n%s", line, err, said.String())
	}
	if answer := output(t, s.Command(s.ctx, get("http://127.0.0.1:"+port[1]+"/hostname")...)); answer != "srv" {
		t.Errorf("the answer is %q", answer)
	}
	cancel()
	io.Copy(io.Discard, out)
	cmd.Wait()
}

// watch collects which pods there are and which are attached.
type watch struct{ pods, attached map[string]bool }

// watch looks until the end of the test, which then fails for each pod that was never attached.
func (s *suite) watch(t *testing.T) {
	ctx, cancel := context.WithCancel(s.ctx)
	w := watch{make(map[string]bool), make(map[string]bool)}
	var looking sync.WaitGroup
	looking.Go(func() { // ends with ctx, which the cleanup ends
		for ctx.Err() == nil {
			if list, err := s.podList(); err == nil {
				for _, n := range s.Nodes() {
					for _, line := range list.podsOf(n.Name()) {
						w.pods[line] = true
					}
				}
			}
			for _, n := range s.Nodes() {
				lines, _ := s.attachedOn(n)
				for _, line := range lines {
					w.attached[line] = true
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		looking.Wait()
		for line := range w.pods {
			if !w.attached[line] {
				t.Errorf("never attached: %s", line)
			}
			for _, ip := range strings.Fields(line)[1:] {
				s.addresses[ip] = true
			}
		}
		if len(w.pods) < 3 {
			t.Errorf("the watch has seen only %v", slices.Sorted(maps.Keys(w.pods)))
		}
	})
}
