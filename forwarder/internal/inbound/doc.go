// Package inbound carries packets from outside to a pod, and their answers. It judges and tracks
// them like all flows, but forwards them as packets.
package inbound
