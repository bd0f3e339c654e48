package uplink

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/tun"
)

// Two kinds of traffic reach the pod's addresses in the uplink namespace: that of the
// worker's own sockets, which speak for the pod, and what the world sends to the pod.
//
//	eth0 ─► prerouting: a socket of ours? ─ yes ─► local delivery, to the worker's socket
//	                                      └ no ──► mark ─► rule ─► table ─► in0 ─► worker ─► pod
//	in0 ──► prerouting ─► main plugin's routes ─► eth0
//
// The rule for marked packets must go before the kernel's own for local addresses,
// which therefore moves from preference 0 to a later one. When in0's monitor is gone,
// packets for the pod end there; and were in0 gone too, the route behind its own would
// discard them, so that they are never taken for the uplink namespace's own.
//
// Forwarding takes one from the hop limit, which the worker gives back.
//
// Until all that is there, what comes by the main interface is discarded, but for
// neighbour discovery: the namespace's own kernel would else answer for the pod, and
// refuse what is to be silent. These are routing rules too, since each transaction of
// nf_tables takes some 12 ms.

const (
	InboundName = "in0"

	// The mark lives in the uplink namespace only: packets lose it on the way out.
	steerMark = 0x51c

	steerTable    = 0x51c
	steerPriority = 10
	localPriority = 100
	// Of CloseUplink: before all others, once the kernel's own has moved.
	neighbourPriority = 4
	closedPriority    = 5
	// discardMetric is that of the route behind in0's: the highest.
	discardMetric = 1<<31 - 1
)

// OpenInbound makes in0 in the uplink namespace.
func OpenInbound(uplinkNS ns.NetNS, cfg tun.Config) (dev *tun.Device, err error) {
	err = uplinkNS.Do(func(ns.NetNS) error {
		if dev, err = tun.Create(cfg); err != nil {
			return err
		}
		// It ends with the namespace, not with its descriptor: the kernel removes it then
		// in its own time, where whoever stops a monitor would have to wait for it.
		err = unix.IoctlSetInt(dev.FDs()[0], unix.TUNSETPERSIST, 1)
		err = errors.Join(err,
			WriteSysctl("ipv4/conf/"+cfg.Name+"/accept_local", "1"),
			WriteSysctl("ipv4/conf/"+cfg.Name+"/rp_filter", "0"),
		)
		if hasIPv6() {
			// No address of its own: the kernel has nothing to say on this link.
			err = errors.Join(err, WriteSysctl("ipv6/conf/"+cfg.Name+"/addr_gen_mode", "1"))
		}
		if err != nil {
			_ = dev.Close()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make the inbound device: %w", err)
	}
	return dev, nil
}

// Steer puts the rules and routes in place, once in0 and the main interface are there.
func Steer(uplinkNS ns.NetNS, h *netlink.Handle, main string, addrs []netip.Prefix) error {
	in0, err := h.LinkByName(InboundName)
	if err != nil {
		return fmt.Errorf("find %s: %w", InboundName, err)
	}
	if err := h.LinkSetUp(in0); err != nil {
		return fmt.Errorf("bring %s up: %w", InboundName, err)
	}
	for _, family := range ipFamilies() {
		if err := steerRoutes(h, in0, family); err != nil {
			return fmt.Errorf("route traffic from outside to %s: %w", InboundName, err)
		}
	}
	if err := uplinkNS.Do(func(ns.NetNS) error { return steerRules(main, addrs) }); err != nil {
		return fmt.Errorf("add the rules for traffic from outside (the kernel needs nf_tables with the socket and tproxy expressions): %w", err)
	}
	return openUplink(h, main)
}

func ipFamilies() []int {
	if hasIPv6() {
		return []int{netlink.FAMILY_V4, netlink.FAMILY_V6}
	}
	return []int{netlink.FAMILY_V4}
}

// CloseUplink has a new uplink namespace take nothing by the main interface, which
// need not be there yet.
func CloseUplink(h *netlink.Handle, main string) error {
	for _, r := range closedRules(main) {
		if err := h.RuleAdd(r); err != nil {
			return fmt.Errorf("close the uplink namespace until all is in place: add the routing rule %d: %w", r.Priority, err)
		}
	}
	for _, family := range ipFamilies() {
		if err := moveLocal(h, family); err != nil {
			return fmt.Errorf("close the uplink namespace until all is in place: %w", err)
		}
	}
	return nil
}

// openUplink ends what CloseUplink began.
func openUplink(h *netlink.Handle, main string) error {
	for _, r := range closedRules(main) {
		if err := h.RuleDel(r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("open the uplink namespace: remove the routing rule %d: %w", r.Priority, err)
		}
	}
	return nil
}

func closedRules(main string) (out []*netlink.Rule) {
	for _, family := range ipFamilies() {
		if family == netlink.FAMILY_V6 {
			r := netlink.NewRule()
			r.Family, r.Priority, r.Table, r.IPProto = family, neighbourPriority, unix.RT_TABLE_LOCAL, unix.IPPROTO_ICMPV6
			out = append(out, r)
		}
		r := netlink.NewRule()
		r.Family, r.Priority, r.IifName, r.Type = family, closedPriority, main, unix.FR_ACT_BLACKHOLE
		out = append(out, r)
	}
	return out
}

// moveLocal makes the kernel's own rule, for local addresses, one that others can go
// before. It is added anew before it is taken from its place, so local addresses are
// local all the time.
func moveLocal(h *netlink.Handle, family int) error {
	local, first := netlink.NewRule(), netlink.NewRule()
	local.Family, local.Priority, local.Table = family, localPriority, unix.RT_TABLE_LOCAL
	first.Family, first.Priority, first.Table = family, 0, unix.RT_TABLE_LOCAL
	if err := h.RuleAdd(local); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := h.RuleDel(first); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

func steerRoutes(h *netlink.Handle, in0 netlink.Link, family int) error {
	all := IPNet(netip.PrefixFrom(Unspecified(family), 0))
	discard := &netlink.Route{Family: family, Dst: all, Table: steerTable, Type: unix.RTN_BLACKHOLE, Priority: discardMetric}
	if family == netlink.FAMILY_V6 {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := h.LinkSetUp(lo); err != nil { // IPv6 discards by way of it
			return err
		}
	}
	routes := []*netlink.Route{
		discard,
		{Family: family, Dst: all, Table: steerTable, LinkIndex: in0.Attrs().Index, Scope: netlink.SCOPE_LINK},
	}
	for _, r := range routes {
		if err := h.RouteReplace(r); err != nil {
			return err
		}
	}
	marked := netlink.NewRule()
	marked.Family, marked.Priority, marked.Table, marked.Mark = family, steerPriority, steerTable, steerMark
	if err := h.RuleAdd(marked); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return moveLocal(h, family)
}
