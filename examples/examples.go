// Package examples holds the example policies and network configurations, so that tests
// run the very files that people copy.
package examples

import "embed"

// Files are the examples, by their paths in this directory.
//
//go:embed *.yaml podman cni
var Files embed.FS
