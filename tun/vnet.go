package tun

import "encoding/binary"

// The header before each frame: struct virtio_net_hdr of linux/virtio_net.h (virtio 1.2, section
// 5.1.6), in the machine's byte order, as the kernel's TUN driver uses it by default:
//
//	 0      1         2..3     4..5      6..7        8..9
//	┌───────┬──────────┬─────────┬──────────┬────────────┬─────────────┐
//	│ flags │ gso_type │ hdr_len │ gso_size │ csum_start │ csum_offset │
//	└───────┴──────────┴─────────┴──────────┴────────────┴─────────────┘

const vnetHeaderLen = 10

// Values of vnetHeader.flags.
const (
	vnetNeedsChecksum = 1 // the sum from csumStart on must still be stored at csumStart+csumOffset
	vnetDataValid     = 2 // the transport checksum was verified before
)

// Values of vnetHeader.gsoType.
const (
	gsoNone  = 0
	gsoTCPv4 = 1
	gsoTCPv6 = 4
	gsoUDPL4 = 5
	gsoECN   = 0x80 // a flag beside TCPv4 and TCPv6: the first segment carries CWR
)

// vnetHeader is the decoded header. All offsets count from the frame's first byte.
type vnetHeader struct {
	flags      uint8
	gsoType    uint8
	hdrLen     uint16 // a hint for the receiver's linear buffer; never believed
	gsoSize    uint16
	csumStart  uint16
	csumOffset uint16
}

func (h *vnetHeader) encode(b *[vnetHeaderLen]byte) {
	b[0], b[1] = h.flags, h.gsoType
	binary.NativeEndian.PutUint16(b[2:], h.hdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.gsoSize)
	binary.NativeEndian.PutUint16(b[6:], h.csumStart)
	binary.NativeEndian.PutUint16(b[8:], h.csumOffset)
}

func decodeVnet(b *[vnetHeaderLen]byte) vnetHeader {
	return vnetHeader{
		flags:      b[0],
		gsoType:    b[1],
		hdrLen:     binary.NativeEndian.Uint16(b[2:]),
		gsoSize:    binary.NativeEndian.Uint16(b[4:]),
		csumStart:  binary.NativeEndian.Uint16(b[6:]),
		csumOffset: binary.NativeEndian.Uint16(b[8:]),
	}
}
