// Package engine is what moves bytes: one thread that waits for all descriptors and runs tasks,
// helpers when there is much to do, and the device's queues.
package engine
