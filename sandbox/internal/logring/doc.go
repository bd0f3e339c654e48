// Package logring keeps the last lines of a sandbox's own log.
package logring
