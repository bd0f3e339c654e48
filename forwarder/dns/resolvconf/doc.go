// Package resolvconf follows the host's resolver configuration: resolv.conf, the links that it
// is reached by, and the files that replace it.
package resolvconf
