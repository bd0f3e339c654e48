package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/e2e/kube/cluster"
	"sluice.dev/sluice/internal/testutil"
)

// suite is a cluster whose pods are behind Sluice, with what the checks remember.
type suite struct {
	*cluster.Cluster
	ctx            context.Context
	sluice, plugin string // the binaries
	// addresses that pods have had.
	addresses map[string]bool
	conflists map[string]string // each node's list before the plugin was installed
	binaries  []os.FileInfo     // of the plugin on each node
}

// TestKubernetes is the whole suite. The order is part of it.
func TestKubernetes(t *testing.T) {
	if os.Getenv("SLUICE_E2E_KUBE") == "" {
		t.Skip("it runs a Kubernetes, which takes minutes: make e2e-kube")
	}
	ctx, stop := signal.NotifyContext(t.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	t.Cleanup(stop)
	s := &suite{
		ctx: ctx, sluice: binary(t, "SLUICE_BIN"), plugin: binary(t, "SLUICE_CNI_BIN"),
		addresses: make(map[string]bool), conflists: make(map[string]string),
	}
	c, err := cluster.Up(ctx, cluster.Config{Source: ".", Dir: os.Getenv("SLUICE_KUBE_DIR"), Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	s.Cluster = c
	closed := false
	t.Cleanup(func() {
		if !closed {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	t.Log(s.kubectl(t, "get", "nodes", "-o", "wide"))

	s.install(t)
	s.makePods(t)
	t.Run("pods", s.pods)
	t.Run("policy", s.policies)
	t.Run("cluster", s.clusterWays)
	t.Run("costs", s.costs)
	t.Run("restarts", s.restarts)
	t.Run("cluster after the restarts", s.clusterWays)
	t.Run("after the restarts", s.afterRestarts)
	t.Run("a killed monitor is replaced", s.replaced)
	t.Run("ends", s.ends)
	t.Run("the cluster ends", func(t *testing.T) {
		closed = true
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		s.noProcess(t)
	})
}

// binary is one that `make build` has made.
func binary(t *testing.T, variable string) string {
	t.Helper()
	path, err := filepath.Abs(os.Getenv(variable))
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); os.Getenv(variable) == "" || err != nil || info.IsDir() {
		t.Fatalf("%s names no program: run `make e2e-kube`", variable)
	}
	return path
}

// output runs a command, which must succeed, and returns its standard output.
func output(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := try(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// try runs a command and returns its standard output. The error has what it said otherwise.
func try(cmd *exec.Cmd) (string, error) {
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w\n%s%s", err, out, exit.Stderr)
		}
		return string(out), fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

func (s *suite) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	return output(t, s.Command(s.ctx, append([]string{"kubectl"}, args...)...))
}

// on runs a command on a node.
func (s *suite) on(t *testing.T, n *cluster.Node, argv ...string) string {
	t.Helper()
	return output(t, n.Command(s.ctx, argv...))
}

// in returns a command in a pod's container.
func (s *suite) in(pod string, argv ...string) *exec.Cmd {
	return s.Command(s.ctx, append([]string{"kubectl", "exec", pod, "--"}, argv...)...)
}

// get asks with curl, as a command of the caller's place does, for at most 5 s.
func get(url string, more ...string) []string {
	return append([]string{"curl", "-gsS", "-m", "5", url}, more...)
}

// eventually repeats ok until it succeeds: for states that no event tells of. 30 s are its limit,
// which only a failure reaches.
func eventually(t *testing.T, ok func() error) {
	t.Helper()
	var err error
	testutil.Within(t, 30*time.Second, func() (bool, string) {
		err = ok()
		return err == nil, fmt.Sprint(err)
	})
	if err != nil {
		t.FailNow()
	}
}

func decode[T any](t *testing.T, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return v
}

// install puts the plugin behind the main one on each node, then has the pods that exist made anew.
func (s *suite) install(t *testing.T) {
	t.Run("no pod is attached before", s.noAttachment)
	for _, n := range s.Nodes() {
		t.Run("install on "+n.Name(), func(t *testing.T) {
			s.conflists[n.Name()] = s.on(t, n, "cat", cluster.Conflist)
			s.on(t, n, s.plugin, "install", "--conflist", cluster.Conflist, "--bin-dir", "/opt/cni/bin")
			info, err := os.Stat(n.File("/opt/cni/bin/sluice-cni"))
			if err != nil {
				t.Fatal(err)
			}
			s.binaries = append(s.binaries, info)
		})
	}
	t.Run("pods from before are left alone", s.noAttachment)
	t.Run("coredns anew", func(t *testing.T) {
		s.kubectl(t, "-n", "kube-system", "rollout", "restart", "deployment/coredns")
		s.kubectl(t, "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=60s")
	})
	if t.Failed() {
		t.FailNow()
	}
}

// makePods makes the pods that the checks ask, and that hold connections to each other.
func (s *suite) makePods(t *testing.T) {
	s.kubectl(t, "wait", "--for=create", "serviceaccount/default", "--timeout=30s")
	n1, n2 := s.Nodes()[0].Name(), s.Nodes()[1].Name()
	s.makePod(t, "held-server", n1, container{"v4", "nc -4 -l 9004 >/tmp/lines"}, container{"v6", "nc -6 -l 9006 >/tmp/lines"})
	for family, port := range map[string]string{"v4": "9004", "v6": "9006"} {
		eventually(t, func() error {
			_, err := try(s.Command(s.ctx, "kubectl", "exec", "held-server", "-c", family, "--", "sh", "-c", "ss -tln | grep -q :"+port))
			return err
		})
	}
	const send = "(i=0; while echo $i; do i=$((i + 1)); sleep 0.1; done) | nc "
	server := s.addressesOf(t, "held-server")
	s.makePod(t, "held-client", n2, container{"v4", send + "-4 " + server.four + " 9004"}, container{"v6", send + "-6 " + server.six + " 9006"})
	s.makePod(t, "web", n1, container{"web", "exec /agnhost netexec --http-port=8080"})
	s.makePod(t, "asker", n2, container{"asker", "exec sleep 100000"})
	s.makePod(t, "namer", n2, container{"namer", "exec sleep 100000"})
	s.kubectl(t, "expose", "pod", "web", "--port=8080")
	s.kubectl(t, "expose", "pod", "web", "--name=headless", "--cluster-ip=None", "--port=8080")
	eventually(t, func() error {
		_, err := try(s.in("namer", "sh", "-c", "dig +short headless.default.svc.cluster.local | grep ."))
		return err
	})
	eventually(t, func() error {
		_, err := try(s.in("asker", get("http://"+s.addressesOf(t, "web").four+":8080/hostname")...))
		return err
	})
}

// container runs a shell's command.
type container struct{ name, command string }

func (s *suite) makePod(t *testing.T, name, node string, containers ...container) {
	t.Helper()
	type object = map[string]any
	var list []object
	for _, c := range containers {
		list = append(list, object{"name": c.name, "image": cluster.AgnhostImage, "imagePullPolicy": "Never", "command": []string{"sh", "-c", c.command}})
	}
	text, err := json.Marshal(object{
		"apiVersion": "v1", "kind": "Pod", "metadata": object{"name": name, "labels": object{"app": name}},
		"spec": object{"nodeName": node, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": list},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.apply(t, string(text))
	s.kubectl(t, "wait", "--for=condition=Ready", "pod/"+name, "--timeout=60s")
}

func (s *suite) apply(t *testing.T, manifest string) {
	t.Helper()
	cmd := s.Command(s.ctx, "kubectl", "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifest)
	output(t, cmd)
}
