package sandbox

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/host"
)

func TestTheHostTakesMoreThanItsAddresses(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root to make network namespaces")
	}
	// The thread is in a namespace of its own and dies with the goroutine.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	ip("link", "set", "lo", "up")
	ip("link", "add", "d0", "type", "veth", "peer", "name", "d1")
	ip("link", "set", "d0", "up")
	ip("addr", "add", "192.0.2.5/24", "brd", "+", "dev", "d0")
	ip("addr", "add", "2001:db8:1::5/64", "dev", "d0", "nodad")
	ip("route", "add", "local", "203.0.113.0/24", "dev", "lo")
	ip("rule", "add", "fwmark", "1", "lookup", "100")
	ip("route", "add", "local", "default", "dev", "lo", "table", "100")
	ip("rule", "add", "from", "192.0.2.0/24", "lookup", "101")
	ip("route", "add", "local", "198.51.100.0/25", "dev", "lo", "table", "101")
	got, err := host.HostRanges()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"192.0.2.5/32", "192.0.2.255/32", "2001:db8:1::5/128", "2001:db8:1::/128", "203.0.113.0/24", "198.51.100.0/25"} {
		if !slices.Contains(got, netip.MustParsePrefix(want)) {
			t.Errorf("%s is missing from %v", want, got)
		}
	}
	for _, p := range got {
		if p.Addr().IsLoopback() || p.Bits() == 0 {
			t.Errorf("%v is taken for the host's", p)
		}
	}

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	late, seen, looked := netip.MustParsePrefix("2001:db8:f::/48"), false, 0
	err = host.WatchHostRanges(ctx, func(list []netip.Prefix, err error) {
		switch {
		case err != nil:
			t.Error(err)
		case !slices.Contains(list, late):
			ip("-6", "route", "add", "local", late.String(), "dev", "lo")
		default:
			seen = true
			cancel()
		}
	}, func() { looked++ })
	if looked < 2 {
		t.Errorf("looked was called %d times, for the first look and a new route", looked)
	}
	if err != nil || !seen {
		t.Errorf("a route that was added was not seen: %v", err)
	}
}
