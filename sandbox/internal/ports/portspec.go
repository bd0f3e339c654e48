package ports

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"sluice.dev/sluice/sandbox/api"
)

// MaxPortRange bounds the ports in one -p, and MaxPublished those of one sandbox. Each port takes
// one or two listening descriptors in both monitor and worker.
const (
	MaxPortRange = 1024
	MaxPublished = 2048
)

// ParsePort parses `[ip:]host[-range]:guest[-range][/tcp|/udp]`. IPv6 addresses need brackets. With
// host port 0 the kernel picks one.
func ParsePort(spec string) (api.Port, error) {
	fail := func(format string, args ...any) (api.Port, error) {
		return api.Port{}, fmt.Errorf("port %q: %s", spec, fmt.Sprintf(format, args...))
	}
	p := api.Port{Proto: "tcp"}
	rest, proto, found := strings.Cut(spec, "/")
	if found {
		if proto != "tcp" && proto != "udp" {
			return fail("protocol %q: want tcp or udp", proto)
		}
		p.Proto = proto
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return fail("want [ip:]host[-range]:guest[-range][/udp], for example 8080:80")
	}
	host, guest := rest[:i], rest[i+1:]
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		addr, err := parseHostIP(host[:i])
		if err != nil {
			return fail("%v", err)
		}
		p.HostIP, host = addr, host[i+1:]
	}
	hostLow, hostCount, err := parsePortRange(host, 0)
	if err != nil {
		return fail("host port: %v", err)
	}
	guestLow, guestCount, err := parsePortRange(guest, 1)
	if err != nil {
		return fail("sandbox port: %v", err)
	}
	if hostCount != guestCount {
		return fail("the host's range has %d ports, the sandbox's %d: want as many", hostCount, guestCount)
	}
	p.HostPort, p.GuestPort = uint16(hostLow), uint16(guestLow)
	if hostCount > 1 {
		if hostLow == 0 {
			return fail("host port: a range cannot start at 0")
		}
		p.Count = uint16(hostCount)
	}
	return p, nil
}

func parseHostIP(s string) (netip.Addr, error) {
	trimmed := s
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		trimmed = s[1 : len(s)-1]
	} else if strings.Contains(s, ":") {
		return netip.Addr{}, fmt.Errorf("address %q: an IPv6 address stands in brackets", s)
	}
	a, err := netip.ParseAddr(trimmed)
	if err != nil {
		return a, fmt.Errorf("address %q: want an IPv4 address or an IPv6 one in brackets", s)
	}
	return a.Unmap(), nil
}

func parsePortRange(s string, lowest int) (low, count int, err error) {
	first, last, isRange := strings.Cut(s, "-")
	low, err = parsePortNumber(first, lowest)
	if err != nil || !isRange {
		return low, 1, err
	}
	high, err := parsePortNumber(last, lowest)
	if err != nil {
		return 0, 0, err
	}
	if high < low {
		return 0, 0, fmt.Errorf("the range %s runs backwards", s)
	}
	if count = high - low + 1; count > MaxPortRange {
		return 0, 0, fmt.Errorf("the range %s has %d ports: the limit is %d", s, count, MaxPortRange)
	}
	return low, count, nil
}

func parsePortNumber(s string, lowest int) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || int(n) < lowest || strings.HasPrefix(s, "+") {
		return 0, fmt.Errorf("%q: want a number from %d to 65535", s, lowest)
	}
	return int(n), nil
}

// FormatPort formats a port in the syntax that ParsePort parses.
func FormatPort(p api.Port) string {
	var b strings.Builder
	if p.HostIP.IsValid() {
		if p.HostIP.Is6() {
			fmt.Fprintf(&b, "[%s]:", p.HostIP)
		} else {
			fmt.Fprintf(&b, "%s:", p.HostIP)
		}
	}
	span := func(low uint16) string {
		if p.Count > 1 {
			return fmt.Sprintf("%d-%d", low, int(low)+int(p.Count)-1)
		}
		return strconv.Itoa(int(low))
	}
	b.WriteString(span(p.HostPort) + ":" + span(p.GuestPort))
	if p.Proto == "udp" {
		b.WriteString("/udp")
	}
	return b.String()
}

// Expand returns the single ports of a range.
func Expand(p api.Port) []api.Port {
	n := max(int(p.Count), 1)
	out := make([]api.Port, n)
	for i := range out {
		out[i] = p
		out[i].Count = 0
		out[i].HostPort += uint16(i)
		out[i].GuestPort += uint16(i)
	}
	return out
}
