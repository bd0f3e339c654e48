// Package netstack reaches what gVisor's API does not offer: handlers of queued segments, the
// memory that endpoints and packets take.
package netstack
