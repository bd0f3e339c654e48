// Package conflist edits CNI network configuration lists. It adds our plugin to one or removes it,
// and leaves everything else as it was, including order and unknown keys.
package conflist
