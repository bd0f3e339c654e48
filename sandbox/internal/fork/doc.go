// Package fork starts this same binary again where the syscall package cannot: in existing
// namespaces, and without a capability bounding set.
//
// A process with more than one thread cannot enter a user namespace, and a Go program has several
// before main. The bounding set belongs to a thread, so changing it takes a signal to each thread
// and a wait for all of them, once per capability. So both are done between fork and exec, in the
// child, which has one thread. This works like syscall.forkExec: after the fork there are only raw
// system calls and no allocation, and everything is prepared before.
//
//	parent                              child
//	clone ─────────────────────────────► waits
//	Maps(pid): uid_map, gid_map ─ word ► enters namespaces, becomes root of its own,
//	                                     keeps capabilities, empties the bounding set,
//	                                     descriptors, directory, death signal
//	◄──── report, or the end of the pipe ─ exec
//
// No wait in this package holds one of the runtime's processors. A blocking system call keeps its
// processor until the runtime's monitor thread notices, and that sleeps for up to 10 ms while
// little goes on, as at the start of a sandbox.
package fork
