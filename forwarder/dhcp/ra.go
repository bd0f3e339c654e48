package dhcp

// Router advertisements: RFC 4861 section 4.2, with the DNS options of RFC 8106.
//
// Everything advertised is valid as long as the sandbox lives, so lifetimes are infinite where the
// field allows it. The router lifetime does not (16 bits), hence AdvertiseEvery.

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"time"
)

// AdvertiseEvery is how often an unsolicited advertisement should be sent: well within the router
// lifetime of 65535 s (RFC 8319) that each one carries.
const AdvertiseEvery = time.Hour

const (
	icmpRouterSolicitation  = 133
	icmpRouterAdvertisement = 134

	optSourceLinkAddr = 1
	optPrefix         = 3
	optMTU            = 5
	optRDNSS          = 25
	optDNSSL          = 31

	// maxAdvertisement fits the smallest IPv6 path MTU with its header.
	maxAdvertisement = 1280 - 40

	infinite  = 0xffffffff
	slaacBits = 64
)

// RouterAdvertisement returns a whole ICMPv6 message, or nil if IPv6 is not served. Its checksum is
// zero: the caller knows the addresses and fills it in. It goes from Gateway6 to all nodes, or to
// the host that solicited, with hop limit 255.
//
// The managed flag points guests at DHCPv6, which hands out exactly the guest's address. A prefix
// of 64 bits is also marked autonomous, for guests that support only SLAAC; they form an address of
// their own in it.
func (s *Server) RouterAdvertisement() []byte {
	p := s.cfg.Guest6
	if !p.IsValid() {
		return nil
	}
	b := []byte{icmpRouterAdvertisement, 0, 0, 0,
		64,          // hop limit
		1<<7 | 1<<6, // managed, other
		0xff, 0xff,  // router lifetime
		0, 0, 0, 0, // reachable time: unspecified
		0, 0, 0, 0} // retransmission timer, likewise
	if mac := s.cfg.GatewayMAC; len(mac) == 6 {
		b = append(b, optSourceLinkAddr, 1)
		b = append(b, mac...)
	}
	if s.cfg.MTU >= 1280 {
		b = append(b, optMTU, 1, 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(s.cfg.MTU))
	}
	flags := byte(1 << 7) // on-link
	if p.Bits() == slaacBits {
		flags |= 1 << 6 // autonomous
	}
	b = append(b, optPrefix, 4, byte(p.Bits()), flags)
	b = binary.BigEndian.AppendUint32(b, infinite)
	b = binary.BigEndian.AppendUint32(b, infinite)
	b = append(b, 0, 0, 0, 0)
	b = append(b, p.Masked().Addr().AsSlice()...)
	if dns := s.dns6; len(dns) > 0 {
		dns = dns[:min(len(dns), 8)]
		b = append(b, optRDNSS, byte(1+2*len(dns)), 0, 0)
		b = binary.BigEndian.AppendUint32(b, infinite)
		for _, ip := range dns {
			b = append(b, ip...)
		}
	}
	for search := s.search; len(search) > 0; search = search[:len(search)-1] {
		opt := dnssl(search)
		if len(b)+len(opt) <= maxAdvertisement {
			b = append(b, opt...)
			break
		}
	}
	return b
}

// dnssl returns the search list option, padded to a multiple of eight bytes.
func dnssl(search []string) []byte {
	opt := []byte{optDNSSL, 0, 0, 0}
	opt = binary.BigEndian.AppendUint32(opt, infinite)
	for _, d := range search {
		for label := range strings.SplitSeq(d, ".") {
			opt = append(opt, byte(len(label)))
			opt = append(opt, label...)
		}
		opt = append(opt, 0)
	}
	for len(opt)%8 != 0 {
		opt = append(opt, 0)
	}
	opt[1] = byte(len(opt) / 8) // maxAdvertisement keeps the lengths that are sent below 256
	return opt
}

// ValidSolicitation reports whether msg, an ICMPv6 message with a correct checksum, is a router
// solicitation to answer (RFC 4861 section 6.1.1).
func ValidSolicitation(msg []byte, from netip.Addr, hopLimit uint8) bool {
	if hopLimit != 255 || len(msg) < 8 || msg[0] != icmpRouterSolicitation || msg[1] != 0 || from.IsMulticast() {
		return false
	}
	for opts := msg[8:]; len(opts) > 0; {
		if len(opts) < 2 || opts[1] == 0 || len(opts) < 8*int(opts[1]) {
			return false
		}
		if opts[0] == optSourceLinkAddr && from.IsUnspecified() {
			return false
		}
		opts = opts[8*int(opts[1]):]
	}
	return true
}
