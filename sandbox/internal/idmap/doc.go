// Package idmap plans the ids of a sandbox's user namespace.
package idmap
