package tun

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Decides which frames reach the stack. inspect sees the first bytes of the frame (all relevant
// headers fit in them, see headroom in rxbuf.go), its total length and the virtio-net header, and
// decides by these alone.
//
// The virtio-net header comes from the container's kernel, but a container that may open packet
// sockets can dictate it (PACKET_VNET_HDR), so each field is trusted only as far as it agrees with
// the packet itself:
//
//   - hdr_len is ignored; headers are parsed.
//   - NEEDS_CSUM makes the packet "checksum validated" only if it names exactly
//     the packet's own TCP or UDP checksum field. Any other place inside the packet
//     (an inner header of a tunnel) is filled in here and the stack verifies the
//     outer sum as usual.
//   - a segment larger than the MTU needs an offered gso_type that matches its IP
//     version and protocol, a size, and NEEDS_CSUM on its own transport header.
//
// A checksum over a fragment cannot be left open: the bytes that it covers are in other frames.

const (
	ethernetHeaderLen = header.EthernetMinimumSize
	etherTypeMin      = 0x0600 // below it the field is an 802.3 length
	etherTypeVLAN     = 0x8100 // 802.1Q
	etherTypeQinQ     = 0x88a8 // 802.1ad
	maxExtensions     = 8      // IPv6 extension headers followed to find the transport header
	udpChecksumOffset = 6      // of the field in the UDP header
)

// verdict is what inspect learned about a frame that passed.
type verdict struct {
	proto   tcpip.NetworkProtocolNumber
	pktType tcpip.PacketType
	linkLen int
	// validated: the transport checksum need not be verified.
	validated bool
	// An open checksum covers the frame from fillStart on and belongs at fillAt, which is 0 if
	// there is none. fill means that it must be filled in before anything reads it.
	fill              bool
	fillStart, fillAt int
	// segment is the payload size of the packets that a GSO segment represents.
	segment uint16
	gso     bool
	source  mac // of a TAP frame
}

// packet is the result of parsing the IP headers.
type packet struct {
	transport      tcpip.TransportProtocolNumber // 0 if it was not found
	transportStart int                           // offset from the frame's first byte
	fragment       bool
}

// mac is a comparable hardware address.
type mac [6]byte

func (m mac) group() bool { return m[0]&1 != 0 }

var broadcastMAC = mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// filter is what inspect needs from the endpoint. It does not change while frames are read.
type filter struct {
	kind     Kind
	gateway  mac
	features Features
}

func (f *filter) inspect(head []byte, length int, h vnetHeader) (v verdict, why reason) {
	if f.kind == TAP {
		if why = f.inspectEthernet(head, length, &v); why != reasonNone {
			return v, why
		}
	} else if why = inspectBare(head, &v); why != reasonNone {
		return v, why
	}

	var p packet
	switch v.proto {
	case header.IPv4ProtocolNumber:
		p, why = inspectIPv4(head, v.linkLen, length)
	case header.IPv6ProtocolNumber:
		p, why = inspectIPv6(head, v.linkLen, length)
	case header.ARPProtocolNumber:
		if length-v.linkLen < header.ARPSize {
			why = shortARP
		}
	default:
		why = unknownEtherType
	}
	if why != reasonNone {
		return v, why
	}
	return v, f.inspectOffload(h, length, p, &v)
}

func (f *filter) inspectEthernet(head []byte, length int, v *verdict) reason {
	if length < ethernetHeaderLen {
		return shortFrame
	}
	destination := mac(head[:6])
	v.source = mac(head[6:12])
	switch {
	case destination == f.gateway:
		v.pktType = tcpip.PacketHost
	case destination == broadcastMAC:
		v.pktType = tcpip.PacketBroadcast
	case destination.group():
		v.pktType = tcpip.PacketMulticast
	default:
		return foreignDestination
	}
	if v.source.group() || v.source == (mac{}) || v.source == f.gateway {
		return badSource
	}
	etherType := binary.BigEndian.Uint16(head[12:])
	switch {
	case etherType == etherTypeVLAN || etherType == etherTypeQinQ:
		return vlanTagged
	case etherType < etherTypeMin:
		return notEthernetII
	}
	v.proto = tcpip.NetworkProtocolNumber(etherType)
	v.linkLen = ethernetHeaderLen
	return reasonNone
}

// inspectBare reads the protocol of a TUN packet, which starts with the IP header, from its version
// field.
func inspectBare(head []byte, v *verdict) reason {
	v.pktType = tcpip.PacketHost
	if len(head) == 0 {
		return shortFrame
	}
	switch head[0] >> 4 {
	case header.IPv4Version:
		v.proto = header.IPv4ProtocolNumber
	case header.IPv6Version:
		v.proto = header.IPv6ProtocolNumber
	default:
		return badIPVersion
	}
	return reasonNone
}

func inspectIPv4(head []byte, at, length int) (p packet, why reason) {
	if length-at < header.IPv4MinimumSize || len(head) < at+header.IPv4MinimumSize {
		return p, shortIP
	}
	ip := header.IPv4(head[at:])
	if ip[0]>>4 != header.IPv4Version {
		return p, badIPVersion
	}
	headerLen := int(ip[0]&0xf) * 4
	if headerLen < header.IPv4MinimumSize || length-at < headerLen || len(ip) < headerLen {
		return p, badIPHeaderLength
	}
	if total := int(ip.TotalLength()); total < headerLen || total > length-at {
		return p, badIPLength
	}
	// The stack skips this checksum for a packet whose transport checksum is known to be good, so
	// it is checked here for all packets.
	if !ip.IsChecksumValid() {
		return p, badIPChecksum
	}
	p.transport = tcpip.TransportProtocolNumber(ip.Protocol())
	p.transportStart = at + headerLen
	p.fragment = ip.More() || ip.FragmentOffset() != 0
	return p, reasonNone
}

func inspectIPv6(head []byte, at, length int) (p packet, why reason) {
	if length-at < header.IPv6MinimumSize || len(head) < at+header.IPv6MinimumSize {
		return p, shortIP
	}
	ip := header.IPv6(head[at:])
	if ip[0]>>4 != header.IPv6Version {
		return p, badIPVersion
	}
	if int(ip.PayloadLength()) > length-at-header.IPv6MinimumSize {
		return p, badIPLength
	}
	// Follow the extension headers as far as they are in reach. One that is not only costs the
	// packet its shortcut: transport stays 0.
	next, start := ip.NextHeader(), at+header.IPv6MinimumSize
	for range maxExtensions {
		switch header.IPv6ExtensionHeaderIdentifier(next) {
		case header.IPv6HopByHopOptionsExtHdrIdentifier,
			header.IPv6RoutingExtHdrIdentifier,
			header.IPv6DestinationOptionsExtHdrIdentifier:
			if len(head) < start+2 {
				return p, reasonNone
			}
			next, start = head[start], start+8+8*int(head[start+1])
		case header.IPv6FragmentExtHdrIdentifier:
			p.fragment = true
			return p, reasonNone
		default:
			p.transport = tcpip.TransportProtocolNumber(next)
			p.transportStart = start
			return p, reasonNone
		}
	}
	return p, reasonNone
}

// inspectOffload judges what the virtio-net header claims about a packet.
func (f *filter) inspectOffload(h vnetHeader, length int, p packet, v *verdict) reason {
	own := false // the open checksum is the packet's own
	if h.flags&vnetNeedsChecksum != 0 {
		start, at := int(h.csumStart), int(h.csumStart)+int(h.csumOffset)
		if start < v.linkLen+header.IPv4MinimumSize || start >= length || at+2 > length {
			return checksumOutOfRange
		}
		if p.fragment {
			return checksumOnFragment
		}
		own = start == p.transportStart &&
			(p.transport == header.TCPProtocolNumber && h.csumOffset == header.TCPChecksumOffset ||
				p.transport == header.UDPProtocolNumber && h.csumOffset == udpChecksumOffset)
		v.fill, v.fillStart, v.fillAt = !own, start, at
	}
	v.validated = own || h.flags&vnetDataValid != 0 && !v.fill && !p.fragment

	var transport tcpip.TransportProtocolNumber
	var network tcpip.NetworkProtocolNumber
	offered := f.features.TSO
	switch h.gsoType &^ gsoECN {
	case gsoNone:
		return reasonNone
	case gsoTCPv4:
		network, transport = header.IPv4ProtocolNumber, header.TCPProtocolNumber
	case gsoTCPv6:
		network, transport = header.IPv6ProtocolNumber, header.TCPProtocolNumber
	case gsoUDPL4:
		network, transport = v.proto, header.UDPProtocolNumber
		offered = f.features.USO
	default:
		return unknownGSOType
	}
	v.gso, v.segment = true, h.gsoSize
	switch {
	case !offered:
		return gsoNotOffered
	case h.gsoSize == 0:
		return gsoZeroSize
	case v.proto != network || p.transport != transport:
		return gsoProtocolMismatch
	case !own:
		return gsoWithoutChecksum
	}
	return reasonNone
}
