package nat

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// ours are the settings that the kernel does not have.
var ours = []string{
	"nf_conntrack_max_half_open", "nf_conntrack_max_per_destination", "nf_conntrack_max_new_per_second",
	"nf_conntrack_max_total_bytes", "nf_conntrack_udp_timeout_dns", "nf_conntrack_udp_timeout_inbound",
}

func TestEverySysctlReadsWhatWasSet(t *testing.T) {
	table := NewTable(Config{})
	for i, name := range SysctlNames() {
		if name == countName {
			continue
		}
		value := int64(1000 + i)
		if err := table.SetSysctl("net.netfilter."+name, strconv.FormatInt(value, 10)+"\n"); err != nil {
			t.Error(err)
		}
		if got, err := table.Sysctl(name); err != nil || got != value {
			t.Errorf("%s reads %d (%v) after %d was set", name, got, err, value)
		}
	}
	for i, name := range SysctlNames() { // and setting one did not change another
		if got, err := table.Sysctl(name); name != countName && (err != nil || got != int64(1000+i)) {
			t.Errorf("%s became %d (%v)", name, got, err)
		}
	}
	if got, err := table.Sysctl("net.netfilter.nf_conntrack_count"); got != 0 || err != nil {
		t.Errorf("nf_conntrack_count is %d, %v", got, err)
	}
}

func TestSetSysctlRefuses(t *testing.T) {
	for _, tt := range []struct {
		what, name, value string
		want              error
	}{
		{"a name that does not exist", "nf_conntrack_buckets", "1", ErrUnknownSysctl},
		{"the count", "nf_conntrack_count", "1", ErrReadOnlySysctl},
		{"no number", "nf_conntrack_max", "many", nil},
		{"a table of none", "nf_conntrack_max", "0", nil},
		{"a timeout of none", "nf_conntrack_udp_timeout", "0", nil},
		{"a timeout beyond the kernel's range", "nf_conntrack_udp_timeout", "2147483648", nil},
		{"a negative limit", "nf_conntrack_max_per_destination", "-1", nil},
	} {
		table := NewTable(Config{})
		err := table.SetSysctl(tt.name, tt.value)
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", tt.what, err)
		}
		if table.Limits() != (Limits{}).orDefault() || table.Timeouts() != DefaultTimeouts() {
			t.Errorf("%s changed something", tt.what)
		}
	}
	if _, err := NewTable(Config{}).Sysctl("nf_conntrack_nonsense"); !errors.Is(err, ErrUnknownSysctl) {
		t.Errorf("reading a name that does not exist: %v", err)
	}
}

// differ are the defaults that Timeouts' comments set apart from the kernel's.
var differ = []string{"nf_conntrack_tcp_timeout_time_wait", "nf_conntrack_tcp_timeout_close_wait", "nf_conntrack_udp_timeout"}

// TestDefaultsAreTheKernels compares with the running kernel where it has conntrack.
func TestDefaultsAreTheKernels(t *testing.T) {
	const dir = "/proc/sys/net/netfilter"
	if _, err := os.Stat(filepath.Join(dir, "nf_conntrack_max")); err != nil {
		t.Skipf("the kernel has no conntrack loaded: %v", err)
	}
	table := NewTable(Config{})
	for _, name := range SysctlNames() {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if isOurs := slices.Contains(ours, name); isOurs != errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: ours alone: %v; the kernel says %v", name, isOurs, err)
		}
		if err != nil || !strings.Contains(name, "timeout") || slices.Contains(differ, name) {
			continue
		}
		got, _ := table.Sysctl(name)
		if want, _ := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64); got != want {
			t.Errorf("%s is %d, the kernel's is %d", name, got, want)
		}
	}
}

func TestSetTimeoutsAppliesToFlowsThatExist(t *testing.T) {
	clock := newFakeClock()
	table := NewTable(Config{Now: clock.now})
	acquire(t, table, Spec{Orig: numbered(6, 1)}).SetState(Established)
	if err := table.SetSysctl("nf_conntrack_tcp_timeout_established", "5"); err != nil {
		t.Fatal(err)
	}
	clock.advance(5*time.Second + 1<<grainBits)
	if table.Expire(clock.t); table.Len() != 0 {
		t.Error("the flow outlives the new timeout")
	}
}
