package hostsock

// Probes of idle TCP connections (RFC 9293 section 3.8.4, RFC 5382 REQ-5).
//
// A connection of the sandbox has two halves: keepalive ends here, and so do TCP_KEEPIDLE,
// TCP_USER_TIMEOUT and anything else that an application sets. So each half is probed from here,
// whether or not the application asks for it:
//
//	to the host's side    often enough for a NAT on the way to keep the connection (most
//	                      forget after 5 minutes or more), and to detect a dead far side: the
//	                      sandbox gets a reset Time + Probes x Interval after it was last heard of
//	to the sandbox's      as often. A sandbox whose kernel no longer knows the connection resets
//	                      it; one that does not answer at all may have been stopped as a whole, as
//	                      a virtual machine can be, and is given insideSilence

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
)

// Keepalive is how idle connections are probed, by the names of net.ipv4.
type Keepalive struct {
	Time     time.Duration // tcp_keepalive_time: how long a connection is idle before the first probe
	Interval time.Duration // tcp_keepalive_intvl: between probes
	Probes   int           // tcp_keepalive_probes: unanswered before the connection ends
}

// DefaultKeepalive probes each minute, and detects a dead far side in 11 minutes, the same time
// that Linux takes from its first probe on.
func DefaultKeepalive() Keepalive {
	return Keepalive{Time: time.Minute, Interval: time.Minute, Probes: 10}
}

// insideSilence is how long the sandbox's kernel may leave probes unanswered.
const insideSilence = 2 * time.Hour

// The kernel's limits: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT.
const (
	mostKeepaliveSeconds = 32767
	mostKeepaliveProbes  = 127
)

const keepalivePrefix = "net.ipv4."

var keepaliveNames = [...]string{"net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes"}

// KeepaliveSysctls are the names of Keepalive's settings.
func KeepaliveSysctls() []string { return slices.Clone(keepaliveNames[:]) }

// keepaliveIndex returns the index of a setting, with or without "net.ipv4."; -1 if there is none
// of that name.
func keepaliveIndex(name string) int {
	return slices.Index(keepaliveNames[:], keepalivePrefix+strings.TrimPrefix(name, keepalivePrefix))
}

// IsKeepaliveSysctl reports whether name is one of KeepaliveSysctls, with or without "net.ipv4.".
func IsKeepaliveSysctl(name string) bool { return keepaliveIndex(name) >= 0 }

// Sysctl reads a setting by its name; times are in whole seconds.
func (k Keepalive) Sysctl(name string) string {
	switch keepaliveIndex(name) {
	case 0:
		return strconv.Itoa(int(k.Time / time.Second))
	case 1:
		return strconv.Itoa(int(k.Interval / time.Second))
	}
	return strconv.Itoa(k.Probes)
}

// SetSysctl changes a setting by its name.
func (k *Keepalive) SetSysctl(name, value string) error {
	most := mostKeepaliveSeconds
	if keepaliveIndex(name) == 2 {
		most = mostKeepaliveProbes
	}
	n, err := strconv.Atoi(strings.TrimSpace(value))
	if err != nil || n < 1 || n > most {
		return fmt.Errorf("setting %s: %q is not between 1 and %d", name, value, most)
	}
	switch keepaliveIndex(name) {
	case 0:
		k.Time = time.Duration(n) * time.Second
	case 1:
		k.Interval = time.Duration(n) * time.Second
	default:
		k.Probes = n
	}
	return nil
}

// SetKeepalive makes k apply to connections that are set up from now on.
func (d *Dialer) SetKeepalive(k Keepalive) { d.keepalive.Store(&k) }

// Keepalive returns the settings for connections that are set up from now on.
func (d *Dialer) Keepalive() Keepalive { return *d.keepalive.Load() }

// probeHost has the kernel probe the far side of a host socket.
func (k *Keepalive) probeHost(fd int) error {
	for _, o := range [...]struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(k.Time / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(k.Interval / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Probes},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("setting keepalive: %w", err)
		}
	}
	return nil
}

// ProbeInside has the stack probe the sandbox's half of a connection.
func (d *Dialer) ProbeInside(ep tcpip.Endpoint) { d.keepalive.Load().probeInside(ep) }

// probeInside sets the options of ProbeInside.
func (k *Keepalive) probeInside(ep tcpip.Endpoint) {
	idle, interval := tcpip.KeepaliveIdleOption(k.Time), tcpip.KeepaliveIntervalOption(k.Interval)
	count := max(k.Probes, int(math.Ceil(float64(insideSilence)/float64(k.Interval))))
	// The options are the stack's own, and cannot fail.
	_ = ep.SetSockOpt(&idle)
	_ = ep.SetSockOpt(&interval)
	_ = ep.SetSockOptInt(tcpip.KeepaliveCountOption, count)
	ep.SocketOptions().SetKeepAlive(true)
}
