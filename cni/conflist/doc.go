// Package conflist edits CNI network configuration lists: it adds our plugin to one and removes
// it, and leaves everything else as it was, order and unknown keys included.
package conflist
