package forwarder

// Names of the packages below that callers need: the types of Config and of reports, and the
// settings that a sandbox may change.

import (
	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/inbound"
)

type (
	// Listener is a published port: a bound host socket, listening if it is TCP.
	Listener = hostsock.Listener
	// Keepalive is how idle connections are probed.
	Keepalive = hostsock.Keepalive
	// MemoryMarks are the marks of the memory budget in bytes: net.ipv4.tcp_mem, which has pages.
	MemoryMarks = admit.MemoryMarks
	// Refusal is a flow that policy refused, or a request on one.
	Refusal = admit.Refusal
	// About is what the forwarder knows about a flow besides its tuple: nat.Flow.About.
	About = admit.About
)

// ErrPublished means that a listener for the same host port exists already.
var ErrPublished = hostsock.ErrPublished

const (
	// DefaultMemory is the default high mark of the memory budget.
	DefaultMemory = admit.DefaultMemory
	// LeastMemory is the smallest high mark.
	LeastMemory = admit.LeastMemory
	// MemorySysctl is the name of the setting for the marks.
	MemorySysctl = admit.MemorySysctl
	// MemorySize is the size of Config.Memory.
	MemorySize = inbound.MemorySize
)

// MarksBelow returns the marks for a high mark.
func MarksBelow(high int64) MemoryMarks { return admit.MarksBelow(high) }

// ParseMemory parses the marks in MemorySysctl's form: three numbers of pages.
func ParseMemory(text string) (MemoryMarks, error) { return admit.ParseMemory(text) }

// DefaultKeepalive returns the default way connections are probed.
func DefaultKeepalive() Keepalive { return hostsock.DefaultKeepalive() }

// KeepaliveSysctls returns the names of the settings of a Keepalive.
func KeepaliveSysctls() []string { return hostsock.KeepaliveSysctls() }

// IsKeepaliveSysctl reports whether name is one of KeepaliveSysctls.
func IsKeepaliveSysctl(name string) bool { return hostsock.IsKeepaliveSysctl(name) }
