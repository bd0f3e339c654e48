// Package count holds the forwarder's counters by name.
package count
