// Package link stands between the device and the stack: it drops what no neighbour may send,
// answers what is asked of the gateway, and hands plain segments and datagrams to their flows.
package link
