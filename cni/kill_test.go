package cni

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/cni/uplink"
	"sluice.dev/sluice/internal/testutil"
)

// The plugin is killed at each step, in a process of its own that this test binary
// becomes. It inherits the test thread's namespace, which is the node's host.

// The steps in their order.
var (
	addSteps = []string{
		uplink.StepRecorded, uplink.StepNamespace, uplink.StepDelegated, uplink.StepSaved, uplink.StepMoved, uplink.StepRestored,
		uplink.StepSteered, uplink.StepDevice, uplink.StepAddressed, uplink.StepLaunched, uplink.StepCommitted,
	}
	delSteps = []string{stepStopped, stepGiven, stepUnbound}
)

const (
	killVerb  = "SLUICE_TEST_VERB"
	killStep  = "SLUICE_TEST_STEP"
	killNode  = "SLUICE_TEST_NODE" // the node's directory
	killStdin = "SLUICE_TEST_STDIN"
)

func TestMain(m *testing.M) {
	if verb := os.Getenv(killVerb); verb != "" {
		os.Exit(killedVerb(verb))
	}
	os.Exit(m.Run())
}

func killedVerb(verb string) int {
	n := &node{podNS: os.Getenv(killNode) + "/pod", procs: &procLauncher{dir: os.Getenv(killNode) + "/run"}}
	plugin := &Plugin{Launcher: n.procs, Reached: func(step string) error {
		if step == os.Getenv(killStep) {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
		return nil
	}}
	args := n.args()
	args.StdinData = []byte(os.Getenv(killStdin))
	funcs := plugin.Funcs()
	call := funcs.Add
	if verb == "DEL" {
		call = funcs.Del
	}
	if err := call(args); err != nil {
		os.Stderr.WriteString(err.Error())
		return 1
	}
	return 0
}

// killed runs a verb that is killed at a step.
func (n *node) killed(verb, step string) {
	n.t.Helper()
	_, args := n.config()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), killVerb+"="+verb, killStep+"="+step, killNode+"="+n.dir, killStdin+"="+string(args.StdinData))
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(err.Error(), "killed") {
		n.t.Fatalf("%s was not killed at %s: %v\n%s", verb, step, err, out)
	}
}

func TestKilledAtAnyStep(t *testing.T) {
	var steps [][2]string
	for _, s := range slices.DeleteFunc(slices.Clone(addSteps), func(s string) bool { return s == uplink.StepDelegated }) {
		steps = append(steps, [2]string{"ADD", s})
	}
	for _, s := range delSteps {
		steps = append(steps, [2]string{"DEL", s})
	}
	cures := []struct {
		name string
		cure func(*node) error
	}{
		{"DEL", func(n *node) error { return n.del() }},
		{"GC", func(n *node) error { return n.gc(false) }},
		// The runtime knows the container until its DEL has succeeded.
		{"GC that knows it, STATUS, and DEL", func(n *node) error {
			return errors.Join(n.gc(true), n.status(), n.del())
		}},
		{"ADD and DEL", func(n *node) error {
			if err := n.add(); err != nil && !strings.Contains(err.Error(), "already") {
				return err
			}
			if err := n.check(); err != nil {
				return err
			}
			return n.del()
		}},
	}
	for _, at := range steps {
		for _, c := range cures {
			t.Run(at[0]+" at "+at[1]+", then "+c.name, func(t *testing.T) {
				n := newNode(t)
				before := n.inside()
				if at[0] == "DEL" {
					if c.name == "ADD and DEL" {
						t.Skip("SKIP: a runtime does not add a container that it was deleting")
					}
					testutil.Must(t, n.add())
				}
				n.killed(at[0], at[1])
				testutil.Must(t, c.cure(n))
				n.unchanged(before)
				n.clean()
			})
		}
	}
}
