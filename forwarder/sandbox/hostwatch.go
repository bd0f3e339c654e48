package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

// hostAddrs lists every address of the caller's network namespace.
func hostAddrs() ([]netip.Addr, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range list {
		if a.IPNet == nil {
			continue
		}
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			out = append(out, ip.Unmap())
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

// uplinkMTU is the MTU of a family's default route, the route's own or its device's;
// without such a route the smallest of the devices that are up; 0 if there is none.
func uplinkMTU(family int) (int, error) {
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

// addrSettle lets a burst of changes (an interface that comes up) pass before
// rules are compiled once for all of it.
const addrSettle = 100 * time.Millisecond

// watchHostAddrs calls changed with the new list after each change, until ctx
// ends. It runs on the caller's goroutine.
func watchHostAddrs(ctx context.Context, changed func([]netip.Addr)) error {
	done := make(chan struct{})
	defer close(done)
	updates := make(chan netlink.AddrUpdate, 64)
	lost := make(chan error, 1)
	err := netlink.AddrSubscribeWithOptions(updates, done, netlink.AddrSubscribeOptions{
		ErrorCallback: func(err error) {
			select {
			case lost <- err:
			default:
			}
		},
	})
	if err != nil {
		return fmt.Errorf("watch the host's addresses: %w", err)
	}
	// The library's goroutine blocks on a full channel: what is left in it when
	// we go must not hold it.
	defer func() {
		go func() {
			for range updates {
			}
		}()
	}()
	last, err := hostAddrs()
	if err != nil {
		return err
	}
	changed(last)
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-lost:
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("watch the host's addresses: %w", err)
		case <-updates:
		}
		sleepContext(ctx, addrSettle)
		for drained := false; !drained; {
			select {
			case <-updates:
			default:
				drained = true
			}
		}
		now, err := hostAddrs()
		if err != nil {
			return err
		}
		if !slices.Equal(now, last) {
			last = now
			changed(now)
		}
	}
}
