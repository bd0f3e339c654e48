// Package fork starts this same binary anew where the syscall package cannot: in
// namespaces that exist already, and without a capability bounding set.
//
// A process with more than one thread cannot enter a user namespace, and a Go
// program has several before main. What belongs to a thread, as the bounding set
// does, takes a signal to each of them and a wait for all, once per capability. So
// both are done between fork and exec, in the child that has one thread, the way
// syscall.forkExec works: from the fork on only raw system calls, no allocation,
// everything prepared before.
//
//	parent                              child
//	clone ─────────────────────────────► waits
//	Maps(pid): uid_map, gid_map ─ word ► enters namespaces, becomes root of its own,
//	                                     keeps capabilities, empties the bounding set,
//	                                     descriptors, directory, death signal
//	◄──── report, or the end of the pipe ─ exec
//
// No wait of this package holds one of the runtime's processors: a system call that
// blocks keeps its own until the runtime's monitor thread looks, and that sleeps for up
// to 10 ms while little goes on, as at the start of a sandbox.
package fork
