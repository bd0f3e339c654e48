package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/cni/uplink"
)

// check fails if anything of an attachment is missing: the worker, the device with its
// addresses and routes, the uplink namespace with the main interface, the rules.
func (p *Plugin) check(ctx context.Context, c *Config, args *skel.CmdArgs) error {
	s, err := openStore(c.StateDir)
	if err != nil {
		return err
	}
	name := attachmentName(c.Name, args.ContainerID, args.IfName)
	h, err := s.hold(ctx, name)
	if err != nil {
		return err
	}
	defer h.release()
	a, err := h.read()
	if errors.Is(err, errNoRecord) {
		_ = h.remove()
		return types.NewError(types.ErrUnknownContainer, "sluice: CHECK", fmt.Sprintf("there is no attachment %s of the container %s", args.IfName, args.ContainerID))
	}
	if err == nil {
		err = p.checkAttachment(ctx, c, args, a)
	}
	if err != nil {
		return fmt.Errorf("sluice: CHECK: %w", err)
	}
	return nil
}

func (p *Plugin) checkAttachment(ctx context.Context, c *Config, args *skel.CmdArgs, a *Attachment) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	if a.BootID != boot {
		return errors.New("the attachment is of before the last reboot: delete the container and add it again")
	}
	id, err := uplink.NetnsID(args.Netns)
	if err != nil {
		return err
	}
	if id != a.NetNSID {
		return fmt.Errorf("the namespace %s is not the one that was attached: delete the container and add it again", args.Netns)
	}
	netns := args.Netns
	switch a.State {
	case StateAdding:
		return errors.New("the attachment was never completed: delete the container and add it again")
	case StateDeleting:
		return errors.New("a DEL of the attachment did not end: delete the container again")
	case StateReady:
		if err := p.checkReady(ctx, a); err != nil {
			return err
		}
		netns = a.Launch.UplinkNetNS
	}
	if !a.Delegated {
		return nil
	}
	delegates, err := newChain(c, args, p.Exec)
	if err != nil {
		return err
	}
	prev, err := resultOf(a.Result, c.CNIVersion)
	if err != nil {
		return err
	}
	return delegates.run(ctx, "CHECK", netns, prev)
}

func (p *Plugin) checkReady(ctx context.Context, a *Attachment) error {
	// First, because a dead monitor took the pod's device with it.
	if err := p.Launcher.Alive(ctx, *a.Launch); err != nil {
		return fmt.Errorf("nothing serves the pod, so it has no network (GC and STATUS start its monitor anew): %w", err)
	}
	if err := checkNamespace(a.NetNS, func(pod ns.NetNS, h *netlink.Handle) error {
		if err := checkLink(h, a.Link, a.Launch.Device.MTU); err != nil {
			return fmt.Errorf("in the pod: %w", err)
		}
		return nil
	}); err != nil {
		return err
	}
	return checkNamespace(a.Launch.UplinkNetNS, func(uplinkNS ns.NetNS, h *netlink.Handle) error {
		if err := checkLink(h, a.Link, a.Link.MTU); err != nil {
			return fmt.Errorf("in the uplink namespace: %w", err)
		}
		if err := a.Link.CheckRules(h); err != nil {
			return fmt.Errorf("in the uplink namespace: %w", err)
		}
		if _, err := h.LinkByName(uplink.InboundName); err != nil {
			return fmt.Errorf("in the uplink namespace: find %s: %w", uplink.InboundName, err)
		}
		return uplinkNS.Do(func(ns.NetNS) error {
			there, err := uplink.HaveRules()
			if err == nil && !there {
				err = errors.New("the rules for traffic from outside are gone from the uplink namespace")
			}
			return err
		})
	})
}

func checkNamespace(path string, f func(ns.NetNS, *netlink.Handle) error) error {
	n, err := ns.GetNS(path)
	if err != nil {
		return fmt.Errorf("open the namespace %s: %w", path, err)
	}
	defer n.Close()
	h, err := uplink.Handle(n)
	if err != nil {
		return err
	}
	defer h.Close()
	return f(n, h)
}

// checkLink compares an interface with its expected state. Extra addresses and routes are allowed.
func checkLink(h *netlink.Handle, want *uplink.LinkState, mtu int) error {
	link, got, err := uplink.ReadLink(h, want.Name)
	if err != nil {
		return err
	}
	if link.Attrs().Flags&unix.IFF_UP == 0 {
		return fmt.Errorf("%s is down", want.Name)
	}
	if got.MTU != mtu {
		return fmt.Errorf("%s has the MTU %d, not %d", want.Name, got.MTU, mtu)
	}
	if got.MAC != "" && want.MAC != "" && got.MAC != want.MAC {
		return fmt.Errorf("%s has the address %s, not %s", want.Name, got.MAC, want.MAC)
	}
	for _, p := range want.Prefixes() {
		if !slices.ContainsFunc(got.Addrs, func(a uplink.AddrState) bool { return a.Prefix == p }) {
			return fmt.Errorf("%s has not the address %s", want.Name, p)
		}
	}
	type way struct {
		family, table int
		dst           netip.Prefix
		gateway       netip.Addr
	}
	for _, r := range want.Routes {
		same := func(g uplink.RouteState) bool {
			return way{g.Family, g.Table, g.Dst, g.Gateway} == way{r.Family, r.Table, r.Dst, r.Gateway}
		}
		if !slices.ContainsFunc(got.Routes, same) {
			return fmt.Errorf("the route %s by %s is gone", r, want.Name)
		}
	}
	return nil
}

// errPluginNotAvailable is the specification's error code of STATUS.
const errPluginNotAvailable = 50

// statusRepair bounds the time that STATUS spends on containers: runtimes call it every few
// seconds.
const statusRepair = 20 * time.Second

// status reports whether an ADD could work now, and replaces dead monitors. It does not fail if one
// cannot be replaced: a node whose STATUS fails accepts no pods and loses those that it has, all
// because of one pod, which may have caused it on purpose.
func (p *Plugin) status(ctx context.Context, c *Config, args *skel.CmdArgs) error {
	notAvailable := func(what string, err error) error {
		return types.NewError(errPluginNotAvailable, "sluice: "+what, err.Error())
	}
	if _, err := openStore(c.StateDir); err != nil {
		return notAvailable("the state directory", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return notAvailable("/dev/net/tun (load the tun module)", err)
	}
	_ = unix.Close(fd)
	if _, err := uplink.HaveRules(); err != nil {
		return notAvailable("nf_tables", err)
	}
	if _, err := c.policyFor(Pod{}); err != nil {
		return notAvailable("the policy", err)
	}
	if len(c.Delegate) > 0 {
		delegates, err := newChain(c, args, p.Exec)
		if err != nil {
			return err
		}
		if err := delegates.run(ctx, "STATUS", "", nil); err != nil {
			return notAvailable("a delegate", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, statusRepair)
	defer cancel()
	if err := p.Repair(ctx, c.StateDir); err != nil {
		stderr := p.Stderr
		if stderr == nil {
			stderr = os.Stderr
		}
		fmt.Fprintf(stderr, "sluice: STATUS: containers without their monitor: %v\n", err)
	}
	return nil
}
