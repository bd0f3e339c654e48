package guest

import "sluice.dev/sluice/sandbox/internal/idmap"

// UserMode selects the user that the command is inside.
type UserMode = idmap.UserMode

const (
	// KeepCaller runs the command as the caller, without capabilities.
	KeepCaller = idmap.KeepCaller
	// MapRoot runs the command as uid 0 of the user namespace; on the host it is still the caller.
	MapRoot = idmap.MapRoot
)
