package guest

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/explain"
	"sluice.dev/sluice/tun"
)

// The guest's network: loopback, the device, its addresses and default routes. Nothing waits for
// duplicate address detection: the other end of the link is our own stack, and with a tentative
// address CMD would fail in its first second.

const sysctlRoot = "/proc/sys"

func (s *stage) network() (*tun.Device, error) {
	cfg := &s.spec.Config
	if !cfg.NoConfigure {
		if err := loopbackUp(); err != nil {
			return nil, fmt.Errorf("bringing the guest's loopback up: %w", explain.ExplainInside(err))
		}
		s.namespaceSysctls()
	}
	dev, err := tun.Create(cfg.Link)
	if err != nil {
		return nil, explainDevice(err)
	}
	if err := s.configure(dev.Name()); err != nil {
		dev.Close()
		return nil, err
	}
	return dev, nil
}

func explainDevice(err error) error {
	switch {
	case errors.Is(err, tun.ErrNoDevice):
		return fmt.Errorf("%w; as root: modprobe tun; in a container: pass --device /dev/net/tun", err)
	case errors.Is(err, tun.ErrPermission):
		return fmt.Errorf("%w; as root: chmod 666 /dev/net/tun, for good by a udev rule: KERNEL==\"tun\", MODE=\"0666\"", err)
	case errors.Is(err, tun.ErrExists):
		return fmt.Errorf("%w; choose another name, or remove it with ip link delete", err)
	}
	return err
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// namespaceSysctls sets the sysctls of the whole namespace. Somebody else's namespace gets only the
// ones asked for by name.
func (s *stage) namespaceSysctls() {
	cfg := &s.spec.Config
	if s.spec.Mode == modeRun {
		// Ping sockets for everyone, and port 80 for an ordinary user: this network is the caller's
		// own.
		s.sysctl("net.ipv4.ping_group_range", s.spec.PingGroups)
		s.sysctl("net.ipv4.ip_unprivileged_port_start", "0")
		if cfg.Addr6.IsValid() {
			// A new namespace may inherit the host's disabled IPv6.
			s.sysctl("net.ipv6.conf.all.disable_ipv6", "0")
			s.sysctl("net.ipv6.conf.default.disable_ipv6", "0")
		}
	}
	for _, k := range slices.Sorted(maps.Keys(cfg.Sysctls)) {
		s.sysctl(k, cfg.Sysctls[k])
	}
}

// sysctl sets the sysctl of a dotted name. If the machine lacks it, that is noted and not an error.
func (s *stage) sysctl(name, value string) {
	path := filepath.Join(sysctlRoot, strings.ReplaceAll(name, ".", "/"))
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		s.note("sysctl %s=%s: %v", name, value, errors.Unwrap(err))
	}
}

// deviceSysctl is sysctl for one device, whose name may contain dots itself.
func (s *stage) deviceSysctl(dev, name, value string) {
	path := filepath.Join(sysctlRoot, "net/ipv6/conf", dev, name)
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		s.note("%s of %s to %s: %v", name, dev, value, errors.Unwrap(err))
	}
}

func (s *stage) configure(name string) error {
	cfg := &s.spec.Config
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding %s: %w", name, err)
	}
	if cfg.MAC != nil && cfg.Link.Kind == tun.TAP {
		if err := netlink.LinkSetHardwareAddr(link, cfg.MAC); err != nil {
			return fmt.Errorf("setting the address of %s to %s: %w", name, cfg.MAC, err)
		}
	}
	if cfg.NoConfigure {
		return nil
	}
	with6 := s.prepareIPv6(name)
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bringing %s up: %w", name, err)
	}
	if err := address(link, cfg.Addr4, cfg.Gateway4, cfg.PathMTU4); err != nil {
		return err
	}
	if with6 {
		return address(link, cfg.Addr6, cfg.Gateway6, cfg.PathMTU6)
	}
	return nil
}

// prepareIPv6 turns off autoconfiguration and duplicate address detection, as we configure the
// device ourselves. It reports whether there is an address to assign.
func (s *stage) prepareIPv6(name string) bool {
	if _, err := os.Stat(filepath.Join(sysctlRoot, "net/ipv6")); err != nil {
		if s.spec.Config.Addr6.IsValid() {
			s.note("no IPv6 in the sandbox: this kernel has it switched off")
		}
		return false
	}
	if !s.spec.Config.Addr6.IsValid() {
		s.deviceSysctl(name, "disable_ipv6", "1")
		return false
	}
	s.deviceSysctl(name, "disable_ipv6", "0")
	for _, k := range []string{"accept_ra", "accept_dad", "dad_transmits", "autoconf"} {
		s.deviceSysctl(name, k, "0")
	}
	return true
}

// address gives the link an address and adds the default route of its family.
func address(link netlink.Link, p netip.Prefix, gateway netip.Addr, pathMTU int) error {
	if !p.IsValid() {
		return nil
	}
	name := link.Attrs().Name
	bits := p.Addr().BitLen()
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), bits)}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(link, a); err != nil {
		return fmt.Errorf("adding %s to %s: %w", p, name, err)
	}
	if !gateway.IsValid() {
		return nil
	}
	r := &netlink.Route{
		LinkIndex: link.Attrs().Index,
		Dst:       &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)},
		Gw:        gateway.AsSlice(),
	}
	if pathMTU >= tun.MinMTU && pathMTU < link.Attrs().MTU {
		r.MTU = pathMTU
	}
	if !p.Contains(gateway) && !gateway.IsLinkLocalUnicast() {
		r.Flags = int(netlink.FLAG_ONLINK)
	}
	if err := netlink.RouteAdd(r); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("adding the default route via %s: the network namespace has one already; remove it, or attach without configuring", gateway)
		}
		return fmt.Errorf("adding the default route via %s: %w", gateway, err)
	}
	return nil
}
