// Package resolvconf follows the host's resolver configuration: resolv.conf, the symlinks that lead
// to it, and the files that replace it.
package resolvconf
