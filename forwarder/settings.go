package forwarder

// What callers name that stands in the packages below: the types of Config and of what is
// reported, and the settings that a sandbox may change.

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
	// About is what the forwarder knows of a flow beside its tuple: nat.Flow.About.
	About = admit.About
)

// ErrPublished says that a listener for the same host port is there already.
var ErrPublished = hostsock.ErrPublished

const (
	// DefaultMemory is the high mark of the memory budget unless set otherwise.
	DefaultMemory = admit.DefaultMemory
	// LeastMemory is the least high mark.
	LeastMemory = admit.LeastMemory
	// MemorySysctl is the name by which the marks are set.
	MemorySysctl = admit.MemorySysctl
	// MemorySize is the size of Config.Memory.
	MemorySize = inbound.MemorySize
)

// MarksBelow returns the marks for a high mark.
func MarksBelow(high int64) MemoryMarks { return admit.MarksBelow(high) }

// ParseMemory reads the marks as MemorySysctl has them: three numbers of pages.
func ParseMemory(text string) (MemoryMarks, error) { return admit.ParseMemory(text) }

// DefaultKeepalive returns how connections are probed unless set otherwise.
func DefaultKeepalive() Keepalive { return hostsock.DefaultKeepalive() }

// KeepaliveSysctls returns the names by which a Keepalive is set.
func KeepaliveSysctls() []string { return hostsock.KeepaliveSysctls() }

// IsKeepaliveSysctl reports whether name is one of KeepaliveSysctls.
func IsKeepaliveSysctl(name string) bool { return hostsock.IsKeepaliveSysctl(name) }
