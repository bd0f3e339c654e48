package uplink

// The settings that plugins such as tuning make on the pod's interface: its flags, and the kernel
// settings with its name in their path. Our device gets them, and so does the interface when it
// returns, because the kernel forgets them when an interface changes namespaces.

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
)

// settingTrees are the directories below /proc/sys/net with one directory per interface, each with
// the directory that shows the initial values of an interface: neigh has none called default but in
// the machine's first namespace.
var settingTrees = map[string]string{"ipv4/conf": "default", "ipv4/neigh": "lo", "ipv6/conf": "default", "ipv6/neigh": "lo"}

// ownSettings are settings that deviceSysctls or the device itself decides.
var ownSettings = []string{
	"ipv6/conf/disable_ipv6", "ipv6/conf/accept_dad", "ipv6/conf/dad_transmits", "ipv6/conf/accept_ra",
	"ipv6/conf/autoconf", "ipv6/conf/mtu",
}

// ReadSettings returns the settings of an interface that differ from those of a new interface,
// keyed by their paths below /proc/sys/net without its name.
func ReadSettings(n ns.NetNS, name string) (map[string]string, error) {
	found := make(map[string]string)
	err := n.Do(func(ns.NetNS) error {
		for tree, unset := range settingTrees {
			dir := filepath.Join("/proc/sys/net", tree)
			list, err := os.ReadDir(filepath.Join(dir, name))
			if errors.Is(err, os.ErrNotExist) {
				continue // a kernel without the family
			}
			if err != nil {
				return err
			}
			for _, e := range list {
				key := tree + "/" + e.Name()
				info, err := e.Info()
				if err != nil || info.Mode().Perm()&0o200 == 0 || slices.Contains(ownSettings, key) {
					continue
				}
				value, ok := readSetting(filepath.Join(dir, name, e.Name()))
				begin, known := readSetting(filepath.Join(dir, unset, e.Name()))
				if ok && (!known || value != begin) {
					found[key] = value
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the settings of %s: %w", name, err)
	}
	return found, nil
}

// readSetting reports false for a setting without a value, such as an IPv6 secret that was never
// set.
func readSetting(path string) (value string, ok bool) {
	b, err := os.ReadFile(path)
	return strings.Join(strings.Fields(string(b)), " "), err == nil
}

// ApplySettings gives a link the flags and settings of the interface.
func (s *LinkState) ApplySettings(n ns.NetNS, h *netlink.Handle, link netlink.Link) error {
	name := link.Attrs().Name
	if s.Promisc {
		if err := h.SetPromiscOn(link); err != nil {
			return fmt.Errorf("make %s promiscuous: %w", name, err)
		}
	}
	if s.Allmulti {
		if err := h.LinkSetAllmulticastOn(link); err != nil {
			return fmt.Errorf("have %s take all multicast: %w", name, err)
		}
	}
	return n.Do(func(ns.NetNS) error {
		for _, key := range slices.Sorted(maps.Keys(s.Settings)) {
			dir, setting := filepath.Split(key)
			if settingTrees[filepath.Clean(dir)] == "" {
				continue // not our key: the record is from a newer build
			}
			if err := WriteSysctl(dir+name+"/"+setting, s.Settings[key]); err != nil {
				return err
			}
		}
		return nil
	})
}
