// Package cover hides files, directories and sockets of the host from the command inside.
package cover
