package idmap

// UserMode selects the user that CMD is inside.
type UserMode uint8

const (
	// KeepCaller runs CMD with the caller's own uid and gid and, for an ordinary user, without
	// capabilities.
	KeepCaller UserMode = iota
	// MapRoot runs CMD as uid 0 of the user namespace, with capabilities over
	// the sandbox's namespaces only. On the host it is still the caller.
	MapRoot
)
