// Package datagram carries UDP and ICMP echo: the flows of datagrams, the host sockets that they
// share, QUIC that is read before it passes, and published UDP ports.
package datagram
