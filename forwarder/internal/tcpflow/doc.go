// Package tcpflow carries the TCP of a sandbox: the dial, the handshake, the first bytes, the
// splice between the stack and a host socket, and the end.
package tcpflow
