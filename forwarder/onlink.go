package forwarder

// Whose an address on the sandbox's link is.

import (
	"net/netip"
	"slices"

	"sluice/policy"
)

const dnsPort = 53

var (
	allNodes      = netip.MustParseAddr("ff02::1")
	ipv4Broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
)

// addrs are the addresses of a sandbox's link. They do not change.
type addrs struct {
	guest          []netip.Addr // the sandbox's own
	gateway        []netip.Addr // ours, at most one of a family
	dns            []netip.Addr // the resolver's, at most one of a family
	selfConfigured netip.Prefix // out of which the sandbox may give itself addresses
	answersDNS     bool         // there is a resolver
	linkLocal      netip.Addr   // the gateway's
	broadcast      netip.Addr   // of the sandbox's IPv4 prefix
}

// isGuest reports whether a is one of the sandbox's own addresses.
func (o *addrs) isGuest(a netip.Addr) bool {
	return slices.Contains(o.guest, a) || o.selfConfigured.Contains(a) && !o.isOwn(a)
}

// isOwn reports whether a is an address of ours on the link: gateway or DNS.
func (o *addrs) isOwn(a netip.Addr) bool {
	return slices.Contains(o.gateway, a) || slices.Contains(o.dns, a) || a == o.linkLocal
}

// isSubnetBroadcast reports whether a is the directed broadcast of the sandbox's IPv4 prefix.
func (o *addrs) isSubnetBroadcast(a netip.Addr) bool { return a == o.broadcast }

// gatewayOf returns our address of a family, the zero Addr if there is none.
func (o *addrs) gatewayOf(v4 bool) netip.Addr {
	for _, g := range o.gateway {
		if g.Is4() == v4 {
			return g
		}
	}
	return netip.Addr{}
}

// gatewayFor returns our address of to's family and scope.
func (o *addrs) gatewayFor(to netip.Addr) netip.Addr {
	if to.IsLinkLocalUnicast() && to.Is6() {
		return o.linkLocal
	}
	return o.gatewayOf(to.Is4())
}

// clientInside returns the address under which the sandbox sees a client of its address
// guest: the client's own, if that can be on the sandbox's link.
func (o *addrs) clientInside(client, guest netip.Addr) netip.Addr {
	if client.IsLoopback() || client.IsLinkLocalUnicast() || client.Is4() != guest.Is4() {
		return o.gatewayOf(guest.Is4())
	}
	return client
}

// forResolver reports whether our resolver answers a query to dst: at the DNS address
// always, and at every address while the policy gates names, so that the sandbox cannot ask
// any other server.
func (o *addrs) forResolver(r *policy.Rules, dst netip.AddrPort) bool {
	if !o.answersDNS || dst.Port() != dnsPort {
		return false
	}
	return slices.Contains(o.dns, dst.Addr()) || r.GatesNames()
}

// directedBroadcast returns the broadcast address of an IPv4 prefix, the zero Addr if it has none.
func directedBroadcast(p netip.Prefix) netip.Addr {
	if !p.IsValid() || !p.Addr().Is4() || p.Bits() >= 31 {
		return netip.Addr{}
	}
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}
