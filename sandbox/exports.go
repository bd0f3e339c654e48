package sandbox

// Names of the packages below that callers of this package need.

import (
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/sandbox/internal/ports"
	"sluice.dev/sluice/sandbox/internal/registry"
)

type (
	// Registry holds the state directories of one user's sandboxes.
	Registry = registry.Registry
	// State is the content of a sandbox's state file.
	State = registry.State
)

// ErrNoSandbox means that there is no sandbox of that name.
var ErrNoSandbox = registry.ErrNoSandbox

// OpenRegistry opens the caller's runtime directory, making it if necessary.
func OpenRegistry() (*Registry, error) { return registry.Open() }

const (
	// DefaultFlowLogMaxSize is the size in bytes at which a flow log starts its next file.
	DefaultFlowLogMaxSize = flowlog.DefaultFlowLogMaxSize
	// DefaultFlowLogMaxFiles is how many files of a flow log are kept.
	DefaultFlowLogMaxFiles = flowlog.DefaultFlowLogMaxFiles
)

// ParseFlowLogSize reads a size such as "64M" for Config.FlowLogMaxSize.
func ParseFlowLogSize(s string) (int64, error) { return flowlog.ParseFlowLogSize(s) }

// CheckFlowLogFiles returns an error if n is not a valid Config.FlowLogMaxFiles.
func CheckFlowLogFiles(n int) error { return flowlog.CheckFlowLogFiles(n) }

// ParsePort parses a published port in command-line form, such as "8080:80/tcp".
func ParsePort(spec string) (api.Port, error) { return ports.ParsePort(spec) }

// FormatPort formats a published port in the form that ParsePort reads.
func FormatPort(p api.Port) string { return ports.FormatPort(p) }
