package forwarder

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/internal/testutil"
)

// stallingLink is a link whose writers wait while the sandbox reads nothing: the worst that a
// device can do.
type stallingLink struct {
	stack.LinkEndpoint
	mu   sync.RWMutex // held for writing while it stalls
	wait atomic.Int32 // waiting writers
}

func (l *stallingLink) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	l.wait.Add(1)
	l.mu.RLock()
	l.wait.Add(-1)
	defer l.mu.RUnlock()
	return l.LinkEndpoint.WritePackets(pkts)
}

// TestASandboxThatReadsNothingCannotHoldUpAPolicy has connections of both families whose bytes wait
// for the sandbox, while datagrams go out.
func TestASandboxThatReadsNothingCannotHoldUpAPolicy(t *testing.T) {
	link := new(stallingLink)
	g := newGuest(t, allowAll, func(c *Config) { link.LinkEndpoint, c.Link = c.Link, link })
	ended := make(chan error, 2)
	source := func(c *net.TCPConn) {
		// It must learn of the end by a reset, not by bytes that no reader takes.
		_, err := c.Write(make([]byte, 64<<20))
		ended <- err
	}
	for _, network := range []string{"tcp4", "tcp6"} {
		c := g.mustDial(g.listen(network, source))
		if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	server, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	to := full(netip.AddrPortFrom(gateway4, server.LocalAddr().(*net.UDPAddr).AddrPort().Port()))
	datagrams, err := gonet.DialUDP(g.stack, nil, &to, header.IPv4ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer datagrams.Close()
	heard := func(wait time.Duration) bool {
		_, _ = datagrams.Write([]byte("out"))
		_ = server.SetReadDeadline(time.Now().Add(wait))
		_, err := server.Read(make([]byte, 10))
		return err == nil
	}
	if !heard(5 * time.Second) {
		t.Fatal("no datagram came out")
	}
	link.mu.Lock()
	unstall := sync.OnceFunc(link.mu.Unlock)
	defer unstall()
	testutil.Eventually(t, "somebody waits for the device", func() bool { return link.wait.Load() > 0 })
	if !heard(5 * time.Second) {
		t.Fatal("no datagram comes out while the sandbox reads nothing")
	}

	set := make(chan time.Duration, 1)
	go func() {
		start := time.Now()
		g.f.SetRules(compile(t, refuseAll))
		set <- time.Since(start)
	}()
	select {
	case took := <-set:
		if took > 2*time.Second {
			t.Errorf("the policy was in force after %v", took)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the policy is still not in force")
	}
	if heard(300 * time.Millisecond) {
		t.Error("datagrams still come out")
	}
	for range 2 {
		select {
		case err := <-ended:
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("a server that was sending saw %v, want a reset", err)
			}
		case <-time.After(2 * time.Second):
			t.Error("a server's connection is still open")
		}
	}
	unstall()
	testutil.Eventually(t, "nothing is left once the sandbox reads", func() bool { return g.table.Len() == 0 })
}
