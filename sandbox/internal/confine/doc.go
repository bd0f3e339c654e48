// Package confine takes everything away from the worker process that it does not
// need to move packets.
//
// The worker parses what a hostile sandbox sends. It is in the caller's network
// namespace and holds the device, so a hole in it is a hole into the host, unless
// there is nothing to be had in it:
//
//	cloned by the monitor:   user, mount, PID, IPC and UTS namespaces of its own
//	Enter:  1 descriptors    only the listed ones (and the runtime's own)
//	        2 root           an empty, read-only tmpfs; the host's tree is unmounted
//	        3 limits         no core dump, no message queues; not dumpable, no ptrace
//	        4 privileges     no_new_privs; no capability in any set, bounding included
//	        5 Landlock       no file system at all; signals and abstract sockets stay inside
//	seal:   6 seccomp        an allow-list by call and argument; a few calls that libraries
//	                         try fail with an errno, anything else kills
//
// Enter takes longest of all that a worker does before it serves, so it comes before
// the configuration and the device do, while the sandbox is being made.
//
// Each stage alone would hold most attacks; they are in this order because each
// takes away what the ones before needed. All of them hold for every thread of the
// process: Linux keeps no_new_privs, capabilities, Landlock and seccomp per
// thread, and a Go program has several by the time main runs. seccomp(2) reaches
// them all by itself (SECCOMP_FILTER_FLAG_TSYNC); the others are told one by one
// (threads.go), in a binary with cgo as in one without.
//
// FilterCommand is the other filter: of what runs inside a sandbox.
//
// What is left to a worker: sockets of the Internet families, the descriptors handed over, and
// memory. The package imports nothing of ours.
package confine
