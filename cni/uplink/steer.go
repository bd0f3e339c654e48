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
// The rule for marked packets must go before the kernel's own for local addresses, which therefore
// moves from preference 0 to a later one. When in0's monitor is gone, packets for the pod end at
// in0. If in0 is gone too, a second route discards them, so they are never delivered to the uplink
// namespace itself.
//
// Forwarding subtracts one from the hop limit; the worker adds it back.
//
// Until all of this is in place, packets from the main interface are discarded, except neighbour
// discovery: otherwise the namespace's kernel would answer for the pod, and reject where it must be
// silent. These are routing rules too, since each transaction of nf_tables takes some 12 ms.

const (
	InboundName = "in0"

	// The mark exists only in the uplink namespace: packets lose it on the way out.
	steerMark = 0x51c

	steerTable    = 0x51c
	steerPriority = 10
	localPriority = 100
	// For CloseUplink: precedes all others, once the kernel's own rule has moved.
	neighbourPriority = 4
	closedPriority    = 5
	// discardMetric is the metric of the route after in0's: the highest.
	discardMetric = 1<<31 - 1
)

// OpenInbound makes in0 in the uplink namespace.
func OpenInbound(uplinkNS ns.NetNS, cfg tun.Config) (dev *tun.Device, err error) {
	err = uplinkNS.Do(func(ns.NetNS) error {
		if dev, err = tun.Create(cfg); err != nil {
			return err
		}
		// The device is persistent and ends with the namespace, not with its descriptor. The kernel
		// then removes it in its own time, and stopping a monitor need not wait for that.
		err = unix.IoctlSetInt(dev.FDs()[0], unix.TUNSETPERSIST, 1)
		err = errors.Join(err,
			WriteSysctl("ipv4/conf/"+cfg.Name+"/accept_local", "1"),
			WriteSysctl("ipv4/conf/"+cfg.Name+"/rp_filter", "0"),
		)
		if hasIPv6() {
			// It has no address of its own: the kernel has nothing to send on this link.
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

// Steer installs the rules and routes, once in0 and the main interface exist.
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

// CloseUplink makes a new uplink namespace accept nothing from the main interface, which need not
// exist yet.
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

// openUplink undoes CloseUplink.
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

// moveLocal moves the kernel's own rule for local addresses behind others. It adds the new one
// before it removes the old one, so local addresses are local all the time.
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
		if err := h.LinkSetUp(lo); err != nil { // IPv6 discards through it
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
