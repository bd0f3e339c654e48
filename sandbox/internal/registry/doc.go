// Package registry finds sandboxes: their state directories, names and locks, and who may use a
// control socket.
package registry
