// Package uplink is the node's side of a pod's network: the namespace beside the pod's that keeps
// the original interface; the links, addresses, rules and routes that lead a pod's traffic through
// its worker; and how to undo each of them.
package uplink
