package dhcp

// DHCPv4, RFC 2131 section 4.3, for a pool of one address.
//
// A client that asks for any address but the guest's gets a NAK, so that one with an old lease
// starts over at once.

import (
	"net"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

const (
	clientPort4 = 68

	// minDatagram4 is the size that every client accepts (RFC 2131 section 2), and headers4 the
	// part of it taken by headers.
	minDatagram4 = 576
	maxDatagram4 = 1500
	headers4     = 20 + 8
)

// HandleV4 answers a DHCPv4 message that came to UDP port 67. A nil reply means silence. The reply
// goes from Gateway4, port 67, to the address to: in an Ethernet broadcast if broadcast is set,
// else to the guest's MAC without ARP, which the guest cannot answer yet.
func (s *Server) HandleV4(payload []byte) (reply []byte, broadcast bool, to netip.AddrPort) {
	if !s.cfg.Guest4.IsValid() || len(payload) > maxRequest {
		return nil, false, to
	}
	req, err := dhcpv4.FromBytes(payload)
	if err != nil || req.OpCode != dhcpv4.OpcodeBootRequest ||
		req.HWType != iana.HWTypeEthernet || len(req.ClientHWAddr) != 6 ||
		addr4(req.GatewayIPAddr).IsValid() { // relayed: there is no relay on this link
		return nil, false, to
	}
	mtype := s.decide4(req)
	if mtype == dhcpv4.MessageTypeNone {
		return nil, false, to
	}
	resp, err := dhcpv4.NewReplyFromRequest(req, dhcpv4.WithMessageType(mtype),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(s.cfg.Gateway4.AsSlice())))
	if err != nil {
		return nil, false, to
	}
	guest := s.cfg.Guest4.Addr()
	dst, unicast := guest, false
	if mtype == dhcpv4.MessageTypeNak {
		resp.SetBroadcast()
	} else {
		s.tell4(req, resp)
		// Never to an address that the client made up.
		unicast = addr4(req.ClientIPAddr) == guest || (!addr4(req.ClientIPAddr).IsValid() && !req.IsBroadcast())
	}
	if !unicast {
		dst = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	}
	return resp.ToBytes(), !unicast, netip.AddrPortFrom(dst, clientPort4)
}

// decide4 returns the kind of answer that req gets; None means silence.
func (s *Server) decide4(req *dhcpv4.DHCPv4) dhcpv4.MessageType {
	guest := s.cfg.Guest4.Addr()
	server, wanted, current := addr4(req.ServerIdentifier()), addr4(req.RequestedIPAddress()), addr4(req.ClientIPAddr)
	if server.IsValid() && server != s.cfg.Gateway4 {
		return dhcpv4.MessageTypeNone
	}
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		if req.Options.Has(dhcpv4.OptionRapidCommit) { // RFC 4039
			return dhcpv4.MessageTypeAck
		}
		return dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeRequest:
		if !wanted.IsValid() { // renewing, rebinding
			wanted = current
		}
		switch {
		case !wanted.IsValid():
			return dhcpv4.MessageTypeNone
		case wanted != guest:
			return dhcpv4.MessageTypeNak
		}
		return dhcpv4.MessageTypeAck
	case dhcpv4.MessageTypeInform:
		return dhcpv4.MessageTypeAck
	}
	return dhcpv4.MessageTypeNone // RELEASE, DECLINE: nothing to give back
}

// tell4 fills in the guest's configuration, within the size that it can receive.
func (s *Server) tell4(req, resp *dhcpv4.DHCPv4) {
	cfg := &s.cfg
	if req.MessageType() != dhcpv4.MessageTypeInform {
		resp.YourIPAddr = cfg.Guest4.Addr().AsSlice()
		resp.UpdateOption(dhcpv4.OptIPAddressLeaseTime(leaseTime))
	} else {
		resp.ClientIPAddr = req.ClientIPAddr
	}
	if req.MessageType() == dhcpv4.MessageTypeDiscover && resp.MessageType() == dhcpv4.MessageTypeAck {
		resp.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionRapidCommit, nil))
	}
	if id := req.Options.Get(dhcpv4.OptionClientIdentifier); id != nil { // RFC 6842
		resp.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientIdentifier, id))
	}
	mask := net.CIDRMask(cfg.Guest4.Bits(), 32)
	resp.UpdateOption(dhcpv4.OptSubnetMask(mask))
	resp.UpdateOption(dhcpv4.OptRouter(cfg.Gateway4.AsSlice()))
	if !cfg.Guest4.Contains(cfg.Gateway4) {
		// The gateway is not on the guest's prefix, so a route to it comes first (RFC 3442; clients
		// that take these ignore the router option).
		resp.UpdateOption(dhcpv4.OptClasslessStaticRoute(
			&dhcpv4.Route{Dest: &net.IPNet{IP: cfg.Gateway4.AsSlice(), Mask: net.CIDRMask(32, 32)}, Router: net.IPv4zero},
			&dhcpv4.Route{Dest: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, Router: cfg.Gateway4.AsSlice()},
		))
	}
	if len(s.dns4) > 0 {
		resp.UpdateOption(dhcpv4.OptDNS(s.dns4...))
	}
	if cfg.MTU >= 68 { // RFC 2132 section 5.1
		resp.UpdateOption(dhcpv4.Option{Code: dhcpv4.OptionInterfaceMTU, Value: dhcpv4.Uint16(cfg.MTU)})
	}
	if cfg.Hostname != "" {
		resp.UpdateOption(dhcpv4.OptHostName(cfg.Hostname))
	}
	// The search list comes last, as much of it as fits.
	limit := minDatagram4
	if n, err := req.MaxMessageSize(); err == nil {
		limit = min(max(limit, int(n)), maxDatagram4)
	}
	search := s.search
	for ; len(search) > 0; search = search[:len(search)-1] {
		resp.UpdateOption(dhcpv4.OptDomainName(search[0]))
		resp.UpdateOption(dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: search}))
		if len(resp.ToBytes()) <= limit-headers4 {
			return
		}
	}
	resp.Options.Del(dhcpv4.OptionDomainName)
	resp.Options.Del(dhcpv4.OptionDNSDomainSearchList)
}

// addr4 returns ip, or the zero Addr if there is none or it is 0.0.0.0.
func addr4(ip net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(ip)
	if a = a.Unmap(); !ok || !a.Is4() || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}
