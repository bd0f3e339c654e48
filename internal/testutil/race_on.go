//go:build race

package testutil

// Race reports whether the race detector is compiled in, which costs time and allocations.
const Race = true
