// Package ingress serves published TCP ports: it accepts, and finds the client's way to a server
// in the sandbox.
package ingress
