//go:build faults

package main

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// reached kills the process at the step that SLUICE_CNI_FAULT names, as a machine out of memory or
// an impatient runtime would; "fail:STEP" makes the verb fail at that step.
var reached = func(step string) error {
	fault := os.Getenv("SLUICE_CNI_FAULT")
	if fault == "fail:"+step {
		return errors.New("a fault at the step " + step)
	}
	if fault == step {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
	return nil
}
