// Package flowlog records what became of flows and DNS questions: the worker's queue and buffer,
// and the file that the monitor opens and rotates.
package flowlog
