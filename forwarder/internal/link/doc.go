// Package link stands between the device and the stack: it drops packets that no neighbour may
// send, answers requests to the gateway, and hands plain segments and datagrams to their flows.
package link
