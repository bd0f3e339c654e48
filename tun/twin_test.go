package tun

import (
	"encoding/binary"
	"net"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"golang.org/x/sys/unix"
)

// The twin of a kernel device: one end of a SOCK_SEQPACKET pair, which keeps frames
// whole as a TUN descriptor does. What the kernel would do, the test does by hand.

var (
	gatewayMAC = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x01}
	guestMAC   = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x64}

	allOffloads = Features{Checksum: true, TSO: true, USO: true}
)

const (
	gateway4, guest4 = "10.0.2.2", "10.0.2.100"
	gateway6, guest6 = "fd00:2::2", "fd00:2::100"
)

// newTwin returns a Device and the peer that plays the container's kernel. The
// caller closes neither.
func newTwin(t testing.TB, cfg Config, features Features) (*Device, int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err = cfg.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	d := &Device{name: "twin0", cfg: cfg, features: features, fds: pair[:1]}
	if err := unix.SetNonblock(pair[1], false); err != nil {
		t.Fatal(err)
	}
	timeout := unix.NsecToTimeval(int64(10 * time.Second))
	if err := unix.SetsockoptTimeval(pair[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = d.Close()
		_ = unix.Close(pair[1])
	})
	return d, pair[1]
}

func newTwinEndpoint(t testing.TB, cfg Config, features Features) (*Endpoint, int) {
	t.Helper()
	d, peer := newTwin(t, cfg, features)
	e, err := NewEndpoint(d, EndpointConfig{LinkAddr: gatewayMAC, GuestAddr: guestMAC})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Close()
		e.Wait()
	})
	poll(t, e)
	return e, peer
}

// poll does for a test what an endpoint's user does: it waits for the queues, and
// reads them.
func poll(t testing.TB, e *Endpoint) {
	t.Helper()
	err := e.PollQueues(func(fd int, read func() bool) error {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		var wg sync.WaitGroup
		wg.Go(func() { // ends with the endpoint
			for {
				select {
				case <-e.Done():
					return
				default:
				}
				if n, _ := unix.Poll(fds, 20); n <= 0 || !e.IsAttached() {
					time.Sleep(time.Millisecond)
					continue
				}
				for read() {
				}
			}
		})
		t.Cleanup(func() {
			e.Close()
			wg.Wait()
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// sink is a dispatcher that reports what it got.
type sink struct {
	frames chan delivered
	keeps  bool
}

type delivered struct {
	proto     tcpip.NetworkProtocolNumber
	pktType   tcpip.PacketType
	validated bool
	segment   uint16
	open      bool   // the checksum is, and the packet says where it is
	data      []byte // from the network header on
}

func newSink(keeps bool) *sink { return &sink{frames: make(chan delivered, 64), keeps: keeps} }

func (s *sink) KeepsRXChecksumValidated() bool { return s.keeps }

func (s *sink) DeliverNetworkPacket(p tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	data, gso := stack.PayloadSince(pkt.NetworkHeader()).AsSlice(), pkt.GSOOptions
	if gso.NeedsCsum && int(gso.L3HdrLen)+int(gso.CsumOffset)+2 > len(data) {
		panic("a checksum outside of the packet")
	}
	s.frames <- delivered{p, pkt.PktType, pkt.RXChecksumValidated, gso.MSS, gso.NeedsCsum, data}
}

func (*sink) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

func (s *sink) next(t testing.TB) delivered {
	t.Helper()
	select {
	case d := <-s.frames:
		return d
	case <-time.After(10 * time.Second):
		t.Fatal("no packet was delivered within ten seconds")
		panic("unreachable")
	}
}

// keeper is how a real user of the endpoint respects checksum state.
type keeper struct {
	stack.NetworkDispatcher
	link *keeperLink
}

// keeperLink is the endpoint with keeper in front of the NIC.
type keeperLink struct {
	*Endpoint
	v4, v6 stack.NetworkEndpoint
	ready  chan struct{} // closed when v4 and v6 are set
}

func (l *keeperLink) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.Endpoint.Attach(nil)
		return
	}
	l.Endpoint.Attach(&keeper{d, l})
}

func (k *keeper) KeepsRXChecksumValidated() bool {
	select {
	case <-k.link.ready:
		return true
	default:
		return false
	}
}

func (k *keeper) DeliverNetworkPacket(p tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	switch {
	case !k.KeepsRXChecksumValidated():
	case p == header.IPv4ProtocolNumber:
		k.link.v4.HandlePacket(pkt)
		return
	case p == header.IPv6ProtocolNumber:
		k.link.v6.HandlePacket(pkt)
		return
	}
	k.NetworkDispatcher.DeliverNetworkPacket(p, pkt)
}

const testNIC = 1

// newStack puts a netstack host with the gateway's addresses behind e.
func newStack(t testing.TB, e *Endpoint, keep bool) *stack.Stack {
	t.Helper()
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	t.Cleanup(func() {
		// In this order: Destroy waits for readers with the stack's lock held, and a
		// reader that is delivering may want that lock.
		e.Close()
		e.Wait()
		s.Destroy()
	})
	var link stack.LinkEndpoint = e
	kl := &keeperLink{Endpoint: e, ready: make(chan struct{})}
	if keep {
		link = kl
	}
	fail := func(what string, err tcpip.Error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %s", what, err)
		}
	}
	// As in the forwarder, which says why.
	recovery := tcpip.TCPRecovery(0)
	fail("switching RACK off", s.SetTransportProtocolOption(tcp.ProtocolNumber, &recovery))
	fail("CreateNIC", s.CreateNICWithOptions(testNIC, link, stack.NICOptions{QDisc: e.QDisc()}))
	if keep {
		var err tcpip.Error
		kl.v4, err = s.GetNetworkEndpoint(testNIC, header.IPv4ProtocolNumber)
		fail("IPv4 endpoint", err)
		kl.v6, err = s.GetNetworkEndpoint(testNIC, header.IPv6ProtocolNumber)
		fail("IPv6 endpoint", err)
		close(kl.ready)
	}
	for _, a := range []struct {
		proto  tcpip.NetworkProtocolNumber
		ip     net.IP
		prefix int
	}{
		{header.IPv4ProtocolNumber, net.ParseIP(gateway4).To4(), 24},
		{header.IPv6ProtocolNumber, net.ParseIP(gateway6), 64},
	} {
		fail("AddProtocolAddress", s.AddProtocolAddress(testNIC, tcpip.ProtocolAddress{
			Protocol:          a.proto,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFromSlice(a.ip), PrefixLen: a.prefix},
		}, stack.AddressProperties{}))
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: testNIC}, {Destination: header.IPv6EmptySubnet, NIC: testNIC}})
	return s
}

// Frames by hand.

func ethernet(dst, src net.HardwareAddr, etherType uint16, payload []byte) []byte {
	b := append(append([]byte(nil), dst...), src...)
	b = binary.BigEndian.AppendUint16(b, etherType)
	return append(b, payload...)
}

func ipv4Packet(proto uint8, payload []byte) []byte {
	b := make([]byte, header.IPv4MinimumSize, header.IPv4MinimumSize+len(payload))
	h := header.IPv4(b)
	h.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(b) + len(payload)), TTL: 64, Protocol: proto,
		SrcAddr: address(guest4), DstAddr: address(gateway4),
	})
	h.SetChecksum(^h.CalculateChecksum())
	return append(b, payload...)
}

func ipv6Packet(next uint8, payload []byte) []byte {
	b := make([]byte, header.IPv6MinimumSize, header.IPv6MinimumSize+len(payload))
	header.IPv6(b).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(payload)), TransportProtocol: tcpip.TransportProtocolNumber(next), HopLimit: 64,
		SrcAddr: address(guest6), DstAddr: address(gateway6),
	})
	return append(b, payload...)
}

func address(s string) tcpip.Address {
	ip := net.ParseIP(s)
	if v4 := ip.To4(); v4 != nil {
		ip = v4
	}
	return tcpip.AddrFromSlice(ip)
}

// udpDatagram has its checksum field left as the kernel leaves it for offload.
func udpDatagram(payload []byte) []byte {
	b := make([]byte, header.UDPMinimumSize, header.UDPMinimumSize+len(payload))
	h := header.UDP(b)
	length := uint16(len(b) + len(payload))
	h.Encode(&header.UDPFields{SrcPort: 4000, DstPort: 7, Length: length})
	h.SetChecksum(header.PseudoHeaderChecksum(header.UDPProtocolNumber, address(guest4), address(gateway4), length))
	return append(b, payload...)
}

func tcpSegment(payload []byte) []byte {
	b := make([]byte, header.TCPMinimumSize, header.TCPMinimumSize+len(payload))
	header.TCP(b).Encode(&header.TCPFields{SrcPort: 4000, DstPort: 7, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagAck})
	return append(b, payload...)
}

// withVnet puts h before the frame.
func withVnet(h vnetHeader, frame []byte) []byte {
	var b [vnetHeaderLen]byte
	h.encode(&b)
	return append(b[:], frame...)
}

func send(t testing.TB, peer int, frame []byte) {
	t.Helper()
	_, err := unix.Write(peer, frame)
	for err == unix.EINTR {
		_, err = unix.Write(peer, frame)
	}
	if err != nil {
		t.Fatalf("sending a frame of %d bytes: %v", len(frame), err)
	}
}

func receive(t testing.TB, peer int) (vnetHeader, []byte) {
	t.Helper()
	b := make([]byte, vnetHeaderLen+maxFrame)
	n, err := unix.Read(peer, b)
	for err == unix.EINTR {
		n, err = unix.Read(peer, b)
	}
	if err != nil || n < vnetHeaderLen {
		t.Fatalf("receiving a frame: %d bytes, %v", n, err)
	}
	return decodeVnet((*[vnetHeaderLen]byte)(b)), b[vnetHeaderLen:n]
}
