// Package registry is where sandboxes are found: state directories, names, locks, and who may
// use a control socket.
package registry
