// Package console connects the caller's terminal to that of the command inside.
package console
