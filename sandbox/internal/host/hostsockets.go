package host

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// RawICMP opens raw ICMP sockets, v4 and v6, for a worker whose gid may not use ping sockets. A
// socket that cannot be opened is -1, and echo is then refused and counted. The kernel has one
// range for both families.
//
// The sockets are kept as bare descriptors. As files they would be in the runtime's poller, and
// each ICMP packet of the host would wake the monitor.
func RawICMP(gid int) [2]int {
	out := [2]int{-1, -1}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ping_group_range"); err == nil && inRange(string(b), gid) {
		return out
	}
	for i, s := range []struct{ domain, proto int }{
		{unix.AF_INET, unix.IPPROTO_ICMP},
		{unix.AF_INET6, unix.IPPROTO_ICMPV6},
	} {
		if fd, err := unix.Socket(s.domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, s.proto); err == nil {
			out[i] = fd
		}
	}
	return out
}

// inRange reports whether gid is in s, which is "low high" as in
// /proc/sys/net/ipv4/ping_group_range.
func inRange(s string, gid int) bool {
	var low, high int64
	if _, err := fmt.Sscan(strings.TrimSpace(s), &low, &high); err != nil {
		return false
	}
	return low <= int64(gid) && int64(gid) <= high
}
