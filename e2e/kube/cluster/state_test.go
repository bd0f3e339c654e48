package cluster

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// sleeper starts a process that is recorded.
func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

func TestARecordedProcessIsKilledByAnotherRun(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	cmd := sleeper(t)
	s, err := readState(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.addProcess(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	later, err := readState(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := later.clear(); err != nil {
		t.Fatal(err)
	}
	if _, lives := startTime(cmd.Process.Pid); lives {
		t.Error("the process lives")
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the state file is still there")
	}
	if err := later.clear(); err != nil {
		t.Errorf("clearing again: %v", err)
	}
}

// A number that was given to another process meanwhile is left alone.
func TestAnotherProcessOfTheSameNumberIsLeftAlone(t *testing.T) {
	cmd := sleeper(t)
	s := &state{path: filepath.Join(t.TempDir(), "state.json"), Processes: []process{{cmd.Process.Pid, "1"}}}
	if err := s.clear(); err != nil {
		t.Fatal(err)
	}
	if _, lives := startTime(cmd.Process.Pid); !lives {
		t.Error("a process that is not the cluster's was killed")
	}
}

func TestADamagedStateFileIsAnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	if err := os.WriteFile(path, []byte(`{"processes":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readState(path); err == nil {
		t.Error("it is read as empty")
	}
}
