// Package flowlog writes what became of flows and questions: the worker's queue and buffer, and
// the file that the monitor opens and rotates.
package flowlog
