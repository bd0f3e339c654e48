// Package cni puts containers behind Sluice for a CNI runtime and removes them again. A container
// keeps the identity that the main plugin gave it.
//
//	pod netns                uplink netns, one per attachment              host
//	eth0 = tap, pod IP ════ worker ═ kernel sockets bound to the pod IP
//	                           ║     eth0 = the main plugin's interface ── veth, routes, services
//	                           ╚════ in0 = tun for traffic from outside
//
//	add.go       ADD: every step with its reversal on an undo stack (undo.go)
//	del.go       DEL: takes away whatever is there, by the record and by looking
//	check.go     CHECK and STATUS
//	gc.go        GC and repair
//	record.go    the durable record of an attachment, its lock and its directory
//	link.go      an interface with its addresses, routes and neighbours, as a value
//	uplink.go    the uplink namespace
//	steer.go     the rules that tell traffic of the worker's sockets from the pod's
//	pod.go       the device in the pod
//	delegate.go  main plugins run by us
//	cgroup.go    out of the caller's cgroup
//	conflist.go   conflists
//
// An attachment is one interface of one container in one network. Its record is written before
// anything is made, so if the plugin is killed at any point, DEL or GC find the rest by the record.
// Nothing is kept in memory between verbs.
//
// The package knows nothing of packets, policies or workers: it makes namespaces,
// devices and rules, and starts the monitor through a Launcher.
package cni
