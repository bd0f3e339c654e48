package policy

import "net/netip"

// carriers holds the Environment's addresses that carry another one.
type carriers struct {
	nat64    []netip.Prefix
	metadata []netip.Prefix
}

// maxEmbedded is how many addresses one address can carry: two by its range, one by its interface
// identifier, one as a metadata service, and one for each translator.
const maxEmbedded = 4 + MaxNAT64

// embedded returns the IPv4 addresses that an address of class c carries: by its range; by its
// interface identifier, in any range: ISATAP (RFC 5214 section 6.1); and by the operator's own
// prefixes, in addition to the rest. So a prefix that came from a lying resolver closes addresses
// and opens none. Addresses that it does not carry are invalid.
func (o *carriers) embedded(c class, a netip.Addr) (inner [maxEmbedded]netip.Addr) {
	b := a.As16()
	if embeds := classes[c].embeds; embeds != nil {
		two := embeds(b)
		inner[0], inner[1] = two[0], two[1]
	}
	if a.Is4() {
		return inner
	}
	last := netip.AddrFrom4([4]byte(b[12:16]))
	if b[8]&^2 == 0 && [3]byte(b[9:12]) == [3]byte{0, 0x5e, 0xfe} {
		inner[2] = last
	}
	if c == linkLocal || c == uniqueLocal {
		for _, p := range o.metadata {
			if p.Addr() == last && p.IsSingleIP() {
				inner[3] = last
			}
		}
	}
	for i, p := range o.nat64 {
		if p.Contains(a) {
			inner[4+i] = inNAT64(p.Bits(), b)
		}
	}
	return inner
}

// inNAT64 returns the address embedded behind a prefix of the given length: RFC 6052 section 2.2.
// It skips the octet that the RFC reserves as zero, whatever its value.
func inNAT64(bits int, b [16]byte) netip.Addr {
	const u = 8
	var v4 [4]byte
	for i, n := bits/8, 0; n < len(v4); i++ {
		if i != u {
			v4[n] = b[i]
			n++
		}
	}
	return netip.AddrFrom4(v4)
}
