package nat

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Errors of SetSysctl and Sysctl.
var (
	ErrUnknownSysctl  = errors.New("no such setting")
	ErrReadOnlySysctl = errors.New("setting is read-only")
)

const sysctlPrefix = "net.netfilter."

// timeoutNames are the settings of Timeouts.fields, in its order; all in seconds.
var timeoutNames = [...]string{
	"nf_conntrack_tcp_timeout_syn_sent", "nf_conntrack_tcp_timeout_syn_recv", "nf_conntrack_tcp_timeout_established",
	"nf_conntrack_tcp_timeout_fin_wait", "nf_conntrack_tcp_timeout_close_wait", "nf_conntrack_tcp_timeout_last_ack",
	"nf_conntrack_tcp_timeout_time_wait", "nf_conntrack_tcp_timeout_close",
	"nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream", "nf_conntrack_udp_timeout_dns",
	"nf_conntrack_udp_timeout_inbound",
	"nf_conntrack_icmp_timeout", "nf_conntrack_icmpv6_timeout", "nf_conntrack_generic_timeout",
}

// limitNames are those of Limits. The kernel has only the first; the others follow its naming. 0
// means "no bound" where Limits says so.
var limitNames = [...]string{
	"nf_conntrack_max", "nf_conntrack_max_half_open", "nf_conntrack_max_per_destination",
	"nf_conntrack_max_new_per_second", "nf_conntrack_max_total_bytes",
}

const countName = "nf_conntrack_count"

// SysctlNames returns all names that Sysctl knows, sorted.
func SysctlNames() []string {
	names := append([]string{countName}, timeoutNames[:]...)
	names = append(names, limitNames[:]...)
	slices.Sort(names)
	return names
}

// Sysctl reads a setting by its nf_conntrack_* name, with or without the prefix
// "net.netfilter.". Times are in whole seconds.
func (t *Table) Sysctl(name string) (int64, error) {
	name = strings.TrimPrefix(name, sysctlPrefix)
	if name == countName {
		return int64(t.Len()), nil
	}
	if i := slices.Index(timeoutNames[:], name); i >= 0 {
		to := t.Timeouts()
		return int64(*to.fields()[i] / time.Second), nil
	}
	l := t.Limits()
	switch slices.Index(limitNames[:], name) {
	case 0:
		return int64(l.Max), nil
	case 1:
		return int64(l.HalfOpen), nil
	case 2:
		return int64(l.PerDestination), nil
	case 3:
		return int64(l.NewPerSecond), nil
	case 4:
		return l.TotalBytes, nil
	}
	return 0, fmt.Errorf("reading %q: %w", name, ErrUnknownSysctl)
}

// SetSysctl changes a setting by its name. Times are whole seconds, 1 to 2^31-1, as the kernel
// takes them. Concurrent calls may overwrite each other's change.
func (t *Table) SetSysctl(name, value string) error {
	name = strings.TrimPrefix(name, sysctlPrefix)
	n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
	if err != nil {
		return fmt.Errorf("setting %s: %q is not a whole number", name, value)
	}
	if name == countName {
		return fmt.Errorf("setting %s: %w", name, ErrReadOnlySysctl)
	}
	if i := slices.Index(timeoutNames[:], name); i >= 0 {
		if n < 1 || n > math.MaxInt32 {
			return fmt.Errorf("setting %s: %d is not between 1 and %d seconds", name, n, math.MaxInt32)
		}
		to := t.Timeouts()
		*to.fields()[i] = time.Duration(n) * time.Second
		t.SetTimeouts(to)
		return nil
	}
	i := slices.Index(limitNames[:], name)
	least, most := int64(0), int64(math.MaxInt32)
	switch i {
	case -1:
		return fmt.Errorf("setting %q: %w", name, ErrUnknownSysctl)
	case 0, 1:
		least = 1
	case 4:
		most = math.MaxInt64
	}
	if n < least || n > most {
		return fmt.Errorf("setting %s: %d is not between %d and %d", name, n, least, most)
	}
	l := t.Limits()
	switch i {
	case 0:
		l.Max = int(n)
	case 1:
		l.HalfOpen = int(n)
	case 2:
		l.PerDestination = int(n)
	case 3:
		l.NewPerSecond = int(n)
	case 4:
		l.TotalBytes = n
	}
	t.SetLimits(l)
	return nil
}
