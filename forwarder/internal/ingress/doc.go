// Package ingress serves published TCP ports: it accepts connections, and finds each client's way
// to a server in the sandbox.
package ingress
