package dhcp

// DHCPv6, RFC 8415 section 18.3, for a pool of one address.
//
// The first identity association for an address gets the guest's. All others, including those for
// temporary addresses and prefixes, get the status that none is available.

import (
	"net"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

// maxReply6 is the largest reply that fits the smallest IPv6 path MTU with its headers.
const maxReply6 = 1280 - 40 - 8

// HandleV6 answers a DHCPv6 message that came to UDP port 547. A nil reply means
// silence. The reply goes from Gateway6, port 547, to the sender's port 546.
func (s *Server) HandleV6(payload []byte, from netip.Addr) (reply []byte) {
	if !s.cfg.Guest6.IsValid() || len(payload) > maxRequest || !from.Is6() || from.IsMulticast() || from.IsUnspecified() {
		return nil
	}
	req, err := dhcpv6.MessageFromBytes(payload)
	if err != nil {
		return nil
	}
	client, server := req.GetOneOption(dhcpv6.OptionClientID), req.Options.ServerID()
	resp := &dhcpv6.Message{MessageType: dhcpv6.MessageTypeReply, TransactionID: req.TransactionID}
	var ias []dhcpv6.Option
	switch req.MessageType {
	case dhcpv6.MessageTypeSolicit, dhcpv6.MessageTypeConfirm, dhcpv6.MessageTypeRebind:
		if client == nil || req.GetOneOption(dhcpv6.OptionServerID) != nil {
			return nil
		}
	case dhcpv6.MessageTypeRequest, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline:
		if client == nil || server == nil || !server.Equal(s.duid()) {
			return nil
		}
	case dhcpv6.MessageTypeInformationRequest:
		if req.GetOneOption(dhcpv6.OptionServerID) != nil && (server == nil || !server.Equal(s.duid())) {
			return nil
		}
		if req.GetOneOption(dhcpv6.OptionIANA) != nil || req.GetOneOption(dhcpv6.OptionIATA) != nil || req.GetOneOption(dhcpv6.OptionIAPD) != nil {
			return nil
		}
	default: // messages that a server sends, relayed and unknown ones
		return nil
	}
	switch req.MessageType {
	case dhcpv6.MessageTypeSolicit:
		ias = s.assign(req)
		if len(ias) == 0 {
			return nil
		}
		if req.GetOneOption(dhcpv6.OptionRapidCommit) != nil {
			resp.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit})
		} else {
			resp.MessageType = dhcpv6.MessageTypeAdvertise
		}
	case dhcpv6.MessageTypeRequest, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeRebind:
		ias = s.assign(req)
	case dhcpv6.MessageTypeConfirm:
		status, ok := s.confirm(req)
		if !ok {
			return nil
		}
		ias = []dhcpv6.Option{&dhcpv6.OptStatusCode{StatusCode: status}}
	case dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline: // nothing to give back
		ias = []dhcpv6.Option{&dhcpv6.OptStatusCode{StatusCode: iana.StatusSuccess}}
	}
	if client != nil {
		resp.AddOption(client)
	}
	resp.AddOption(dhcpv6.OptServerID(s.duid()))
	for _, o := range ias {
		resp.AddOption(o)
	}
	if len(s.dns6) > 0 {
		resp.AddOption(dhcpv6.OptDNS(s.dns6...))
	}
	out := resp.ToBytes()
	if len(out) > maxReply6 { // the client asked for dozens of associations
		return nil
	}
	for search := s.search; len(search) > 0; search = search[:len(search)-1] {
		resp.UpdateOption(dhcpv6.OptDomainSearchList(&rfc1035label.Labels{Labels: search}))
		if full := resp.ToBytes(); len(full) <= maxReply6 {
			return full
		}
	}
	return out
}

// duid identifies this server: by its link address, or, on a link without any, by an opaque
// constant, since there is no other server on it.
func (s *Server) duid() dhcpv6.DUID {
	mac := s.cfg.GatewayMAC
	if len(mac) == 0 {
		mac = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	}
	return &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: mac}
}

// assign answers each identity association of req.
func (s *Server) assign(req *dhcpv6.Message) []dhcpv6.Option {
	guest := s.cfg.Guest6.Addr()
	var out []dhcpv6.Option
	given := false
	for _, o := range req.Options.Options {
		switch ia := o.(type) {
		case *dhcpv6.OptIANA:
			answer := &dhcpv6.OptIANA{IaId: ia.IaId}
			if given {
				answer.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoAddrsAvail})
			} else {
				given = true
				answer.T1, answer.T2 = leaseTime/2, leaseTime*4/5
				answer.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: guest.AsSlice(), PreferredLifetime: leaseTime, ValidLifetime: leaseTime})
			}
			// Other addresses that the client believes it has end now (section 18.3.4). In a
			// SOLICIT they are only hints, and are passed over.
			if req.MessageType != dhcpv6.MessageTypeSolicit && req.MessageType != dhcpv6.MessageTypeRequest {
				for _, a := range ia.Options.Addresses() {
					if have, ok := netip.AddrFromSlice(a.IPv6Addr); ok && have != guest {
						answer.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: a.IPv6Addr})
					}
				}
			}
			out = append(out, answer)
		case *dhcpv6.OptIATA:
			answer := &dhcpv6.OptIATA{IaId: ia.IaId}
			answer.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoAddrsAvail})
			out = append(out, answer)
		case *dhcpv6.OptIAPD:
			answer := &dhcpv6.OptIAPD{IaId: ia.IaId}
			answer.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoPrefixAvail})
			out = append(out, answer)
		}
	}
	return out
}

// confirm returns the status that says whether all addresses of the client belong on this link;
// false if it named none (section 18.3.3).
func (s *Server) confirm(req *dhcpv6.Message) (iana.StatusCode, bool) {
	n := 0
	for _, ia := range req.Options.IANA() {
		for _, a := range ia.Options.Addresses() {
			n++
			if have, ok := netip.AddrFromSlice(a.IPv6Addr); !ok || have != s.cfg.Guest6.Addr() {
				return iana.StatusNotOnLink, true
			}
		}
	}
	return iana.StatusSuccess, n > 0
}
