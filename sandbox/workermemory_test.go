package sandbox

import (
	"testing"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/sandbox/internal/worker"
)

func TestMemoryMarksFollowTheCgroup(t *testing.T) {
	for _, row := range []struct {
		what        string
		limit, high int64
	}{
		{"no limit", 0, forwarder.DefaultMemory},
		{"a large one", 64 << 30, forwarder.DefaultMemory},
		{"a quarter of a small one", 400 << 20, 100 << 20},
		{"never less than is of use", 16 << 20, forwarder.LeastMemory},
	} {
		m := worker.MemoryMarks(row.limit)
		if m.High != row.high || m.Low <= 0 || m.Low >= m.Pressure || m.Pressure >= m.High {
			t.Errorf("%s: %+v", row.what, m)
		}
	}
}

func TestMemoryTunableIsSetBeforeTheForwarderIsMade(t *testing.T) {
	w := &worker.Worker{Table: nat.NewTable(nat.Config{})}
	for _, name := range []string{"net.ipv4.tcp_mem", "net/ipv4/tcp_mem", "tcp_mem"} {
		w.Marks = forwarder.MemoryMarks{}
		if err := w.SetTunable(name, "1024 2048 4096"); err != nil || w.Marks.String() != "1024 2048 4096" {
			t.Errorf("%s: %v, %v", name, w.Marks, err)
		}
	}
	for _, value := range []string{"", "1", "3 2 4096", "1 2 3"} {
		if err := w.SetTunable("tcp_mem", value); err == nil {
			t.Errorf("%q is taken", value)
		}
	}
	if w.Marks.String() != "1024 2048 4096" {
		t.Errorf("a refused value left %v", w.Marks)
	}
}
