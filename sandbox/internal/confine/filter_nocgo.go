//go:build !cgo

package confine

// A binary without cgo has no C library.
var libcAlways, libcThreadFlags []uintptr
