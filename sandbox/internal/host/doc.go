// Package host asks the host what a sandbox has to know of it: its own addresses, the path MTU,
// raw ICMP sockets, memory limits, zones of resolvers, sockets with a path.
package host
