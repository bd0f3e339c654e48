package uplink

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The uplink namespace is a bind mount of a network namespace that no process need
// be in: it stays while the worker is restarted or a new binary takes over.

// MakeNetns makes a network namespace, bound at path and configured for forwarding.
// On error nothing is left.
func MakeNetns(path string) (_ ns.NetNS, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make the uplink namespace: %w", errors.Join(err, RemoveNetns(path)))
		}
	}()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o400)
	if err != nil {
		return nil, err
	}
	_ = f.Close()
	made := make(chan error)
	// Owned by MakeNetns, which waits for it. The thread is never given back: it ends
	// with the goroutine, because it is in the new namespace.
	go func() {
		runtime.LockOSThread()
		made <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := uplinkSysctls(); err != nil {
				return err
			}
			return unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, "")
		}()
	}()
	if err := <-made; err != nil {
		return nil, err
	}
	return ns.GetNS(path)
}

// RemoveNetns takes a bound namespace away; it is no error if there is none. The
// namespace itself ends with the last process in it.
func RemoveNetns(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	// EINVAL: not a mount, which is what an ADD killed early leaves, or a reboot.
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// uplinkSysctls makes the calling thread's namespace one that forwards between the
// main interface and in0. Interfaces that come later inherit from default.
func uplinkSysctls() error {
	v4 := [][2]string{
		{"ip_forward", "1"},
		// Packets from in0 carry an address of ours as their source, and leave by
		// whichever interface the main plugin's routes say.
		{"conf/all/rp_filter", "0"},
		{"conf/default/rp_filter", "0"},
		{"conf/all/send_redirects", "0"},
		{"conf/default/send_redirects", "0"},
		// The worker takes ports for UDP from above the default range, which the
		// kernel would cut off; the pod's own servers are below.
		{"ip_local_port_range", "32768 65535"},
		// The pod answers for itself.
		{"icmp_echo_ignore_all", "1"},
		// The worker pings as a user that is nobody.
		{"ping_group_range", "0 2147483647"},
	}
	for _, s := range v4 {
		if err := WriteSysctl("ipv4/"+s[0], s[1]); err != nil {
			return err
		}
	}
	if !hasIPv6() {
		return nil
	}
	v6 := [][2]string{
		{"icmp/echo_ignore_all", "1"},
		{"conf/all/disable_ipv6", "0"},
		{"conf/default/disable_ipv6", "0"},
		// A tentative address would fail the container's first second, and a router's
		// advertisements are the main plugin's affair (CVE-2020-10749).
		{"conf/default/accept_dad", "0"},
		{"conf/default/dad_transmits", "0"},
		{"conf/default/accept_ra", "0"},
		{"conf/default/autoconf", "0"},
		{"conf/all/forwarding", "1"},
	}
	for _, s := range v6 {
		if err := WriteSysctl("ipv6/"+s[0], s[1]); err != nil {
			return err
		}
	}
	return nil
}

// hasIPv6 says whether the kernel has it at all.
func hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6/conf")
	return err == nil
}

// WriteSysctl sets net/NAME in the calling thread's namespace. A value that is there
// already is left: some systems refuse the write, not the value.
func WriteSysctl(name, value string) error {
	path := filepath.Join("/proc/sys/net", name)
	if b, err := os.ReadFile(path); err == nil && strings.Join(strings.Fields(string(b)), " ") == value {
		return nil
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("set net/%s to %s: %w", name, value, err)
	}
	return nil
}

// Handle opens netlink in a namespace.
func Handle(n ns.NetNS) (*netlink.Handle, error) {
	h, err := netlink.NewHandleAt(netns.NsHandle(n.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink in %s: %w", n.Path(), err)
	}
	return h, nil
}

// NetnsID tells one network namespace from all others of this boot.
func NetnsID(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("look at the namespace %s: %w", path, err)
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino), nil
}

// OpenNetns opens a namespace that may be gone: nil then.
func OpenNetns(path string) (ns.NetNS, error) {
	if path == "" {
		return nil, nil
	}
	n, err := ns.GetNS(path)
	var notExist ns.NSPathNotExistErr
	var notNS ns.NSPathNotNSErr
	switch {
	case err == nil:
		return n, nil
	case errors.As(err, &notExist), errors.As(err, &notNS):
		return nil, nil
	}
	return nil, fmt.Errorf("open the namespace %s: %w", path, err)
}

// MoveLink moves an interface to another namespace, where it is called name.
func MoveLink(from ns.NetNS, link netlink.Link, to ns.NetNS, name string) error {
	err := from.Do(func(ns.NetNS) error {
		// One request, for the name may be taken where it goes.
		req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(link.Attrs().Index)
		req.AddData(msg)
		req.AddData(nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(to.Fd()))))
		req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
		_, err := req.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("move %s to the namespace %s: %w", link.Attrs().Name, to.Path(), err)
	}
	return nil
}

// FindLink is LinkByName, with nil for an interface that is not there.
func FindLink(h *netlink.Handle, name string) (netlink.Link, error) {
	link, err := h.LinkByName(name)
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find the interface %s: %w", name, err)
	}
	return link, nil
}
