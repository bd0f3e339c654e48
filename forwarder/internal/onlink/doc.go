// Package onlink knows whose an address on the sandbox's link is.
package onlink
