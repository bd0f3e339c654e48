package uplink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/nldump"
	"sluice.dev/sluice/tun"
)

// The gateway that a pod gets for a family in which the main plugin gave none. Only our worker is
// behind the pod's device, and it answers for any neighbour; no pod network can use these
// addresses.
var (
	linkGateway4 = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	linkGateway6 = netip.MustParseAddr("fe80::1")
)

// gatewayMetric is the metric of a default route that the main plugin did not ask for: any other
// takes precedence.
const gatewayMetric = 4096

// OpenDevice makes the pod's device, which exists as long as its descriptors.
func OpenDevice(pod ns.NetNS, cfg tun.Config) (dev *tun.Device, err error) {
	err = pod.Do(func(ns.NetNS) error {
		dev, err = tun.Create(cfg)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make the pod's device: %w", err)
	}
	return dev, nil
}

// SetUpDevice gives the pod's device the state of the main plugin's interface.
func SetUpDevice(pod ns.NetNS, h *netlink.Handle, cfg tun.Config, s *LinkState) error {
	link, err := h.LinkByName(cfg.Name)
	if err != nil {
		return fmt.Errorf("find the pod's device: %w", err)
	}
	if cfg.Kind == tun.TAP && s.MAC != "" {
		mac, err := net.ParseMAC(s.MAC)
		if err == nil {
			err = h.LinkSetHardwareAddr(link, mac)
		}
		if err != nil {
			return fmt.Errorf("set the address of %s to %s: %w", cfg.Name, s.MAC, err)
		}
	}
	if hasIPv6() {
		if err := pod.Do(func(ns.NetNS) error { return deviceSysctls(cfg.Name, s.NoIPv6) }); err != nil {
			return err
		}
	}
	if err := s.ApplySettings(pod, h, link); err != nil {
		return err
	}
	routes, err := gatewayRoutes(h, s)
	if err != nil {
		return err
	}
	inside := *s
	inside.Routes = append(append([]RouteState(nil), s.Routes...), routes...)
	return inside.Apply(h, link, false)
}

// deviceSysctls lets only us configure the device; no other interface is touched.
func deviceSysctls(name string, noIPv6 bool) error {
	conf := "ipv6/conf/" + name + "/"
	if noIPv6 {
		return WriteSysctl(conf+"disable_ipv6", "1")
	}
	return errors.Join(
		WriteSysctl(conf+"disable_ipv6", "0"),
		WriteSysctl(conf+"accept_dad", "0"),
		WriteSysctl(conf+"dad_transmits", "0"),
		WriteSysctl(conf+"accept_ra", "0"),
		WriteSysctl(conf+"autoconf", "0"),
	)
}

// gatewayRoutes returns the default routes that the pod lacks. A pod always has one for each family
// of its addresses, so the worker decides what is unreachable.
func gatewayRoutes(h *netlink.Handle, s *LinkState) ([]RouteState, error) {
	var out []RouteState
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if !s.Has(family) || s.hasDefault(family) {
			continue
		}
		// Another interface of the pod may have one.
		list, err := nldump.Steady(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, fmt.Errorf("list the pod's routes: %w", err)
		}
		found := false
		for _, r := range list {
			found = found || r.Type == unix.RTN_UNICAST && routeOf(r, family).IsDefault()
		}
		if found {
			continue
		}
		gateway := linkGateway4
		if family == netlink.FAMILY_V6 {
			gateway = linkGateway6
		}
		out = append(out, RouteState{
			Family: family, Gateway: gateway, Table: unix.RT_TABLE_MAIN, Metric: gatewayMetric,
			Protocol: unix.RTPROT_STATIC, Type: unix.RTN_UNICAST, OnLink: true,
		})
	}
	return out, nil
}

// ipv6Off reports whether IPv6 is disabled on an interface.
func ipv6Off(n ns.NetNS, name string) (off bool, err error) {
	if !hasIPv6() {
		return true, nil
	}
	err = n.Do(func(ns.NetNS) error {
		b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6")
		off = strings.TrimSpace(string(b)) == "1"
		return err
	})
	if err != nil {
		return false, fmt.Errorf("read whether %s has IPv6: %w", name, err)
	}
	return off, nil
}

// IsDevice reports whether an interface is a TUN or TAP device. Ours are; the interface of a main
// plugin before Sluice never is.
func IsDevice(link netlink.Link) bool { return link.Type() == "tuntap" || link.Type() == "tun" }

// RemoveDevice deletes an interface called name if it is a device: one that a worker has not
// released yet.
func RemoveDevice(h *netlink.Handle, name string) error {
	link, err := FindLink(h, name)
	if err != nil || link == nil || !IsDevice(link) {
		return err
	}
	if err := h.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete the device %s: %w", name, err)
	}
	return nil
}

// Duplicate returns duplicates of a device's descriptors as files, for handing over.
func Duplicate(dev *tun.Device) ([]*os.File, error) {
	var out []*os.File
	for _, fd := range dev.FDs() {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			CloseAll(out)
			return nil, fmt.Errorf("duplicate a descriptor of %s: %w", dev.Name(), err)
		}
		out = append(out, os.NewFile(uintptr(d), dev.Name()))
	}
	return out, nil
}

func CloseAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
