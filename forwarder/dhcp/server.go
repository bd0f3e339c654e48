package dhcp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"
)

const (
	// maxRequest bounds a client's message. Clients build theirs for a path MTU of 576 (v4) or 1280
	// (v6) bytes.
	maxRequest = 1500

	// leaseTime is how long a client may go without asking again. The address belongs to the guest
	// for good, so this only has to be far from zero.
	leaseTime = 24 * time.Hour

	// maxSearch bounds the search list that is sent.
	maxSearch = 32
)

// Config is what the guest is told. A family whose Guest prefix is zero is not served.
type Config struct {
	Guest4   netip.Prefix // the guest's address and its prefix length
	Gateway4 netip.Addr

	Guest6   netip.Prefix
	Gateway6 netip.Addr // link-local, as NDP identifies routers

	DNS        []netip.Addr // of both families
	Search     []string
	MTU        int              // zero: not sent
	GatewayMAC net.HardwareAddr // empty on a link without link addresses
	Hostname   string           // empty: not sent
}

// Server answers one guest. It is immutable: all methods may be called from any
// goroutine.
type Server struct {
	cfg        Config
	dns4, dns6 []net.IP
	search     []string
}

// New checks cfg and returns a Server.
func New(cfg Config) (*Server, error) {
	s := &Server{cfg: cfg}
	switch {
	case cfg.Guest4.IsValid() && !cfg.Guest4.Addr().Is4():
		return nil, fmt.Errorf("configuring DHCPv4: guest prefix %v is not IPv4", cfg.Guest4)
	case cfg.Guest4.IsValid() && !cfg.Gateway4.Is4():
		return nil, fmt.Errorf("configuring DHCPv4: gateway %v is not an IPv4 address", cfg.Gateway4)
	case cfg.Guest6.IsValid() && (!cfg.Guest6.Addr().Is6() || cfg.Guest6.Addr().Is4In6()):
		return nil, fmt.Errorf("configuring DHCPv6: guest prefix %v is not IPv6", cfg.Guest6)
	case cfg.Guest6.IsValid() && !(cfg.Gateway6.Is6() && cfg.Gateway6.IsLinkLocalUnicast()):
		return nil, fmt.Errorf("configuring router advertisements: gateway %v is not an IPv6 link-local address", cfg.Gateway6)
	case cfg.MTU < 0 || cfg.MTU > 65535:
		return nil, fmt.Errorf("configuring DHCP: MTU %d is not within 0 to 65535", cfg.MTU)
	case len(cfg.GatewayMAC) != 0 && len(cfg.GatewayMAC) != 6:
		return nil, errors.New("configuring DHCP: the gateway's MAC is not six bytes long")
	case len(cfg.Hostname) > 255:
		return nil, errors.New("configuring DHCP: the host name is longer than 255 bytes")
	}
	for _, a := range cfg.DNS {
		if a = a.Unmap().WithZone(""); a.Is4() {
			s.dns4 = append(s.dns4, a.AsSlice())
		} else if a.Is6() {
			s.dns6 = append(s.dns6, a.AsSlice())
		}
	}
	for _, d := range cfg.Search {
		d = strings.TrimSuffix(d, ".")
		if isDomain(d) && len(s.search) < maxSearch {
			s.search = append(s.search, d)
		}
	}
	return s, nil
}

// isDomain reports whether d can be encoded as RFC 1035 labels.
func isDomain(d string) bool {
	if d == "" || len(d) > 253 {
		return false
	}
	for label := range strings.SplitSeq(d, ".") {
		if label == "" || len(label) > 63 {
			return false
		}
	}
	return true
}
