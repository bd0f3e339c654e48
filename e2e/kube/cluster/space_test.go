package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// newTestCluster is one without components: it has pid1 alone.
func newTestCluster(t *testing.T) (*Cluster, Config) {
	t.Helper()
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	if os.Getuid() != 0 || len(hierarchies) < 2 {
		t.Skip("a space is made of namespaces and cgroups of version 1: as root, where these are mounted")
	}
	config := Config{Source: "..", Dir: t.TempDir()}
	c, err := open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	c.builder = &builder{source: "..", bin: filepath.Join(config.Dir, "bin"), log: t.Logf}
	for _, dir := range []string{c.logs, c.dir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.builder.build(t.Context(), components[0], "-s -w"); err != nil {
		t.Fatal(err)
	}
	return c, config
}

// shell runs a script in the space.
func shell(t *testing.T, s *space, script string) string {
	t.Helper()
	out, err := s.command(t.Context(), "bash", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestASpaceHasWhatIsItsOwnAndEndsWithAllThatRunsInIt(t *testing.T) {
	c, config := newTestCluster(t)
	s, err := c.newSpace("n1")
	if err != nil {
		t.Fatal(err)
	}
	for script, want := range map[string]string{
		"hostname":          "n1",
		"ls -A /run":        "lock\nnetns",
		"ls /sys/class/net": "lo",
		"cat /proc/1/comm":  "pid1",
		"ls -A /etc/cni":    "net.d",
		"cut -d: -f3 /proc/self/cgroup | sort -u": "/",
	} {
		if got := shell(t, s, script); got != want {
			t.Errorf("%s: %q, not %q", script, got, want)
		}
	}
	shell(t, s, "echo own >/etc/cni/net.d/file")
	if text, err := os.ReadFile(filepath.Join(s.dir, "fs/etc/cni/net.d/file")); string(text) != "own\n" {
		t.Errorf("a file of the space's own: %q, %v", text, err)
	}
	if err := s.start("daemon", "sleep", "100000000"); err != nil {
		t.Fatal(err)
	}
	// A process that has left its parent ends with the space too.
	shell(t, s, "setsid sleep 100000001 >/dev/null 2>&1 </dev/null & echo $! >/etc/cni/net.d/file")
	first := s.daemons["daemon"]
	if err := s.restart("daemon"); err != nil {
		t.Fatal(err)
	}
	<-first.done
	if err := s.alive("daemon"); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if err := until(20*time.Second, func() error {
		if got := shell(t, s, "grep -lx sleep /proc/[0-9]*/comm | wc -l"); got != "2" {
			return fmt.Errorf("%s processes sleep, not 2", got)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}

	// As a killed run leaves it: only the lock is given back.
	if err := syscall.Flock(int(c.lock.Fd()), syscall.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	later, err := open(config)
	if err != nil {
		t.Fatal(err)
	}
	<-s.daemons["daemon"].done
	for _, dir := range append(s.cgroups, c.dir, later.state.path) {
		if exists(dir) {
			t.Errorf("%s is still there", dir)
		}
	}
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range lines {
		if line, _ := os.ReadFile(path); string(line) == "sleep\x00100000001\x00" {
			t.Errorf("%s still runs", path)
		}
	}
	if err := later.Close(); err != nil {
		t.Error(err)
	}
}

func TestOneRunAtATime(t *testing.T) {
	config := Config{Dir: t.TempDir()}
	c, err := open(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := Down(config); err == nil || !strings.Contains(err.Error(), "another run") {
		t.Errorf("beside another run: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Down(config); err != nil {
		t.Errorf("after it: %v", err)
	}
}

func TestTheNumberOfNodesIsBounded(t *testing.T) {
	for nodes, ok := range map[int]bool{0: true, 9: true, 10: false, -1: false} {
		if c, err := (Config{Nodes: nodes}).withDefaults(); (err == nil) != ok {
			t.Errorf("%d nodes: %v, %v", nodes, c.Nodes, err)
		}
	}
}
