package forwarder

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/pipe"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// The guest is a second netstack, joined to the forwarder by an in-memory pipe:
//
//	guest stack 10.0.2.100, fd00::100 ══ pipe ══ Forwarder 10.0.2.2, .3 ─► host loopback
var (
	guest4   = netip.MustParseAddr("10.0.2.100")
	guest6   = netip.MustParseAddr("fd00::100")
	gateway4 = netip.MustParseAddr("10.0.2.2")
	gateway6 = netip.MustParseAddr("fd00::2")
	dns4     = netip.MustParseAddr("10.0.2.3")
	dns6     = netip.MustParseAddr("fd00::3")
)

type guest struct {
	t     *testing.T
	f     *Forwarder
	table *nat.Table
	stack *stack.Stack
	link  *pipe.Endpoint
}

// allowAll opens the host's loopback behind the gateway's address, and everything else.
const allowAll = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: test}
spec:
  defaultAction: reject
  egress:
  - {name: loopback, action: allow, to: [{entity: host-loopback}]}
  - {name: world, action: allow, to: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}]}
  ingress:
  - {name: published, action: allow}
`

func compile(t testing.TB, text string) *policy.Rules {
	t.Helper()
	p, err := policy.Parse("test.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	r, err := policy.Compile(p, policy.Environment{
		Gateway4: gateway4, Gateway6: gateway6, DNS4: dns4, DNS6: dns6, HostLoopback: true,
		Guest: []netip.Addr{guest4, guest6},
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// newGuest starts a forwarder under the policy, and a guest behind it. Both end, with everything
// they hold, before the test does.
func newGuest(t *testing.T, text string, change func(*Config)) *guest {
	t.Helper()
	inside, outside := pipe.New("\x02\x00\x00\x00\x00\x01", "\x02\x00\x00\x00\x00\x02", 1500)
	g := &guest{t: t, link: inside, table: nat.NewTable(nat.Config{})}
	cfg := Config{
		Link: outside, MTU: 1500, Table: g.table,
		Guest: []netip.Addr{guest4, guest6}, Gateway: []netip.Addr{gateway4, gateway6}, DNS: []netip.Addr{dns4, dns6},
		Prefix4: netip.MustParsePrefix("10.0.2.0/24"),
	}
	if change != nil {
		change(&cfg)
	}
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	g.f = f
	g.stack = newGuestStack(t, inside)
	f.SetRules(compile(t, text))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() {
		g.stack.Destroy()
		cancel()
		wg.Wait()
		if n := f.dialer.Sockets.Load(); n != 0 {
			t.Errorf("%d host sockets left open", n)
		}
		if n := g.table.Len(); n != 0 {
			t.Errorf("%d flows left in the table", n)
		}
		checkRepaid(t, f.gate.Memory)
	})
	return g
}

func newGuestStack(t *testing.T, l stack.LinkEndpoint) *stack.Stack {
	t.Helper()
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{arp.NewProtocol, ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	if err := s.CreateNIC(1, l); err != nil {
		t.Fatal(err)
	}
	for _, a := range []netip.Addr{guest4, guest6} {
		pa := tcpip.ProtocolAddress{Protocol: packet.NetProto(a), AddressWithPrefix: packet.StackAddr(a).WithPrefix()}
		if err := s.AddProtocolAddress(1, pa, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}, {Destination: header.IPv6EmptySubnet, NIC: 1}})
	return s
}

// dial connects from inside the guest.
func (g *guest) dial(to netip.AddrPort) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return gonet.DialContextTCP(ctx, g.stack, tcpip.FullAddress{NIC: 1, Addr: packet.StackAddr(to.Addr()), Port: to.Port()}, packet.NetProto(to.Addr()))
}

// dialContext is dial for an http.Transport. It dials addrA, whatever the host name.
func (g *guest) dialContext(_ context.Context, _, to string) (net.Conn, error) {
	_, port, err := net.SplitHostPort(to)
	if err != nil {
		return nil, err
	}
	return g.dial(netip.MustParseAddrPort(addrA.String() + ":" + port))
}

func (g *guest) mustDial(to netip.AddrPort) *gonet.TCPConn {
	g.t.Helper()
	c, err := g.dial(to)
	if err != nil {
		g.t.Fatalf("dialling %s from the guest: %v", to, err)
	}
	g.t.Cleanup(func() { c.Close() })
	return c
}

// listen serves each connection on the host's loopback with handle, and returns the address by
// which the guest reaches it.
func (g *guest) listen(network string, handle func(*net.TCPConn)) netip.AddrPort {
	g.t.Helper()
	gw, addr := gateway4, "127.0.0.1:0"
	if network == "tcp6" {
		gw, addr = gateway6, "[::1]:0"
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		g.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer c.Close(); handle(c.(*net.TCPConn)) })
		}
	})
	g.t.Cleanup(func() { l.Close() })
	return netip.AddrPortFrom(gw, uint16(l.Addr().(*net.TCPAddr).Port))
}

func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

// isReset reports whether only an RST makes such a connection error.
func isReset(err error) bool {
	var oe *net.OpError
	return errors.As(err, &oe) && (oe.Err.Error() == "connection reset by peer" || oe.Err.Error() == "connection was refused")
}

func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: packet.StackAddr(a.Addr()), Port: a.Port()}
}
