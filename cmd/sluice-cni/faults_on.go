//go:build faults

package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// reached kills the process at the step that SLUICE_CNI_FAULT names, as a machine out of
// memory or an impatient runtime would.
var reached = func(step string) {
	if step == os.Getenv("SLUICE_CNI_FAULT") {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
}
