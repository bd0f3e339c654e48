package sandbox

import (
	"os"

	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/sandbox/internal/worker"
)

// Init runs the part of a sandbox that this process was started for, and does not return then. A
// sandbox's worker, the stage that makes its inside, and the monitor of an attachment are the
// program's own binary, distinguished by its first argument; they refuse to run outside a sandbox.
// So a program that starts sandboxes must call Init first in main. version is the program's
// version, as `sluice ps` shows it.
func Init(version string) {
	if len(os.Args) < 2 {
		return
	}
	switch os.Args[1] {
	case guest.StageCommand:
		os.Exit(guest.Main(os.Args[2:]))
	case process.WorkerCommand:
		os.Exit(worker.WorkerMain())
	case AttachmentCommand:
		os.Exit(AttachmentMain(version))
	}
}
