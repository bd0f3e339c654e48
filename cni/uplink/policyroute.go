package uplink

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/nldump"
)

// Handles what chooses among routes: several gateways behind one route (multipath), and rules that
// send traffic to tables of its own (`ip rule`, as the plugin sbr makes them).
//
// Both matter twice. In the pod they stay as they were: the device has the routes of all tables,
// and rules belong to no interface. But the worker's sockets reach the world from the uplink
// namespace, so the rules that lead to the main interface's routes are made there too. A rule that
// matches on a property which the worker's sockets lack (a mark, a user) cannot be followed, and a
// route over this and another interface cannot be moved. ADD then fails, so that traffic cannot go
// astray.

// hopState is one of several gateways.
type hopState struct {
	Gateway netip.Addr `json:"gateway,omitzero"`
	Via     netip.Addr `json:"via,omitzero"`
	Weight  int        `json:"weight,omitempty"` // as the kernel has it: one less than what `ip` shows
	OnLink  bool       `json:"onlink,omitempty"`
}

// ruleState is a rule of the pod that leads to routes of the main interface.
type ruleState struct {
	Family   int          `json:"family"`
	Priority int          `json:"priority"`
	Table    int          `json:"table"`
	Src      netip.Prefix `json:"src,omitzero"`
	Dst      netip.Prefix `json:"dst,omitzero"`
	OifName  string       `json:"oif,omitempty"`
	TOS      uint         `json:"tos,omitempty"`
	Proto    int          `json:"proto,omitempty"`
	Sport    [2]uint16    `json:"sport,omitzero"`
	Dport    [2]uint16    `json:"dport,omitzero"`
	Invert   bool         `json:"invert,omitempty"`
	// suppress_prefixlength, or -1 if unset
	Prefixlen int `json:"prefixlen"`
}

// hopsOf returns the gateways of a multipath route, if all use the interface index; mine reports
// whether any does.
func hopsOf(r netlink.Route, index int) (hops []hopState, mine bool, err error) {
	for _, n := range r.MultiPath {
		mine = mine || n.LinkIndex == index
	}
	if !mine {
		return nil, false, nil
	}
	for _, n := range r.MultiPath {
		if n.LinkIndex != index {
			return nil, false, fmt.Errorf("a route (%s) is by several interfaces: sluice cannot move it; attach the interfaces without it", r)
		}
		h := hopState{Gateway: addrOfIP(n.Gw), Weight: n.Hops, OnLink: n.Flags&int(netlink.FLAG_ONLINK) != 0}
		if v, ok := n.Via.(*netlink.Via); ok {
			h.Via = addrOfIP(v.Addr)
		}
		hops = append(hops, h)
	}
	return hops, true, nil
}

func (h hopState) netlink(index int) *netlink.NexthopInfo {
	out := &netlink.NexthopInfo{LinkIndex: index, Gw: h.Gateway.AsSlice(), Hops: h.Weight}
	if h.OnLink {
		out.Flags = int(netlink.FLAG_ONLINK)
	}
	if h.Via.IsValid() {
		out.Via = &netlink.Via{AddrFamily: FamilyOf(h.Via), Addr: h.Via.AsSlice()}
	}
	return out
}

// readRules finds the rules of a namespace that lead to the routes of s.
func readRules(h *netlink.Handle, s *LinkState) ([]ruleState, error) {
	var out []ruleState
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := nldump.Steady(func() ([]netlink.Rule, error) { return h.RuleList(family) })
		if err != nil {
			return nil, fmt.Errorf("list the routing rules: %w", err)
		}
		for _, r := range list {
			leads := func(to RouteState) bool { return to.Family == family && to.Table == r.Table }
			ordinary := r.Table == unix.RT_TABLE_MAIN || r.Table == unix.RT_TABLE_LOCAL || r.Table == unix.RT_TABLE_DEFAULT
			// Traffic forwarded from another interface is not the worker's.
			forwarded := r.IifName != "" && r.IifName != "lo"
			if ordinary || forwarded || !slices.ContainsFunc(s.Routes, leads) {
				continue
			}
			if r.Mark != 0 || r.Mask != nil || r.UIDRange != nil || r.TunID != 0 || r.Goto > 0 || r.SuppressIfgroup >= 0 {
				return nil, fmt.Errorf("the pod's routing rule %d (%s) chooses by what leaves the pod with no packet: sluice cannot follow it; have the plugin before choose by address", r.Priority, r)
			}
			if r.Priority <= localPriority {
				return nil, fmt.Errorf("the pod's routing rule %d (%s) has one of the preferences up to %d, which sluice needs: have the plugin before use a later one", r.Priority, r, localPriority)
			}
			one := ruleState{
				Family: family, Priority: r.Priority, Table: r.Table, Src: PrefixOf(r.Src), Dst: PrefixOf(r.Dst), OifName: r.OifName,
				TOS: r.Tos, Proto: r.IPProto, Invert: r.Invert, Prefixlen: r.SuppressPrefixlen,
			}
			if r.Sport != nil {
				one.Sport = [2]uint16{r.Sport.Start, r.Sport.End}
			}
			if r.Dport != nil {
				one.Dport = [2]uint16{r.Dport.Start, r.Dport.End}
			}
			out = append(out, one)
		}
	}
	return out, nil
}

func (r ruleState) netlink() *netlink.Rule {
	out := netlink.NewRule()
	out.Family, out.Priority, out.Table, out.Src, out.Dst = r.Family, r.Priority, r.Table, IPNet(r.Src), IPNet(r.Dst)
	out.OifName, out.Tos, out.IPProto, out.Invert, out.SuppressPrefixlen = r.OifName, r.TOS, r.Proto, r.Invert, r.Prefixlen
	if r.Sport != [2]uint16{} {
		out.Sport = netlink.NewRulePortRange(r.Sport[0], r.Sport[1])
	}
	if r.Dport != [2]uint16{} {
		out.Dport = netlink.NewRulePortRange(r.Dport[0], r.Dport[1])
	}
	return out
}

// ApplyRules makes the rules of s in the uplink namespace, which is new.
func (s *LinkState) ApplyRules(h *netlink.Handle) error {
	for _, r := range s.Rules {
		if err := h.RuleAdd(r.netlink()); err != nil {
			return fmt.Errorf("add the routing rule %d (%s): %w", r.Priority, r.netlink(), err)
		}
	}
	return nil
}

// CheckRules compares the rules of the uplink namespace with what should be there.
func (s *LinkState) CheckRules(h *netlink.Handle) error {
	got, err := readRules(h, s)
	if err != nil {
		return err
	}
	for _, r := range s.Rules {
		if !slices.Contains(got, r) {
			return fmt.Errorf("the routing rule %d (%s) is gone", r.Priority, r.netlink())
		}
	}
	return nil
}

// ReadMain reads the state of the main interface as it is in the pod.
func ReadMain(pod ns.NetNS, h *netlink.Handle, name string) (netlink.Link, *LinkState, error) {
	link, s, err := ReadLink(h, name)
	if err != nil {
		return nil, nil, err
	}
	if s.Rules, err = readRules(h, s); err != nil {
		return nil, nil, err
	}
	if s.NoIPv6, err = ipv6Off(pod, name); err != nil {
		return nil, nil, err
	}
	s.Settings, err = ReadSettings(pod, name)
	return link, s, err
}
