// Package onlink knows who owns each address on the sandbox's link.
package onlink
