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

// The uplink namespace is a bind mount of a network namespace, so it exists without any process in
// it: it stays while the worker is restarted or a new binary takes over.

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
	// Owned by MakeNetns, which waits for it. The thread is in the new namespace, so it is never
	// unlocked and ends with the goroutine.
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

// RemoveNetns removes a bound namespace; it is no error if there is none. The namespace itself ends
// with the last process in it.
func RemoveNetns(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	// EINVAL: not a mount, as an ADD that was killed early, or a reboot, leaves it.
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// uplinkSysctls makes the calling thread's namespace forward between the main interface and in0.
// Later interfaces inherit from default.
func uplinkSysctls() error {
	v4 := [][2]string{
		{"ip_forward", "1"},
		// Packets from in0 have one of our addresses as their source, and leave by whichever
		// interface the main plugin's routes choose.
		{"conf/all/rp_filter", "0"},
		{"conf/default/rp_filter", "0"},
		{"conf/all/send_redirects", "0"},
		{"conf/default/send_redirects", "0"},
		// The worker takes UDP ports from above the default range, which the kernel would exclude;
		// the pod's own servers are below.
		{"ip_local_port_range", "32768 65535"},
		// The pod itself answers.
		{"icmp_echo_ignore_all", "1"},
		// The worker pings as the unprivileged user nobody.
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
		// A tentative address would cost the container its first second, and router advertisements
		// are the main plugin's business (CVE-2020-10749).
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

// hasIPv6 reports whether the kernel has IPv6.
func hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6/conf")
	return err == nil
}

// WriteSysctl sets net/NAME in the calling thread's namespace. It does not write a value that is
// set already: some systems refuse any write.
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

// NetnsID identifies a network namespace within this boot.
func NetnsID(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("look at the namespace %s: %w", path, err)
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino), nil
}

// OpenNetns opens a namespace, or returns nil if it is gone.
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

// MoveLink moves an interface to another namespace and renames it to name.
func MoveLink(from ns.NetNS, link netlink.Link, to ns.NetNS, name string) error {
	err := from.Do(func(ns.NetNS) error {
		// One request, because its present name may be taken at the destination.
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

// FindLink is LinkByName, but returns nil if the interface does not exist.
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
