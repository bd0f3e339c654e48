package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/nldump"
)

// UplinkMTU returns the MTU of a family's default route, which is the route's own or its device's.
// Without such a route it returns the smallest MTU of the devices that are up, or 0 if there is
// none.
func UplinkMTU(family int) (int, error) {
	return nldump.Steady(func() (int, error) { return readUplinkMTU(family) })
}

func readUplinkMTU(family int) (int, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return 0, fmt.Errorf("list the host's devices: %w", err)
	}
	smallest := 0
	byIndex := make(map[int]int, len(links))
	for _, l := range links {
		a := l.Attrs()
		byIndex[a.Index] = a.MTU
		if a.Flags&net.FlagUp != 0 && a.Flags&net.FlagLoopback == 0 && (smallest == 0 || a.MTU < smallest) {
			smallest = a.MTU
		}
	}
	routes, err := netlink.RouteListFiltered(family, &netlink.Route{Dst: nil}, netlink.RT_FILTER_DST)
	if err != nil {
		return 0, fmt.Errorf("list the host's default routes: %w", err)
	}
	metric, mtu := -1, smallest
	for _, r := range routes {
		m := cmp.Or(r.MTU, byIndex[r.LinkIndex])
		if m > 0 && (metric < 0 || r.Priority < metric) {
			metric, mtu = r.Priority, m
		}
	}
	return mtu, nil
}

// hostSettle lets a burst of changes (an interface coming up) pass, so that rules are compiled once
// for all of it.
const hostSettle = 100 * time.Millisecond

// hostEvents are the groups in which the kernel announces changes of the host's ranges.
var hostEvents = []uint{
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
}

// WatchHostRanges calls changed with the host's ranges, at once and after each change, until ctx
// ends. If there are more than can be reported, it passes errTooManyHost. After every event it
// calls looked, even if the ranges are the same. It runs on the caller's goroutine and in its
// network namespace.
func WatchHostRanges(ctx context.Context, changed func([]netip.Prefix, error), looked func()) error {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, hostEvents...)
	if err != nil {
		return fmt.Errorf("watch the host's addresses: %w", err)
	}
	events, lost := make(chan struct{}, 1), make(chan error, 1)
	// Owned by WatchHostRanges, which closes the socket and waits.
	go func() {
		lost <- readHostEvents(s, events)
	}()
	ended := false
	defer func() {
		s.Close()
		if !ended {
			<-lost
		}
	}()
	var last []netip.Prefix
	for first, tooMany := true, false; ; first = false {
		now, err := HostRanges()
		if err != nil && !errors.Is(err, errTooManyHost) {
			return err
		}
		if first || tooMany != (err != nil) || !slices.Equal(now, last) {
			last, tooMany = now, err != nil
			changed(now, err)
		}
		looked()
		select {
		case <-ctx.Done():
			return nil
		case err := <-lost:
			ended = true
			return fmt.Errorf("watch the host's addresses: %w", err)
		case <-events:
		}
		select {
		case <-ctx.Done():
		case <-time.After(hostSettle):
		}
		select {
		case <-events: // the next list includes what came meanwhile
		default:
		}
	}
}

// readHostEvents reports that something changed, until the socket ends. A message that the kernel
// had to drop may have been a change.
func readHostEvents(s *nl.NetlinkSocket, events chan<- struct{}) error {
	for {
		list, from, err := s.Receive()
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
		if err == nil && (from.Pid != nl.PidKernel || !slices.ContainsFunc(list, changesHost)) {
			continue
		}
		select {
		case events <- struct{}{}:
		default:
		}
	}
}

// changesHost reports whether a message may be about a change of the host's ranges. A route to
// elsewhere is not; some hosts have many of those.
func changesHost(m syscall.NetlinkMessage) bool {
	if m.Header.Type != unix.RTM_NEWROUTE && m.Header.Type != unix.RTM_DELROUTE {
		return true
	}
	return len(m.Data) < unix.SizeofRtMsg || slices.Contains(ownRoutes, int(nl.DeserializeRtMsg(m.Data).Type))
}
