package sandbox

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/forwarder/sandbox/api"
)

func TestWellKnownPortsAreInOrder(t *testing.T) {
	if !slices.IsSorted(wellKnownPorts) || wellKnownPorts[0] < firstAutoPort {
		t.Errorf("the search in %v finds nothing reliably", wellKnownPorts)
	}
}

// A service of the host on one loopback address keeps the port on the other, and what the
// table itself opened is not taken for another's.
func TestPortsThatOthersHoldAreSeenInBothFamilies(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", at)
		must(t, err)
		defer l.Close()
		c, err := net.ListenPacket("udp", at)
		must(t, err)
		defer c.Close()
		table := portTable{open: listenOn}
		defer table.closeAll()
		made, err := table.add(api.Port{Proto: "tcp", HostIP: netip.MustParseAddrPort(at).Addr(), GuestPort: 80}, true, true)
		must(t, err)
		held := table.heldByOthers()
		for _, want := range []heldPort{
			{proto: "tcp", port: uint16(l.Addr().(*net.TCPAddr).Port)}, {proto: "udp", port: uint16(c.LocalAddr().(*net.UDPAddr).Port)},
		} {
			if !held[want] {
				t.Errorf("%s: %v is not seen", at, want)
			}
		}
		if own := (heldPort{proto: "tcp", port: made[0].port.HostPort}); held[own] {
			t.Errorf("%s: our own %v is taken for another's", at, own)
		}
	}
}

func TestASandboxCannotFillTheLogWithPorts(t *testing.T) {
	var warned []string
	a := &autoPublisher{
		made: make(map[autoPort]api.Port), refused: make(map[autoPort]bool),
		taken: func(api.Port) bool { return false }, held: func() map[heldPort]bool { return nil },
		publish: func(api.Port) ([]published, error) { t.Error("a reserved port is published"); return nil, nil },
		log:     newLogRing(time.Now, func(l api.LogLine) { warned = append(warned, l.Text) }),
	}
	for range 100 {
		for _, port := range []uint16{22, 5432} {
			a.update(map[autoPort]bool{{proto: "tcp", host: netip.AddrPortFrom(netip.IPv6Loopback(), port)}: true})
		}
	}
	if len(warned) != maxAutoWarnings+1 || !strings.Contains(warned[0], "publish it with -p 22:22") {
		t.Errorf("%d lines: %q", len(warned), warned)
	}
}
