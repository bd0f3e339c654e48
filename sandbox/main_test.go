package sandbox

import (
	"os"
	"testing"

	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/sandbox/internal/worker"
)

// TestMain lets the test binary stand in for sluice: the monitor under test starts /proc/self/exe
// as its worker and guest stage.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case process.WorkerCommand:
			os.Exit(worker.WorkerMain())
		case AttachmentCommand:
			os.Exit(AttachmentMain("test"))
		case "guest":
			os.Exit(guest.Main(os.Args[2:]))
		case "test-filtered":
			os.Exit(filteredPaths())
		case "test-worker":
			os.Exit(fakeWorker(os.Args[2]))
		case "test-rotate":
			os.Exit(killedRotation(os.Args[2], os.Args[3]))
		case "test-monitor":
			os.Exit(fakeMonitor(os.Args[2]))
		case "test-peer":
			os.Exit(fakePeer(os.Args[2]))
		}
	}
	os.Exit(m.Run())
}
