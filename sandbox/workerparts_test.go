package sandbox

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/internal/worker"
)

func TestOnlyUpstreamServersAreDialled(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	testutil.Must(t, err)
	defer l.Close()
	at := netip.MustParseAddrPort(l.Addr().String())
	d := worker.NewUpstreamDialer(dns.Upstreams{})
	if _, err := d.Dial(t.Context(), "tcp", at); !errors.Is(err, worker.ErrNotUpstream) {
		t.Errorf("a server that is not on the list: %v", err)
	}
	d.Allow(dns.Upstreams{Servers: []netip.AddrPort{at}})
	c, err := d.Dial(t.Context(), "tcp", at)
	if err != nil {
		t.Fatalf("a server on the list: %v", err)
	}
	c.Close()
	d.Allow(dns.Upstreams{})
	if _, err := d.Dial(t.Context(), "udp", at); !errors.Is(err, worker.ErrNotUpstream) {
		t.Errorf("a server that has left the list: %v", err)
	}
}

func TestSocketStock(t *testing.T) {
	before := testutil.Descriptors(t, os.Getpid())
	asked := 0
	s := worker.NewSocketStock(func(bool) error { asked++; return nil })
	socket := func() int {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		testutil.Must(t, err)
		return fd
	}
	if _, ok := s.Stream(false); ok || asked != 0 {
		t.Errorf("without a port: ok=%v, asked %d", ok, asked)
	}
	v4, v6 := []netip.Addr{netip.MustParseAddr("10.0.2.100")}, []netip.Addr{netip.MustParseAddr("fd00::100")}
	s.Open(v4)
	s.Open(v4)
	if asked != worker.StockSize {
		t.Fatalf("asked for %d, want %d", asked, worker.StockSize)
	}
	for range worker.StockSize - 1 {
		s.Put(false, []int{socket()})
	}
	s.Put(false, nil) // one could not be made
	fd, ok := s.Stream(false)
	if !ok || asked != worker.StockSize+2 {
		t.Errorf("ok=%v, asked %d; want the one taken and the one missing asked for", ok, asked)
	}
	unix.Close(fd)
	s.Close(v4)
	if _, ok := s.Stream(true); ok {
		t.Error("an IPv4 socket for an IPv6 client")
	}
	s.Close(v4)
	s.Put(false, []int{socket()}) // was on its way
	if _, ok := s.Stream(false); ok {
		t.Error("a socket without a port")
	}
	if after := testutil.Descriptors(t, os.Getpid()); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}

	refused := worker.NewSocketStock(func(bool) error { return errTaken })
	refused.Open(v6)
	refused.Fill(true)
	if refused.Asked[1] != 0 {
		t.Errorf("%d counted as on their way after the channel failed", refused.Asked[1])
	}
}
