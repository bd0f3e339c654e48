package hostsock

// Batched datagram system calls and their control messages.
//
// x/sys/unix has sendmsg and recvmsg with a slice, an address and a control buffer allocated per
// call. The datagram path needs many datagrams per call and no allocation, so the message headers
// are laid out here once per batch and only lengths are rewritten. Every socket is non-blocking, so
// none of these calls can wait.

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/packet"
)

// Mmsghdr is struct Mmsghdr of sendmmsg(2) and recvmmsg(2).
type Mmsghdr struct {
	Hdr unix.Msghdr
	N   uint32
}

// RawAddr is a sockaddr_in or sockaddr_in6, in place.
type RawAddr [unix.SizeofSockaddrInet6]byte

// Put writes a, which must be unmapped, and returns the number of bytes written.
func (s *RawAddr) Put(a netip.AddrPort) uint32 {
	*s = RawAddr{}
	if a.Addr().Is4() {
		binary.NativeEndian.PutUint16(s[:], unix.AF_INET)
		binary.BigEndian.PutUint16(s[2:], a.Port())
		ip := a.Addr().As4()
		copy(s[4:], ip[:])
		return unix.SizeofSockaddrInet4
	}
	binary.NativeEndian.PutUint16(s[:], unix.AF_INET6)
	binary.BigEndian.PutUint16(s[2:], a.Port())
	ip := a.Addr().As16()
	copy(s[8:], ip[:])
	return unix.SizeofSockaddrInet6
}

// AddrPortOf reads the socket address in b; the zero AddrPort stands for any other
// family and for a truncated one. Addresses come out unmapped and without a zone.
func AddrPortOf(b []byte) netip.AddrPort {
	if len(b) < 2 {
		return netip.AddrPort{}
	}
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		if len(b) >= 8 {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:]))
		}
	case unix.AF_INET6:
		if len(b) >= 24 {
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])).Unmap(), binary.BigEndian.Uint16(b[2:]))
		}
	}
	return netip.AddrPort{}
}

func Recvmmsg(fd int, msgs []Mmsghdr, flags int) (int, unix.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&msgs[0])),
		uintptr(len(msgs)), uintptr(flags|unix.MSG_DONTWAIT), 0, 0)
	return int(n), errno
}

func Sendmmsg(fd int, msgs []Mmsghdr) (int, unix.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&msgs[0])),
		uintptr(len(msgs)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return int(n), errno
}

// cmsgAlign rounds up to the alignment of control messages, a long.
func cmsgAlign(n int) int { const a = int(unsafe.Sizeof(uintptr(0))); return (n + a - 1) &^ (a - 1) }

// AppendCmsg appends one control message to b, which must have room for it.
func AppendCmsg(b []byte, level, typ int32, data []byte) []byte {
	off := len(b)
	b = b[:off+unix.CmsgSpace(len(data))]
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[off]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(len(data)))
	copy(b[off+unix.CmsgLen(0):], data)
	return b
}

// AppendCmsgInt appends a control message that holds one int.
func AppendCmsgInt(b []byte, level, typ int32, v int) []byte {
	var d [4]byte
	binary.NativeEndian.PutUint32(d[:], uint32(v))
	return AppendCmsg(b, level, typ, d[:])
}

// AppendPktinfo appends the source address from which a datagram is to leave.
func AppendPktinfo(b []byte, src netip.Addr) []byte {
	if src.Is4() {
		var pi [unix.SizeofInet4Pktinfo]byte // ifindex, spec_dst, addr
		ip := src.As4()
		copy(pi[4:], ip[:])
		return AppendCmsg(b, unix.IPPROTO_IP, unix.IP_PKTINFO, pi[:])
	}
	var pi [unix.SizeofInet6Pktinfo]byte // addr, ifindex
	ip := src.As16()
	copy(pi[:], ip[:])
	return AppendCmsg(b, unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, pi[:])
}

// Control holds the values in one received datagram's control messages.
type Control struct {
	TTL, Tos uint8
	HasTTL   bool
	Gro      int        // UDP_GRO: size of the joined datagrams; 0 for a single one
	Local    netip.Addr // IP_PKTINFO: the address the datagram was sent to
	Err      packet.ExtendedErr
	HasErr   bool
}

// ParseControl reads the control messages in b. Unknown and short ones are skipped.
func ParseControl(b []byte) (c Control) {
	hdr := unix.CmsgLen(0)
	for len(b) >= hdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
		n := int(h.Len)
		if n < hdr || n > len(b) {
			return c
		}
		c.take(h.Level, h.Type, b[hdr:n])
		n = cmsgAlign(n)
		if n > len(b) {
			return c
		}
		b = b[n:]
	}
	return c
}

func (c *Control) take(level, typ int32, d []byte) {
	switch level {
	case unix.IPPROTO_IP:
		switch {
		case typ == unix.IP_TTL && len(d) >= 4:
			c.TTL, c.HasTTL = uint8(binary.NativeEndian.Uint32(d)), true
		case typ == unix.IP_TOS && len(d) >= 1:
			c.Tos = d[0]
		case typ == unix.IP_PKTINFO && len(d) >= unix.SizeofInet4Pktinfo:
			c.Local = netip.AddrFrom4([4]byte(d[8:12]))
		case typ == unix.IP_RECVERR:
			c.takeErr(d)
		}
	case unix.IPPROTO_IPV6:
		switch {
		case typ == unix.IPV6_HOPLIMIT && len(d) >= 4:
			c.TTL, c.HasTTL = uint8(binary.NativeEndian.Uint32(d)), true
		case typ == unix.IPV6_TCLASS && len(d) >= 4:
			c.Tos = uint8(binary.NativeEndian.Uint32(d))
		case typ == unix.IPV6_PKTINFO && len(d) >= unix.SizeofInet6Pktinfo:
			c.Local = netip.AddrFrom16([16]byte(d[:16])).Unmap()
		case typ == unix.IPV6_RECVERR:
			c.takeErr(d)
		}
	case unix.SOL_UDP:
		if typ == unix.UDP_GRO && len(d) >= 4 {
			c.Gro = int(binary.NativeEndian.Uint32(d))
		}
	}
}

func (c *Control) takeErr(d []byte) {
	if len(d) < 16 {
		return
	}
	c.HasErr = true
	c.Err = packet.ExtendedErr{
		Errno:    unix.Errno(binary.NativeEndian.Uint32(d)),
		Origin:   d[4],
		Typ:      d[5],
		Cod:      d[6],
		Info:     binary.NativeEndian.Uint32(d[8:]),
		Offender: AddrPortOf(d[16:]).Addr(),
	}
}
