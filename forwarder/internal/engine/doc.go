// Package engine moves bytes: one thread waits for all descriptors and runs tasks, helpers join
// under load, and the device's queues are read here.
package engine
