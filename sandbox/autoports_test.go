package sandbox

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/ports"
)

func TestWellKnownPortsAreInOrder(t *testing.T) {
	if !slices.IsSorted(ports.WellKnownPorts) || ports.WellKnownPorts[0] < ports.FirstAutoPort {
		t.Errorf("the search in %v finds nothing reliably", ports.WellKnownPorts)
	}
}

// A service of the host on one loopback address keeps the port on the other too, and what the table
// itself opened does not count as another program's.
func TestPortsThatOthersHoldAreSeenInBothFamilies(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", at)
		testutil.Must(t, err)
		defer l.Close()
		c, err := net.ListenPacket("udp", at)
		testutil.Must(t, err)
		defer c.Close()
		table := ports.PortTable{Open: ports.ListenOn}
		defer table.CloseAll()
		made, err := table.Add(api.Port{Proto: "tcp", HostIP: netip.MustParseAddrPort(at).Addr(), GuestPort: 80}, true, true)
		testutil.Must(t, err)
		held := table.HeldByOthers()
		for _, want := range []ports.HeldPort{
			{Proto: "tcp", Port: uint16(l.Addr().(*net.TCPAddr).Port)}, {Proto: "udp", Port: uint16(c.LocalAddr().(*net.UDPAddr).Port)},
		} {
			if !held[want] {
				t.Errorf("%s: %v is not seen", at, want)
			}
		}
		if own := (ports.HeldPort{Proto: "tcp", Port: made[0].Port.HostPort}); held[own] {
			t.Errorf("%s: our own %v is taken for another's", at, own)
		}
	}
}

func TestASandboxCannotFillTheLogWithPorts(t *testing.T) {
	var warned []string
	a := &autoPublisher{
		made: make(map[ports.AutoPort]api.Port), refused: make(map[ports.AutoPort]bool),
		taken: func(api.Port) bool { return false }, held: func() map[ports.HeldPort]bool { return nil },
		publish: func(api.Port) ([]ports.Published, error) { t.Error("a reserved port is published"); return nil, nil },
		log:     logring.NewLogRing(time.Now, func(l api.LogLine) { warned = append(warned, l.Text) }),
	}
	for range 100 {
		for _, port := range []uint16{22, 5432} {
			a.update(map[ports.AutoPort]bool{{Proto: "tcp", Host: netip.AddrPortFrom(netip.IPv6Loopback(), port)}: true})
		}
	}
	if len(warned) != maxAutoWarnings+1 || !strings.Contains(warned[0], "publish it with -p 22:22") {
		t.Errorf("%d lines: %q", len(warned), warned)
	}
}
