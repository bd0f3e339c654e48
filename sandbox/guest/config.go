package guest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"sluice.dev/sluice/sandbox/internal/idmap"
	"sluice.dev/sluice/tun"
)

// HostEntry is one line of /etc/hosts.
type HostEntry struct {
	Addr  netip.Addr
	Names []string
}

// Bounds on what a caller may ask for and a stage may send.
const (
	maxHostEntries  = 4096
	maxHideDirs     = 4096 // and as many paths of each other kind
	maxFiles        = 200  // descriptors handed to CMD; SCM_MAX_FD is 253
	maxNameservers  = 16
	maxConfigBytes  = 16 << 20
	maxMessageBytes = 64 << 10
	maxSocketAsks   = 256 // Socket calls in flight
)

// Config describes one guest. The zero value plus a Command is a sandbox with a device and nothing
// else: no address, no route, no name server.
type Config struct {
	Command []string // CMD and its arguments; run mode only
	Env     []string // CMD's environment; nil means the caller's
	Dir     string   // CMD's working directory; "" means the caller's

	// Stdin, Stdout and Stderr are CMD's descriptors 0, 1 and 2; nil means the caller's. Each one
	// that is a terminal is replaced by the sandbox's own (Console).
	Stdin, Stdout, Stderr *os.File `json:"-"`
	// Files[i] becomes descriptor 3+i of CMD. CMD inherits no other descriptor.
	Files []*os.File `json:"-"`

	Signals Signals // what CMD's caller ignores and blocks

	User         idmap.UserMode
	SubIDs       bool // map the caller's ranges of /etc/subuid and /etc/subgid too
	PIDNamespace bool

	Link               tun.Config
	MAC                net.HardwareAddr // the guest's; nil lets the kernel choose one
	Addr4, Addr6       netip.Prefix     // the invalid zero value means none of that family
	Gateway4, Gateway6 netip.Addr
	// PathMTU4 and PathMTU6 are the path MTU beyond the gateway, set on the default routes
	// (RTAX_MTU). Without it the guest's kernel would learn it by losing one packet per
	// destination. 0 sets none.
	PathMTU4, PathMTU6 int

	DNS           []netip.Addr
	Search        []string
	ResolvOptions []string
	Hosts         []HostEntry // first in /etc/hosts; they take precedence over the caller's file

	// The parts of the caller's file system that CMD cannot reach. Not even root inside can uncover
	// them (nest.go). A file made at such a path later is visible, except in HideDirs and
	// WithoutSockets.

	// HideDirs are covered by empty read-only directories.
	HideDirs []string
	// WithoutSockets are directories that CMD sees as copies without the sockets.
	WithoutSockets []string
	// HideSockets are sockets in other places.
	HideSockets []string
	// AllowSockets are paths in WithoutSockets and HideSockets that stay reachable, with everything
	// below them. The paths are clean and have no symbolic links.
	AllowSockets []string
	// ReadOnly are files that CMD may read but not change.
	ReadOnly []string

	// Sysctls are set in the new network namespace. The keys are dotted names.
	Sysctls map[string]string
	// NoConfigure makes the device and nothing else (attach without --config).
	NoConfigure bool
}

// streams returns the files for CMD's 0, 1 and 2. The stage replaces each one that is a terminal.
func (c *Config) streams() [3]*os.File {
	out := [3]*os.File{os.Stdin, os.Stdout, os.Stderr}
	for i, f := range []*os.File{c.Stdin, c.Stdout, c.Stderr} {
		if f != nil {
			out[i] = f
		}
	}
	return out
}

func (c *Config) validate(run bool) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if run && (len(c.Command) == 0 || c.Command[0] == "") {
		bad("no command to run")
	}
	for _, s := range c.Command {
		if strings.ContainsRune(s, 0) {
			bad("a command argument contains a NUL byte")
		}
	}
	if len(c.Files) > maxFiles {
		bad("%d descriptors to preserve, at most %d can be", len(c.Files), maxFiles)
	}
	if len(c.Hosts) > maxHostEntries {
		bad("%d host entries, at most %d are taken", len(c.Hosts), maxHostEntries)
	}
	if len(c.HideDirs) > maxHideDirs {
		bad("%d directories to hide, at most %d are taken", len(c.HideDirs), maxHideDirs)
	}
	for _, paths := range [][]string{c.WithoutSockets, c.HideSockets, c.AllowSockets, c.ReadOnly} {
		if len(paths) > maxHideDirs {
			bad("%d paths to cover or leave, at most %d are taken", len(paths), maxHideDirs)
		}
	}
	if len(c.DNS) > maxNameservers {
		bad("%d name servers, at most %d are taken", len(c.DNS), maxNameservers)
	}
	if c.MAC != nil && (len(c.MAC) != 6 || c.MAC[0]&1 != 0) {
		bad("MAC address %s is not a unicast Ethernet address", c.MAC)
	}
	family := func(v string, p netip.Prefix, gw netip.Addr, is4 bool) {
		if p.IsValid() && (p.Addr().Is4() != is4 || p.Addr().Is4In6()) {
			bad("%s is not an IPv%s prefix", p, v)
		}
		if gw.IsValid() && (gw.Is4() != is4 || gw.Is4In6()) {
			bad("%s is not an IPv%s gateway", gw, v)
		}
		if gw.IsValid() && !p.IsValid() {
			bad("gateway %s without an IPv%s address for the guest", gw, v)
		}
		if gw.IsValid() && gw == p.Addr() {
			bad("%s is both the guest's address and its gateway", gw)
		}
	}
	family("4", c.Addr4, c.Gateway4, true)
	family("6", c.Addr6, c.Gateway6, false)
	for _, h := range c.Hosts {
		if !h.Addr.IsValid() || len(h.Names) == 0 {
			bad("host entry %v has no address or no name", h)
		}
		for _, n := range h.Names {
			if n == "" || strings.ContainsAny(n, " \t\r\n#\x00") {
				bad("%q cannot be a host name", n)
			}
		}
	}
	for _, words := range [][]string{c.Search, c.ResolvOptions} {
		for _, w := range words {
			if w == "" || strings.ContainsAny(w, " \t\r\n#;\x00") {
				bad("%q cannot stand in resolv.conf", w)
			}
		}
	}
	for k, v := range c.Sysctls {
		if !strings.HasPrefix(k, "net.") || strings.ContainsAny(k+v, "\n\x00") || strings.Contains(k, "/") || strings.Contains(k, "..") {
			bad("sysctl %s=%s: only names that start with net. belong to a network namespace", k, v)
		}
	}
	return errors.Join(errs...)
}
