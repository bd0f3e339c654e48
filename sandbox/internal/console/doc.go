// Package console is the caller's terminal beside that of the command inside.
package console
