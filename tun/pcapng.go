package tun

import (
	"encoding/binary"
	"io"
	"time"
)

// The pcapng file format, as far as captures need it
// (draft-ietf-opsawg-pcapng). A file is a row of blocks
//
//	type u32 | length u32 | body, padded to 4 | length u32
//
// here: one Section Header, two Interface Descriptions, then Enhanced Packets, and
// Interface Statistics at the end. Integers are little-endian; readers learn that
// from the byte-order magic. Options are code u16 | length u16 | value, padded to 4.

const (
	blockSection    = 0x0a0d0d0a
	blockInterface  = 1
	blockStatistics = 5
	blockPacket     = 6

	byteOrderMagic = 0x1a2b3c4d
	nanoseconds    = 9 // if_tsresol: timestamps count 10^-9 s

	optEnd     = 0
	optComment = 1

	optSectionApplication = 4

	optInterfaceName        = 2
	optInterfaceDescription = 3
	optInterfaceResolution  = 9

	optPacketFlags = 2

	optStatisticsStart    = 2
	optStatisticsEnd      = 3
	optStatisticsReceived = 4
	optStatisticsDropped  = 5
)

// Link types (the LINKTYPE_ registry).
const (
	linkTypeEthernet = 1
	linkTypeRaw      = 101 // an IPv4 or IPv6 packet, told apart by its version
)

// direction is the value of a packet's flags, as seen from the sandbox's gateway: packets from the
// container are inbound.
type direction uint32

const (
	inbound  direction = 1
	outbound direction = 2
)

// pcapngWriter encodes blocks into one reused buffer and writes each to w in one call.
type pcapngWriter struct {
	w   io.Writer
	buf []byte
}

func (p *pcapngWriter) begin(blockType uint32) {
	p.buf = binary.LittleEndian.AppendUint32(p.buf[:0], blockType)
	p.u32(0) // the length, known at flush
}

func (p *pcapngWriter) u16(v uint16) { p.buf = binary.LittleEndian.AppendUint16(p.buf, v) }
func (p *pcapngWriter) u32(v uint32) { p.buf = binary.LittleEndian.AppendUint32(p.buf, v) }

func (p *pcapngWriter) timestamp(t time.Time) {
	ns := uint64(t.UnixNano())
	p.u32(uint32(ns >> 32))
	p.u32(uint32(ns))
}

func (p *pcapngWriter) pad() {
	for len(p.buf)%4 != 0 {
		p.buf = append(p.buf, 0)
	}
}

func (p *pcapngWriter) option(code uint16, value string) {
	if len(value) > 0xffff {
		value = value[:0xffff]
	}
	p.u16(code)
	p.u16(uint16(len(value)))
	p.buf = append(p.buf, value...)
	p.pad()
}

func (p *pcapngWriter) option64(code uint16, v uint64) {
	p.u16(code)
	p.u16(8)
	p.buf = binary.LittleEndian.AppendUint64(p.buf, v)
}

func (p *pcapngWriter) flush() error {
	length := uint32(len(p.buf) + 4)
	p.u32(length)
	binary.LittleEndian.PutUint32(p.buf[4:], length)
	_, err := p.w.Write(p.buf)
	return err
}

func (p *pcapngWriter) section(application string) error {
	p.begin(blockSection)
	p.u32(byteOrderMagic)
	p.u16(1) // version 1.0
	p.u16(0)
	p.u32(0xffffffff) // section length unknown
	p.u32(0xffffffff)
	p.option(optSectionApplication, application)
	p.option(optEnd, "")
	return p.flush()
}

func (p *pcapngWriter) describe(linkType uint16, snapLen int, name, description string) error {
	p.begin(blockInterface)
	p.u16(linkType)
	p.u16(0)
	p.u32(uint32(snapLen))
	p.option(optInterfaceName, name)
	p.option(optInterfaceDescription, description)
	p.option(optInterfaceResolution, string([]byte{nanoseconds}))
	p.option(optEnd, "")
	return p.flush()
}

func (p *pcapngWriter) packet(r *record, iface captureInterface) error {
	p.begin(blockPacket)
	p.u32(uint32(iface))
	p.timestamp(r.when)
	p.u32(uint32(len(r.data)))
	p.u32(uint32(r.length))
	p.buf = append(p.buf, r.data...)
	p.pad()
	p.u16(optPacketFlags)
	p.u16(4)
	p.u32(uint32(r.direction))
	if r.comment != "" {
		p.option(optComment, r.comment)
	}
	p.option(optEnd, "")
	return p.flush()
}

// statistics writes how many packets of an interface were offered to the capture and how many it
// lost.
func (p *pcapngWriter) statistics(iface captureInterface, from, to time.Time, received, dropped uint64) error {
	p.begin(blockStatistics)
	p.u32(uint32(iface))
	p.timestamp(to)
	for _, o := range []struct {
		code uint16
		t    time.Time
	}{{optStatisticsStart, from}, {optStatisticsEnd, to}} {
		p.u16(o.code)
		p.u16(8)
		p.timestamp(o.t)
	}
	p.option64(optStatisticsReceived, received)
	p.option64(optStatisticsDropped, dropped)
	p.option(optEnd, "")
	return p.flush()
}
