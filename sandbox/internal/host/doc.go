// Package host finds out what a sandbox has to know of the host: its own addresses, the path MTU,
// raw ICMP sockets, memory limits, zones of resolvers, and sockets with a path.
package host
