package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"sluice.dev/sluice/internal/prefix"
)

// check verifies what Compile relies on. Parse reports the same mistakes with their place in the
// file; this is for policies built in code.
func (r *Rule) check(ingress bool) error {
	peers, other := r.To, r.From
	if ingress {
		peers, other = other, peers
	}
	if len(other) > 0 {
		return errors.New("egress rules have to, ingress rules have from")
	}
	if r.Action > Allow {
		return fmt.Errorf("action: %v", r.Action)
	}
	for _, p := range peers {
		if err := p.check(); err != nil {
			return err
		}
	}
	if ingress && slices.ContainsFunc(peers, func(p Peer) bool { return p.Domain != "" }) {
		return errors.New("only egress rules match by domain")
	}
	for _, p := range r.Ports {
		if err := p.check(); err != nil {
			return err
		}
	}
	if err := r.checkByName(ingress); err != nil {
		return err
	}
	for _, m := range r.ICMP {
		if err := m.check(); err != nil {
			return err
		}
	}
	return nil
}

// checkByName verifies that the fields for names and requests fit the other fields.
func (r *Rule) checkByName(ingress bool) error {
	named := slices.ContainsFunc(r.To, func(p Peer) bool { return p.Domain != "" })
	if !named && (r.Verify != "" || r.MissingName != "" || r.ECH != "" || r.QUIC != "" || r.PrivateAddresses != "") {
		return errors.New("verify, missingName, ech, quic and privateAddresses need a domain in to")
	}
	if r.Action != Allow && (r.MissingName != "" || r.ECH != "" || r.QUIC != "" || r.PrivateAddresses != "") {
		return errors.New("missingName, ech, quic and privateAddresses are for allow rules")
	}
	if r.Verify != "" && !slices.Contains(verifyRules, r.Verify) {
		return fmt.Errorf("unknown verify %q", string(r.Verify))
	}
	for _, s := range []Setting{r.MissingName, r.ECH, r.QUIC, r.PrivateAddresses} {
		if s != "" && !slices.Contains(settings, s) {
			return fmt.Errorf("unknown setting %q", string(s))
		}
	}
	if len(r.HTTP) == 0 {
		return nil
	}
	tcp := len(r.Ports) > 0 && len(r.ICMP) == 0 && !slices.ContainsFunc(r.Ports, func(p Port) bool { return p.Protocol != TCP })
	if ingress || r.Action != Allow || !tcp || r.Verify == VerifyRuleGrant {
		return errors.New("http is for allow rules in egress whose ports are all of TCP, and not with verify: grant")
	}
	for _, m := range r.HTTP {
		if err := m.check(); err != nil {
			return err
		}
	}
	return nil
}

func (p Peer) check() error {
	switch {
	case p.Domain != "" && (p.Entity != "" || p.CIDR.IsValid() || len(p.Except) > 0):
		return errors.New("a peer is a domain, a cidr or an entity, not two of them")
	case p.Domain != "":
		if norm, err := NormalizePattern(p.Domain); err != nil {
			return fmt.Errorf("domain %q: %w", p.Domain, err)
		} else if norm != p.Domain {
			return fmt.Errorf("domain %q is not in its normal form, %q", p.Domain, norm)
		}
		return nil
	case p.Entity != "" && p.CIDR.IsValid():
		return errors.New("a peer is a cidr or an entity, not both")
	case p.Entity != "" && len(p.Except) > 0:
		return errors.New("except needs a cidr")
	case p.Entity != "":
		if !slices.Contains(entities, p.Entity) {
			return fmt.Errorf("unknown entity %q", string(p.Entity))
		}
		return nil
	}
	if err := checkPrefix(p.CIDR); err != nil {
		return err
	}
	for _, e := range p.Except {
		if err := checkPrefix(e); err != nil {
			return err
		}
		if !prefix.Covers(p.CIDR, e) || e == p.CIDR {
			return fmt.Errorf("except %v is not a part of cidr %v", e, p.CIDR)
		}
	}
	return nil
}

func checkPrefix(p netip.Prefix) error {
	if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
		return fmt.Errorf("cidr %v is not a network in its plain form", p)
	}
	return nil
}

func (p Port) check() error {
	switch {
	case !slices.ContainsFunc(protocols, func(k protocolName) bool { return k.num == p.Protocol }):
		return fmt.Errorf("unknown protocol %d", uint8(p.Protocol))
	case (p.Port != 0 || p.EndPort != 0) && !p.Protocol.hasPorts():
		return fmt.Errorf("%v has no ports", p.Protocol)
	case p.EndPort != 0 && (p.Port == 0 || p.EndPort < p.Port):
		return fmt.Errorf("port range %d-%d is inverted or has no start", p.Port, p.EndPort)
	}
	return nil
}

func (m ICMP) check() error {
	if m.Family != IPv4 && m.Family != IPv6 {
		return fmt.Errorf("icmp family %q is neither IPv4 nor IPv6", string(m.Family))
	}
	if m.Code != nil && m.Type == nil {
		return errors.New("icmp code without a type")
	}
	return nil
}
