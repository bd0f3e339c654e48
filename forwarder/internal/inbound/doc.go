// Package inbound carries packets from outside to a pod, and their answers: judged and tracked
// like all flows, but passed on as the packets that they are.
package inbound
