// Package netstack reaches parts of gVisor that its API does not offer: the handlers of queued
// segments, and the memory that endpoints and packets take.
package netstack
