package forwarder

// Setting up netstack: one NIC, every destination accepted and every source
// spoofable (policy sits in the forwarders, not in the stack), TCP tuned for a
// link that loses nothing.

import (
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/forwarder/internal/tcpmem"
)

// newStack makes a stack whose segments for endpoints go through queue.
func newStack(queue *tcpflow.Queue) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			arp.NewProtocol,
			ipv4.NewProtocol,
			// No duplicate address detection and no router discovery of our
			// own: the addresses on this link are ours by construction.
			ipv6.NewProtocolWithOptions(ipv6.Options{}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcpflow.NewProtocol(queue), udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
	})
	sack := tcpip.TCPSACKEnabled(true)
	cubic := tcpip.CongestionControlOption("reno")
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcpmem.BufferMin, Default: tcpmem.ReceiveStart, Max: tcpmem.BufferMax}
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: tcpmem.BufferMin, Default: tcpmem.BufferDefault, Max: tcpmem.BufferMax}
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	// The forwarder takes an endpoint out of the demultiplexer as soon as it reaches TIME_WAIT
	// (tcpflow/handshake.go), so the state need not hold memory.
	timeWait := tcpip.TCPTimeWaitTimeoutOption(tcpflow.StackTimeWait)
	// The link loses nothing, but reorders packets when a flow moves to another thread, because the
	// sandbox's kernel queues them by processor. RACK, whose reordering window is a quarter of a
	// round trip of some µs, takes that for loss hundreds of times a second, and now and then a
	// flow hangs for good (tun.TestKernelDevice on a busy machine).
	recovery := tcpip.TCPRecovery(0)
	for _, o := range []tcpip.SettableTransportProtocolOption{&recovery, &sack, &cubic, &rcv, &snd, &moderate, &timeWait} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			s.Destroy()
			return nil, fmt.Errorf("setting a TCP option of the stack (%T): %s", o, err)
		}
	}
	return s, nil
}

// attachLink gives the stack its NIC, addresses and routes.
func attachLink(s *stack.Stack, l stack.LinkEndpoint, cfg *Config, linkLocal netip.Addr) error {
	var opts stack.NICOptions
	if q, ok := cfg.Link.(interface {
		QDisc() stack.QueueingDiscipline
	}); ok {
		opts.QDisc = q.QDisc() // the stack's own allocates for each packet
	}
	if err := s.CreateNICWithOptions(packet.NICID, l, opts); err != nil {
		return fmt.Errorf("attaching the link to the stack: %s", err)
	}
	if err := s.SetPromiscuousMode(packet.NICID, true); err != nil {
		return fmt.Errorf("accepting every destination: %s", err)
	}
	if err := s.SetSpoofing(packet.NICID, true); err != nil {
		return fmt.Errorf("allowing every source: %s", err)
	}
	own := append(append([]netip.Addr{}, cfg.Gateway...), cfg.DNS...)
	own = append(own, linkLocal)
	seen := make(map[netip.Addr]bool)
	for _, a := range own {
		if !a.IsValid() || seen[a] {
			continue
		}
		seen[a] = true
		pa := tcpip.ProtocolAddress{Protocol: packet.NetProto(a), AddressWithPrefix: packet.StackAddr(a).WithPrefix()}
		if err := s.AddProtocolAddress(packet.NICID, pa, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("giving the stack the address %s: %s", a, err)
		}
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: packet.NICID},
		{Destination: header.IPv6EmptySubnet, NIC: packet.NICID},
	})
	return nil
}
