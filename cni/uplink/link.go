package uplink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/nldump"
)

// An interface that changes namespaces loses its addresses, routes and neighbours, because the
// kernel takes it down on the way. LinkState is what it had, as a value that can be written to the
// record and applied to any other interface.

// LinkState is an interface with its addresses, routes and neighbours.
type LinkState struct {
	Name     string       `json:"name"`
	MTU      int          `json:"mtu"`
	MAC      string       `json:"mac,omitempty"` // "" if it has none
	NoIPv6   bool         `json:"noIPv6,omitempty"`
	Addrs    []AddrState  `json:"addrs,omitempty"`
	Routes   []RouteState `json:"routes,omitempty"`
	Rules    []ruleState  `json:"rules,omitempty"`
	Neighs   []NeighState `json:"neighs,omitempty"`
	Promisc  bool         `json:"promisc,omitempty"`
	Allmulti bool         `json:"allmulti,omitempty"`
	// Settings are the settings below net/ that were changed from their defaults (settings.go).
	Settings map[string]string `json:"settings,omitempty"`
}

type AddrState struct {
	Prefix    netip.Prefix `json:"prefix"`
	Peer      netip.Prefix `json:"peer,omitzero"`
	Broadcast netip.Addr   `json:"broadcast,omitzero"`
	Label     string       `json:"label,omitempty"`
	Flags     int          `json:"flags,omitempty"`
	Scope     int          `json:"scope,omitempty"`
	Valid     int          `json:"valid,omitempty"` // seconds; 0 is for ever
	Preferred int          `json:"preferred,omitempty"`
}

type RouteState struct {
	Family   int          `json:"family"`
	Dst      netip.Prefix `json:"dst,omitzero"` // invalid is the default route
	Gateway  netip.Addr   `json:"gateway,omitzero"`
	Via      netip.Addr   `json:"via,omitzero"` // a gateway of the other family
	Source   netip.Addr   `json:"source,omitzero"`
	Table    int          `json:"table"`
	Metric   int          `json:"metric,omitempty"`
	Scope    int          `json:"scope,omitempty"`
	Protocol int          `json:"protocol,omitempty"`
	Type     int          `json:"type,omitempty"`
	TOS      int          `json:"tos,omitempty"`
	OnLink   bool         `json:"onlink,omitempty"`
	MTU      int          `json:"mtu,omitempty"`
	MTULock  bool         `json:"mtuLock,omitempty"`
	AdvMSS   int          `json:"advmss,omitempty"`
	HopLimit int          `json:"hoplimit,omitempty"`
	InitCwnd int          `json:"initcwnd,omitempty"`
	InitRwnd int          `json:"initrwnd,omitempty"`
	Congctl  string       `json:"congctl,omitempty"`
	Hops     []hopState   `json:"hops,omitempty"` // instead of a gateway
}

type NeighState struct {
	Addr      netip.Addr `json:"addr"`
	MAC       string     `json:"mac"`
	Permanent bool       `json:"permanent,omitempty"`
}

// keptAddrFlags are the flags that were chosen for an address; the others are its state.
const keptAddrFlags = unix.IFA_F_NOPREFIXROUTE | unix.IFA_F_HOMEADDRESS | unix.IFA_F_MANAGETEMPADDR

// ReadLink reads the state of the interface called name.
func ReadLink(h *netlink.Handle, name string) (netlink.Link, *LinkState, error) {
	link, err := h.LinkByName(name)
	if err != nil {
		return nil, nil, fmt.Errorf("find the interface %s: %w", name, err)
	}
	attrs := link.Attrs()
	s := &LinkState{Name: name, MTU: attrs.MTU, Promisc: attrs.Promisc > 0, Allmulti: attrs.Allmulti > 0}
	if len(attrs.HardwareAddr) == 6 {
		s.MAC = attrs.HardwareAddr.String()
	}
	addrs, err := nldump.Steady(func() ([]netlink.Addr, error) { return h.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, nil, fmt.Errorf("list the addresses of %s: %w", name, err)
	}
	for _, a := range addrs {
		s.Addrs = append(s.Addrs, addrOf(a, name))
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := nldump.Steady(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, nil, fmt.Errorf("list the routes of %s: %w", name, err)
		}
		for _, r := range routes {
			hops, several, err := hopsOf(r, attrs.Index)
			if err != nil {
				return nil, nil, err
			}
			if (several || r.LinkIndex == attrs.Index) && keepRoute(r) {
				one := routeOf(r, family)
				one.Hops = hops
				s.Routes = append(s.Routes, one)
			}
		}
		neighs, err := nldump.Steady(func() ([]netlink.Neigh, error) { return h.NeighList(attrs.Index, family) })
		if err != nil {
			return nil, nil, fmt.Errorf("list the neighbours of %s: %w", name, err)
		}
		for _, n := range neighs {
			ip, ok := netip.AddrFromSlice(n.IP)
			// Without a hardware address, or a use for one, there are no neighbours.
			if !ok || len(n.HardwareAddr) == 0 || n.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE|netlink.NUD_NOARP) != 0 {
				continue
			}
			s.Neighs = append(s.Neighs, NeighState{ip.Unmap(), n.HardwareAddr.String(), n.State&netlink.NUD_PERMANENT != 0})
		}
	}
	return link, s, nil
}

// keepRoute skips routes that the kernel derives from the addresses.
func keepRoute(r netlink.Route) bool {
	return r.Table != unix.RT_TABLE_LOCAL && r.Protocol != unix.RTPROT_KERNEL && r.Type == unix.RTN_UNICAST
}

func addrOf(a netlink.Addr, name string) AddrState {
	s := AddrState{Prefix: PrefixOf(a.IPNet), Flags: a.Flags & keptAddrFlags, Scope: a.Scope}
	if p := PrefixOf(a.Peer); p.IsValid() && p != s.Prefix {
		s.Peer = p
	}
	s.Broadcast, _ = netip.AddrFromSlice(a.Broadcast.To4())
	if a.Label != name {
		s.Label = a.Label
	}
	if a.Flags&unix.IFA_F_PERMANENT == 0 {
		s.Valid, s.Preferred = a.ValidLft, a.PreferedLft
	}
	return s
}

func routeOf(r netlink.Route, family int) RouteState {
	s := RouteState{
		Family: family, Dst: PrefixOf(r.Dst), Gateway: addrOfIP(r.Gw), Source: addrOfIP(r.Src),
		Table: r.Table, Metric: r.Priority, Scope: int(r.Scope), Protocol: int(r.Protocol), Type: r.Type, TOS: r.Tos,
		OnLink: r.Flags&int(netlink.FLAG_ONLINK) != 0,
		MTU:    r.MTU, MTULock: r.MTULock, AdvMSS: r.AdvMSS, HopLimit: r.Hoplimit,
		InitCwnd: r.InitCwnd, InitRwnd: r.InitRwnd, Congctl: r.Congctl,
	}
	if v, ok := r.Via.(*netlink.Via); ok {
		s.Via = addrOfIP(v.Addr)
	}
	if s.Dst.IsValid() && s.Dst.Bits() == 0 {
		s.Dst = netip.Prefix{}
	}
	return s
}

// behind reports whether the route uses a gateway.
func (r RouteState) behind() bool { return r.Gateway.IsValid() || len(r.Hops) > 0 }

// IsDefault reports whether the route is its family's default in the main table.
func (r RouteState) IsDefault() bool { return !r.Dst.IsValid() && r.Table == unix.RT_TABLE_MAIN }

func (r RouteState) netlink(index int) *netlink.Route {
	out := &netlink.Route{
		LinkIndex: index, Family: r.Family, Dst: IPNet(r.Dst), Gw: r.Gateway.AsSlice(), Src: r.Source.AsSlice(),
		Table: r.Table, Priority: r.Metric, Scope: netlink.Scope(r.Scope), Protocol: netlink.RouteProtocol(r.Protocol),
		Type: r.Type, Tos: r.TOS, MTU: r.MTU, MTULock: r.MTULock, AdvMSS: r.AdvMSS, Hoplimit: r.HopLimit,
		InitCwnd: r.InitCwnd, InitRwnd: r.InitRwnd, Congctl: r.Congctl,
	}
	if r.OnLink {
		out.Flags = int(netlink.FLAG_ONLINK)
	}
	if out.Dst == nil {
		out.Dst = IPNet(netip.PrefixFrom(Unspecified(r.Family), 0))
	}
	if r.Via.IsValid() {
		out.Via = &netlink.Via{AddrFamily: FamilyOf(r.Via), Addr: r.Via.AsSlice()}
	}
	for _, h := range r.Hops {
		out.MultiPath = append(out.MultiPath, h.netlink(index))
	}
	if len(out.MultiPath) > 0 {
		out.LinkIndex = 0
	}
	return out
}

// Prefixes returns the addresses that packets from elsewhere may be sent to.
func (s *LinkState) Prefixes() []netip.Prefix {
	var out []netip.Prefix
	for _, a := range s.Addrs {
		if !(a.Prefix.Addr().Is6() && a.Prefix.Addr().IsLinkLocalUnicast()) {
			out = append(out, a.Prefix)
		}
	}
	return out
}

func (s *LinkState) Has(family int) bool {
	return slices.ContainsFunc(s.Prefixes(), func(p netip.Prefix) bool { return FamilyOf(p.Addr()) == family })
}

func (s *LinkState) hasDefault(family int) bool {
	return slices.ContainsFunc(s.Routes, func(r RouteState) bool { return r.Family == family && r.IsDefault() })
}

// Apply gives an interface the addresses and routes of s and brings it up. withNeighs is for the
// main plugin's own interface; the neighbours behind ours are different.
func (s *LinkState) Apply(h *netlink.Handle, link netlink.Link, withNeighs bool) error {
	name, index := link.Attrs().Name, link.Attrs().Index
	// Up first: IPv6 routes need a link that is up.
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	for _, a := range s.Addrs {
		if s.NoIPv6 && a.Prefix.Addr().Is6() {
			continue
		}
		if err := h.AddrReplace(link, a.netlink(name)); err != nil {
			return fmt.Errorf("add the address %s to %s: %w", a.Prefix, name, err)
		}
	}
	s.dropReplacedPrefixRoutes(h, index)
	// A gateway is accepted only once there is a route to it. Of equal routes the newest takes
	// precedence, so ours are added in reverse.
	routes := slices.Clone(s.Routes)
	slices.Reverse(routes)
	slices.SortStableFunc(routes, func(a, b RouteState) int { return boolOrder(a.behind(), b.behind()) })
	for tries := 0; len(routes) > 0; tries++ {
		var failed []RouteState
		var errs []error
		for _, r := range routes {
			// Added, not replaced: another interface of the pod may have an equal route, such as
			// the default route of a second network.
			if err := h.RouteAddEcmp(r.netlink(index)); err != nil && !errors.Is(err, unix.EEXIST) {
				failed = append(failed, r)
				errs = append(errs, fmt.Errorf("add the route %s to %s: %w", r, name, err))
			}
		}
		if len(failed) == len(routes) {
			return errors.Join(errs...)
		}
		routes = failed
	}
	if !withNeighs {
		return nil
	}
	for _, n := range s.Neighs {
		mac, err := net.ParseMAC(n.MAC)
		if err != nil {
			continue
		}
		state := netlink.NUD_STALE
		if n.Permanent {
			state = netlink.NUD_PERMANENT
		}
		err = h.NeighSet(&netlink.Neigh{LinkIndex: index, Family: FamilyOf(n.Addr), State: state, IP: n.Addr.AsSlice(), HardwareAddr: mac})
		if err != nil && n.Permanent {
			return fmt.Errorf("add the neighbour %s to %s: %w", n.Addr, name, err)
		}
	}
	return nil
}

// dropReplacedPrefixRoutes removes the routes that the kernel makes with addresses where the main
// plugin has one of its own to the same prefix (as ptp has, since its pods do not share a link).
// For IPv6 the kernel's would win by its metric; for IPv4 it would exist beside the plugin's.
func (s *LinkState) dropReplacedPrefixRoutes(h *netlink.Handle, index int) {
	for _, a := range s.Addrs {
		p := a.Prefix.Masked()
		if !slices.ContainsFunc(s.Routes, func(r RouteState) bool { return r.Dst == p }) {
			continue
		}
		made := &netlink.Route{Family: FamilyOf(p.Addr()), LinkIndex: index, Dst: IPNet(p), Protocol: unix.RTPROT_KERNEL, Scope: netlink.SCOPE_LINK}
		if p.Addr().Is6() {
			made.Scope, made.Priority = netlink.SCOPE_UNIVERSE, 256
		}
		// There is none if the address's flags suppress it.
		_ = h.RouteDel(made)
	}
}

func (a AddrState) netlink(name string) *netlink.Addr {
	out := &netlink.Addr{IPNet: IPNet(a.Prefix), Flags: a.Flags, Scope: a.Scope, ValidLft: a.Valid, PreferedLft: a.Preferred}
	if a.Peer.IsValid() {
		out.Peer = IPNet(a.Peer)
	}
	if a.Prefix.Addr().Is6() {
		// The other end of either link is ours, or the main plugin checked it.
		out.Flags |= unix.IFA_F_NODAD
		return out
	}
	out.Broadcast = net.IPv4zero.To4() // none, where the library would invent one
	if a.Broadcast.IsValid() {
		out.Broadcast = a.Broadcast.AsSlice()
	}
	if out.Label = a.Label; out.Label != "" && !strings.HasPrefix(out.Label, name) {
		out.Label = ""
	}
	return out
}

func (r RouteState) String() string {
	text := "default"
	if r.Dst.IsValid() {
		text = r.Dst.String()
	}
	if r.Gateway.IsValid() {
		text += " via " + r.Gateway.String()
	}
	return text
}

func boolOrder(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

func FamilyOf(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func Unspecified(family int) netip.Addr {
	if family == netlink.FAMILY_V4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func addrOfIP(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// PrefixOf returns a valid prefix, or the zero one.
func PrefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	bits, _ := n.Mask.Size()
	a := addrOfIP(n.IP)
	if !a.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, bits)
}

func IPNet(p netip.Prefix) *net.IPNet {
	if !p.IsValid() {
		return nil
	}
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
