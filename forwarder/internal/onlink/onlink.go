package onlink

// Owners of addresses on the sandbox's link.

import (
	"iter"
	"net/netip"
	"slices"

	"sluice.dev/sluice/policy"
)

const DNSPort = 53

var (
	AllNodes      = netip.MustParseAddr("ff02::1")
	IPv4Broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
)

// Addrs holds the addresses on a sandbox's link. It does not change.
type Addrs struct {
	Guest          []netip.Addr // the sandbox's own
	Gateway        []netip.Addr // ours, at most one per family
	DNS            []netip.Addr // the resolver's, at most one per family
	SelfConfigured netip.Prefix // from which the sandbox may give itself addresses
	AnswersDNS     bool         // there is a resolver
	LinkLocal      netip.Addr   // the gateway's
	Broadcast      netip.Addr   // of the sandbox's IPv4 prefix
}

// IsGuest reports whether a is one of the sandbox's own addresses.
func (o *Addrs) IsGuest(a netip.Addr) bool {
	return slices.Contains(o.Guest, a) || o.SelfConfigured.Contains(a) && !o.IsOwn(a)
}

// IsOwn reports whether a is an address of ours on the link: gateway or DNS.
func (o *Addrs) IsOwn(a netip.Addr) bool {
	return slices.Contains(o.Gateway, a) || slices.Contains(o.DNS, a) || a == o.LinkLocal
}

// IsSubnetBroadcast reports whether a is the directed broadcast of the sandbox's IPv4 prefix.
func (o *Addrs) IsSubnetBroadcast(a netip.Addr) bool { return a == o.Broadcast }

// GatewayOf returns our address of a family, or the zero Addr if there is none.
func (o *Addrs) GatewayOf(v4 bool) netip.Addr {
	for _, g := range o.Gateway {
		if g.Is4() == v4 {
			return g
		}
	}
	return netip.Addr{}
}

// GatewayFor returns our address of to's family and scope.
func (o *Addrs) GatewayFor(to netip.Addr) netip.Addr {
	if to.IsLinkLocalUnicast() && to.Is6() {
		return o.LinkLocal
	}
	return o.GatewayOf(to.Is4())
}

// ClientInside returns the address under which the sandbox, at its address guest, sees a client:
// the client's own, if that can appear on the sandbox's link.
func (o *Addrs) ClientInside(client, guest netip.Addr) netip.Addr {
	if client.IsLoopback() || client.IsLinkLocalUnicast() || client.Is4() != guest.Is4() {
		return o.GatewayOf(guest.Is4())
	}
	return client
}

// ForResolver reports whether our resolver answers a query to dst: at the DNS address always, and
// at every address while the policy gates names, so that the sandbox cannot query any other server.
func (o *Addrs) ForResolver(r *policy.Rules, dst netip.AddrPort) bool {
	if !o.AnswersDNS || dst.Port() != DNSPort {
		return false
	}
	return slices.Contains(o.DNS, dst.Addr()) || r.GatesNames()
}

// DirectedBroadcast returns the broadcast address of an IPv4 prefix, or the zero Addr if it has
// none.
func DirectedBroadcast(p netip.Prefix) netip.Addr {
	if !p.IsValid() || !p.Addr().Is4() || p.Bits() >= 31 {
		return netip.Addr{}
	}
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}

// SourceTries bounds the search for a port under which a client appears inside.
const SourceTries = 64

// SourcePorts yields the ports under which a client with that port may appear inside, its own
// first. The others are in the same range, as nf_nat_core.c chooses them, because servers trust
// ports below 1024 as root's.
func SourcePorts(port uint16) iter.Seq[uint16] {
	low, high := 1024, 65535
	switch {
	case port < 512:
		low, high = 1, 511
	case port < 1024:
		low, high = 600, 1023
	}
	const step = 7919 // a prime that divides no range's size: each port comes once
	return func(yield func(uint16) bool) {
		if port != 0 && !yield(port) {
			return
		}
		for i := 1; i < SourceTries; i++ {
			if !yield(uint16(low + (int(port)+i*step)%(high-low+1))) {
				return
			}
		}
	}
}
