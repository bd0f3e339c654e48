package uplink

import (
	"errors"
)

// Undo records what an ADD has done so far and how to undo it. The deciding error is passed in, not
// read from a variable that an inner scope may shadow.
type Undo struct {
	steps []func() error
	// Reached, if set, is called with the name of every completed step, and may return an error to
	// make it the last.
	Reached func(step string) error
}

// The steps of ADD in order, which tests use to name failure points.
const (
	StepRecorded  = "recorded"  // the record says that an ADD has begun
	StepNamespace = "namespace" // the uplink namespace is bound
	StepDelegated = "delegated" // the delegates have run (not when chained)
	StepSaved     = "saved"     // the record has the main interface's state (chained)
	StepMoved     = "moved"     // the main interface is in the uplink namespace
	StepRestored  = "restored"  // it is up there, with its addresses and routes
	StepSteered   = "steered"   // in0, rules and policy routing are in place
	StepDevice    = "device"    // the pod has its device
	StepAddressed = "addressed" // the device has the addresses and routes
	StepLaunched  = "launched"  // the monitor serves
	StepCommitted = "committed" // the record says that the attachment is ready
)

// Push records the reversal of a step that is about to run and may fail half-way.
func (u *Undo) Push(reverse func() error) { u.steps = append(u.steps, reverse) }

// Done records a completed step and its reversal, which may be nil.
func (u *Undo) Done(step string, reverse func() error) error {
	if reverse != nil {
		u.steps = append(u.steps, reverse)
	}
	if u.Reached != nil {
		return u.Reached(step)
	}
	return nil
}

// Rollback undoes everything, last step first, continuing after failures. With a nil cause there is
// nothing to undo.
func (u *Undo) Rollback(cause error) error {
	if cause == nil {
		return nil
	}
	errs := []error{cause}
	for i := len(u.steps) - 1; i >= 0; i-- {
		if err := u.steps[i](); err != nil {
			errs = append(errs, err)
		}
	}
	u.steps = nil
	return errors.Join(errs...)
}
