// Package confine takes everything away from the worker process that it does not
// need to move packets.
//
// The worker parses what a hostile sandbox sends. It is in the caller's network namespace and holds
// the device, so a hole in it is a hole into the host, unless it has nothing worth taking:
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
// Of all that a worker does before it serves, Enter takes longest. So it runs before the
// configuration and the device arrive, while the sandbox is being made.
//
// Each stage alone would stop most attacks. They are in this order because each takes away what the
// ones before it needed. All of them apply to every thread of the process: Linux keeps
// no_new_privs, capabilities, Landlock and seccomp per thread, and a Go program has several by the
// time main runs. seccomp(2) reaches all threads by itself (SECCOMP_FILTER_FLAG_TSYNC). For the
// other restrictions each thread is made to call the kernel itself (threads.go), with or without
// cgo.
//
// FilterCommand installs the other filter, for everything that runs inside a sandbox.
//
// A worker is left with sockets of the Internet families, the descriptors handed over, and memory.
// The package imports no other package of ours.
package confine
