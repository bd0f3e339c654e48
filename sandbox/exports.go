package sandbox

// What callers name that stands in the packages below.

import (
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/sandbox/internal/ports"
	"sluice.dev/sluice/sandbox/internal/registry"
)

type (
	// Registry is the sandboxes of one user: their state directories.
	Registry = registry.Registry
	// State is what a state directory says of its sandbox.
	State = registry.State
)

// ErrNoSandbox says that there is no sandbox of that name.
var ErrNoSandbox = registry.ErrNoSandbox

// OpenRegistry finds the caller's runtime directory, makes it if need be, and opens it.
func OpenRegistry() (*Registry, error) { return registry.Open() }

const (
	// DefaultFlowLogMaxSize is the size in bytes at which a flow log's file is followed by the next.
	DefaultFlowLogMaxSize = flowlog.DefaultFlowLogMaxSize
	// DefaultFlowLogMaxFiles is how many files of a flow log are kept.
	DefaultFlowLogMaxFiles = flowlog.DefaultFlowLogMaxFiles
)

// ParseFlowLogSize reads a size such as "64M" for Config.FlowLogMaxSize.
func ParseFlowLogSize(s string) (int64, error) { return flowlog.ParseFlowLogSize(s) }

// CheckFlowLogFiles reports why a number of files is none for Config.FlowLogMaxFiles.
func CheckFlowLogFiles(n int) error { return flowlog.CheckFlowLogFiles(n) }

// ParsePort reads a published port as the command line has it, such as "8080:80/tcp".
func ParsePort(spec string) (api.Port, error) { return ports.ParsePort(spec) }

// FormatPort writes a published port as ParsePort reads it.
func FormatPort(p api.Port) string { return ports.FormatPort(p) }
