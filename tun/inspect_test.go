package tun

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const etherIPv4, etherIPv6, etherARP = 0x0800, 0x86dd, 0x0806

// edit returns a copy of b with the byte at i replaced.
func edit(b []byte, i int, v byte) []byte {
	b = bytes.Clone(b)
	b[i] = v
	return b
}

// refixIPv4 makes the header checksum of a TAP frame right again after an edit.
func refixIPv4(frame []byte) []byte {
	h := header.IPv4(frame[ethernetHeaderLen:])
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	return frame
}

func toGateway(etherType uint16, payload []byte) []byte {
	return ethernet(gatewayMAC, guestMAC, etherType, payload)
}

var (
	udpFrame  = toGateway(etherIPv4, ipv4Packet(17, udpDatagram(make([]byte, 3000))))
	tcpFrame  = toGateway(etherIPv4, ipv4Packet(6, tcpSegment(make([]byte, 3000))))
	tcp6Frame = toGateway(etherIPv6, ipv6Packet(6, tcpSegment(make([]byte, 3000))))
	open4     = vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 16}
)

// malformed has a frame for each reason that inspect gives.
func malformed() []struct {
	name  string
	frame []byte
	want  reason
} {
	plain := func(frame []byte) []byte { return withVnet(vnetHeader{}, frame) }
	vnet := func(h vnetHeader, change func(*vnetHeader), frame []byte) []byte {
		change(&h)
		return withVnet(h, frame)
	}
	stranger := net.HardwareAddr{2, 9, 9, 9, 9, 9}
	ip := ipv4Packet(17, udpDatagram(make([]byte, 30)))
	fragment := refixIPv4(edit(udpFrame, ethernetHeaderLen+6, 0x20))
	return []struct {
		name  string
		frame []byte
		want  reason
	}{
		{"less than a virtio-net header", make([]byte, vnetHeaderLen-1), shortVnetHeader},
		{"nothing behind the virtio-net header", plain(nil), shortFrame},
		{"less than an Ethernet header", plain(udpFrame[:13]), shortFrame},
		{"more than any IP packet", plain(toGateway(etherIPv4, make([]byte, 65535+5))), oversizedFrame},
		{"a frame for somebody else", plain(ethernet(stranger, guestMAC, etherIPv4, ip)), foreignDestination},
		{"a frame from a group address", plain(ethernet(gatewayMAC, net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}, etherIPv4, ip)), badSource},
		{"a frame from nobody", plain(ethernet(gatewayMAC, make([]byte, 6), etherIPv4, ip)), badSource},
		{"a frame that claims to be ours", plain(ethernet(gatewayMAC, gatewayMAC, etherIPv4, ip)), badSource},
		{"an 802.1Q tag", plain(toGateway(0x8100, append([]byte{0, 5, 8, 0}, ip...))), vlanTagged},
		{"an 802.1ad tag", plain(toGateway(0x88a8, append([]byte{0, 5, 8, 0}, ip...))), vlanTagged},
		{"an 802.3 length instead of a type", plain(toGateway(0x0026, make([]byte, 38))), notEthernetII},
		{"an EtherType nobody here speaks", plain(toGateway(0x88cc, make([]byte, 60))), unknownEtherType},
		{"a short ARP packet", plain(toGateway(etherARP, make([]byte, 27))), shortARP},
		{"a short IPv4 header", plain(toGateway(etherIPv4, ip[:19])), shortIP},
		{"a short IPv6 header", plain(tcp6Frame[:ethernetHeaderLen+39]), shortIP},
		{"IPv6 in an IPv4 frame", plain(edit(udpFrame, ethernetHeaderLen, 0x65)), badIPVersion},
		{"IPv4 in an IPv6 frame", plain(edit(tcp6Frame, ethernetHeaderLen, 0x45)), badIPVersion},
		{"an IPv4 header of 16 bytes", plain(edit(udpFrame, ethernetHeaderLen, 0x44)), badIPHeaderLength},
		{"an IPv4 header longer than the packet", plain(toGateway(etherIPv4, edit(ip, 0, 0x4f)[:40])), badIPHeaderLength},
		{"an IPv4 packet shorter than its length", plain(udpFrame[:len(udpFrame)-1]), badIPLength},
		{"an IPv4 length smaller than its header", plain(refixIPv4(edit(edit(udpFrame, 16, 0), 17, 19))), badIPLength},
		{"an IPv6 packet shorter than its length", plain(tcp6Frame[:len(tcp6Frame)-1]), badIPLength},
		{"a wrong IPv4 header checksum", plain(edit(udpFrame, ethernetHeaderLen+8, 63)), badIPChecksum},
		{"a checksum inside the link header", vnet(open4, func(h *vnetHeader) { h.csumStart = 0 }, tcpFrame), checksumOutOfRange},
		{"a checksum that starts beyond the frame", vnet(open4, func(h *vnetHeader) { h.csumStart = 60000 }, tcpFrame), checksumOutOfRange},
		{"a checksum stored beyond the frame", vnet(open4, func(h *vnetHeader) { h.csumOffset = 65535 }, tcpFrame), checksumOutOfRange},
		{"a checksum stored half in the frame", vnet(open4, func(h *vnetHeader) { h.csumOffset = uint16(len(tcpFrame) - 34 - 1) }, tcpFrame), checksumOutOfRange},
		{"an open checksum on a fragment", vnet(open4, func(h *vnetHeader) { h.csumOffset = 6 }, fragment), checksumOnFragment},
		{"UFO, which is never offered", vnet(open4, func(h *vnetHeader) { h.gsoType, h.gsoSize = 3, 1000 }, tcpFrame), unknownGSOType},
		{"a gso_type out of thin air", vnet(open4, func(h *vnetHeader) { h.gsoType, h.gsoSize = 77, 1000 }, tcpFrame), unknownGSOType},
		{"a segment size of zero", vnet(open4, func(h *vnetHeader) { h.gsoType = gsoTCPv4 }, tcpFrame), gsoZeroSize},
		{"a TCP segment that is UDP", vnet(open4, func(h *vnetHeader) { h.gsoType, h.gsoSize, h.csumOffset = gsoTCPv4, 1000, 6 }, udpFrame), gsoProtocolMismatch},
		{"an IPv6 segment that is IPv4", vnet(open4, func(h *vnetHeader) { h.gsoType, h.gsoSize = gsoTCPv6, 1000 }, tcpFrame), gsoProtocolMismatch},
		{"a UDP segment that is TCP", vnet(open4, func(h *vnetHeader) { h.gsoType, h.gsoSize = gsoUDPL4, 1000 }, tcpFrame), gsoProtocolMismatch},
		{"a segment with a closed checksum", vnet(vnetHeader{}, func(h *vnetHeader) { h.gsoType, h.gsoSize = gsoTCPv4, 1000 }, tcpFrame), gsoWithoutChecksum},
		{"a segment whose open checksum is elsewhere", vnet(open4, func(h *vnetHeader) { h.gsoType, h.gsoSize, h.csumStart = gsoTCPv4, 1000, 40 }, tcpFrame), gsoWithoutChecksum},
	}
}

func TestMalformedFramesAreCountedAndDropped(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{}, allOffloads)
	s := newSink(true)
	e.Attach(s)
	counted := make(map[string]uint64)
	for _, test := range malformed() {
		t.Run(test.name, func(t *testing.T) {
			send(t, peer, test.frame)
			send(t, peer, withVnet(vnetHeader{}, udpFrame)) // the marker: a good frame behind
			if got := s.next(t); !bytes.Equal(got.data, udpFrame[ethernetHeaderLen:]) {
				t.Fatalf("it was delivered: % x…", got.data[:min(40, len(got.data))])
			}
			counted[test.want.String()]++
			for name, n := range e.Stats().Dropped {
				if n != counted[name] {
					t.Errorf("%s is counted %d times, want %d", name, n, counted[name])
				}
			}
		})
	}
	for r := shortVnetHeader; r < queueFull; r++ {
		if counted[r.String()] == 0 && r != gsoNotOffered {
			t.Errorf("no frame here is refused for %s", r)
		}
	}
}

func TestSegmentsAreRefusedWhenNotOffered(t *testing.T) {
	f := filter{kind: TAP, gateway: mac(gatewayMAC), features: Features{Checksum: true}}
	h := open4
	h.gsoType, h.gsoSize = gsoTCPv4, 1000
	if _, why := f.inspect(tcpFrame, len(tcpFrame), h); why != gsoNotOffered {
		t.Errorf("a TCP segment on a device without TSO: %s", why)
	}
	h = vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 6, gsoType: gsoUDPL4, gsoSize: 1000}
	f.features.TSO = true
	if _, why := f.inspect(udpFrame, len(udpFrame), h); why != gsoNotOffered {
		t.Errorf("a UDP segment on a device without USO: %s", why)
	}
}

// What a frame that passes is delivered as.
func TestGoodFrames(t *testing.T) {
	options := ipv6Packet(0, append([]byte{6, 0, 1, 4, 0, 0, 0, 0}, tcpSegment(make([]byte, 50))...)) // hop-by-hop, then TCP
	padded := toGateway(etherIPv4, append(ipv4Packet(17, udpDatagram(nil)), make([]byte, 18)...))
	segment := func(gsoType uint8, start, offset uint16) vnetHeader {
		return vnetHeader{flags: vnetNeedsChecksum, gsoType: gsoType, gsoSize: 1400, csumStart: start, csumOffset: offset, hdrLen: 65535}
	}
	for _, test := range []struct {
		name      string
		h         vnetHeader
		frame     []byte
		validated bool
		pktType   tcpip.PacketType
		segment   uint16
		open      bool
	}{
		{"a plain datagram is to be verified", vnetHeader{}, udpFrame, false, tcpip.PacketHost, 0, false},
		{"a verified one is not", vnetHeader{flags: vnetDataValid}, udpFrame, true, tcpip.PacketHost, 0, false},
		{"a verified fragment says nothing of the datagram", vnetHeader{flags: vnetDataValid}, refixIPv4(edit(udpFrame, 20, 0x20)), false, tcpip.PacketHost, 0, false},
		{"an open UDP checksum is fine", vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 6}, udpFrame, true, tcpip.PacketHost, 0, true},
		{"an open TCP checksum is fine", open4, tcpFrame, true, tcpip.PacketHost, 0, true},
		{"a TCPv4 segment, whatever its hdr_len", segment(gsoTCPv4, 34, 16), tcpFrame, true, tcpip.PacketHost, 1400, true},
		{"a TCPv6 segment", segment(gsoTCPv6, 54, 16), tcp6Frame, true, tcpip.PacketHost, 1400, true},
		{"a TCPv4 segment with CWR", segment(gsoTCPv4|gsoECN, 34, 16), tcpFrame, true, tcpip.PacketHost, 1400, true},
		{"TCP behind an IPv6 extension header", vnetHeader{flags: vnetNeedsChecksum, csumStart: 62, csumOffset: 16}, toGateway(etherIPv6, options), true, tcpip.PacketHost, 0, true},
		{"a UDP segment", segment(gsoUDPL4, 34, 6), udpFrame, true, tcpip.PacketHost, 1400, true},
		{"Ethernet padding", vnetHeader{}, padded, false, tcpip.PacketHost, 0, false},
		{"a broadcast", vnetHeader{}, append(bytes.Repeat([]byte{0xff}, 6), udpFrame[6:]...), false, tcpip.PacketBroadcast, 0, false},
		{"a multicast", vnetHeader{}, append([]byte{0x33, 0x33, 0, 0, 0, 1}, tcp6Frame[6:]...), false, tcpip.PacketMulticast, 0, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			e, peer := newTwinEndpoint(t, Config{}, allOffloads)
			s := newSink(true)
			e.Attach(s)
			send(t, peer, withVnet(test.h, test.frame))
			got := s.next(t)
			if got.validated != test.validated || got.pktType != test.pktType || got.segment != test.segment || got.open != test.open {
				t.Errorf("delivered with validated %v, type %v, segment %d, open %v", got.validated, got.pktType, got.segment, got.open)
			}
			if !bytes.Equal(got.data, test.frame[ethernetHeaderLen:]) {
				t.Error("the packet was changed")
			}
		})
	}
}

// An inner checksum that the container's kernel left to the device (a tunnel's) is
// filled in, at any size and place in the chain of views.
func TestInnerChecksumsAreFilledIn(t *testing.T) {
	for _, size := range []int{40, 101, 3000, 12001, 40000, 65000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			inner := make([]byte, size)
			for i := range inner {
				inner[i] = byte(i * 7)
			}
			frame := toGateway(etherIPv4, ipv4Packet(17, udpDatagram(inner)))
			const start = ethernetHeaderLen + 20 + 8 + 5 // odd on purpose
			offset := uint16(size - 5 - 2)
			want := bytes.Clone(frame)
			sum := ^checksum.Checksum(want[start:], 0)
			binary.BigEndian.PutUint16(want[start+int(offset):], sum)

			e, peer := newTwinEndpoint(t, Config{}, allOffloads)
			s := newSink(true)
			e.Attach(s)
			send(t, peer, withVnet(vnetHeader{flags: vnetNeedsChecksum, csumStart: start, csumOffset: offset}, frame))
			got := s.next(t)
			if !bytes.Equal(got.data, want[ethernetHeaderLen:]) {
				t.Error("the sum is not what one pass over the bytes gives")
			}
			if got.validated {
				t.Error("the outer checksum passes as verified")
			}
			if n := e.Stats().RxChecksumsFilled; n != 1 {
				t.Errorf("%d checksums are counted as filled", n)
			}
		})
	}
}

func TestOpenChecksumsAreFilledInForAPlainDispatcher(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{}, allOffloads)
	s := newSink(false)
	e.Attach(s)
	send(t, peer, withVnet(vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 6}, udpFrame))
	got := s.next(t)
	h := header.UDP(got.data[20:])
	if !h.IsChecksumValid(address(guest4), address(gateway4), checksum.Checksum(h.Payload(), 0)) || got.validated {
		t.Errorf("checksum %#x, validated %v", h.Checksum(), got.validated)
	}
}

func TestBarePacketsOfATUN(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{Kind: TUN}, allOffloads)
	s := newSink(true)
	e.Attach(s)
	for _, good := range [][]byte{ipv4Packet(17, udpDatagram(nil)), ipv6Packet(6, tcpSegment(nil))} {
		send(t, peer, withVnet(vnetHeader{}, []byte{0x20, 0, 0, 0})) // version 2
		send(t, peer, withVnet(vnetHeader{}, nil))
		send(t, peer, withVnet(vnetHeader{}, good))
		if got := s.next(t); !bytes.Equal(got.data, good) {
			t.Errorf("delivered % x, want % x", got.data, good)
		}
	}
	dropped := e.Stats().Dropped
	if dropped[badIPVersion.String()] != 2 || dropped[shortFrame.String()] != 2 {
		t.Errorf("dropped: %v", dropped)
	}
}
