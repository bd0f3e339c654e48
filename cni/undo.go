package cni

import "errors"

// undo is what an ADD has done so far, and how to take it back. The error that
// decides is passed in, not read from a variable that an inner scope may shadow.
type undo struct {
	steps []func() error
	// reached, if set, is told the name of every step that has been done, and may say
	// that it shall be the last.
	reached func(step string) error
}

// The steps of ADD in their order, as tests name the points to fail at.
const (
	stepRecorded  = "recorded"  // the record says that an ADD has begun
	stepNamespace = "namespace" // the uplink namespace is bound
	stepDelegated = "delegated" // the delegates have run (not when chained)
	stepSaved     = "saved"     // the record has the main interface's state (chained)
	stepMoved     = "moved"     // the main interface is in the uplink namespace
	stepRestored  = "restored"  // it is up there, with its addresses and routes
	stepSteered   = "steered"   // in0, rules and policy routing are in place
	stepDevice    = "device"    // the pod has its device
	stepAddressed = "addressed" // the device has the addresses and routes
	stepLaunched  = "launched"  // the monitor serves
	stepCommitted = "committed" // the record says that the attachment is ready
)

// push notes the reversal of what is about to be done and may fail half-way.
func (u *undo) push(reverse func() error) { u.steps = append(u.steps, reverse) }

// done notes a step and its reversal, which may be nil.
func (u *undo) done(step string, reverse func() error) error {
	if reverse != nil {
		u.steps = append(u.steps, reverse)
	}
	if u.reached != nil {
		return u.reached(step)
	}
	return nil
}

// rollback takes everything back, last step first, going on after failures. With a
// nil cause there is nothing to take back.
func (u *undo) rollback(cause error) error {
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
