package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"

	"sluice.dev/sluice/cni/uplink"
	"sluice.dev/sluice/tun"
)

// adding is an ADD under way.
type adding struct {
	p    *Plugin
	c    *Config
	args *skel.CmdArgs
	h    *held
	a    *Attachment
	undo uplink.Undo

	pod, uplink   ns.NetNS
	podH, uplinkH *netlink.Handle
	delegates     *chain
	result        *types100.Result
}

func (p *Plugin) add(ctx context.Context, c *Config, args *skel.CmdArgs) (types.Result, error) {
	if c.prevResult != nil && len(c.Delegate) > 0 {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "sluice is chained after a plugin and has a delegate too", "remove one of them")
	}
	if own, err := sameAsOurs(args.Netns); err != nil {
		return nil, types.NewError(types.ErrInvalidNetNS, "sluice: CNI_NETNS", err.Error())
	} else if own {
		return nil, types.NewError(types.ErrInvalidNetNS, "sluice: CNI_NETNS is the host's own namespace", "")
	}
	s, err := openStore(c.StateDir)
	if err != nil {
		return nil, err
	}
	name := attachmentName(c.Name, args.ContainerID, args.IfName)
	h, err := s.hold(ctx, name)
	if err != nil {
		return nil, err
	}
	defer h.release()
	ad := &adding{p: p, c: c, args: args, h: h, undo: uplink.Undo{Reached: p.Reached}}
	defer ad.close()
	err = ad.begin(ctx)
	if err == nil {
		err = ad.undo.Rollback(ad.run(ctx))
	}
	if err != nil {
		if _, none := h.read(); errors.Is(none, errNoRecord) {
			_ = h.remove() // only the lock was there
		}
		return nil, fmt.Errorf("sluice: ADD: %w", err)
	}
	return ad.result, nil
}

// close releases what the process holds; the attachment does not need it.
func (ad *adding) close() {
	for _, h := range []*netlink.Handle{ad.podH, ad.uplinkH} {
		if h != nil {
			h.Close()
		}
	}
	for _, n := range []ns.NetNS{ad.pod, ad.uplink} {
		if n != nil {
			_ = n.Close()
		}
	}
}

// begin cleans up after an unfinished ADD of the same attachment, refuses a finished one, and opens
// the pod's namespace.
func (ad *adding) begin(ctx context.Context) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	podID, err := uplink.NetnsID(ad.args.Netns)
	if err != nil {
		return err
	}
	cleared := false
	_, statErr := os.Lstat(ad.h.store.netns(ad.h.name))
	switch old, err := ad.h.read(); {
	case errors.Is(err, errNoRecord) && statErr != nil:
	case err == nil && (old.State == StateReady || old.State == StatePassed) && old.BootID == boot && old.NetNSID == podID:
		return fmt.Errorf("the container %s has %s in this network already", ad.args.ContainerID, ad.args.IfName)
	case err == nil || errors.Is(err, errTorn) || errors.Is(err, errNoRecord):
		if err := ad.p.teardown(ctx, ad.c, ad.args, ad.h, old, false); err != nil {
			return fmt.Errorf("clear up after an earlier call: %w", err)
		}
		cleared = true
	default:
		return err
	}
	if ad.pod, err = ns.GetNS(ad.args.Netns); err != nil {
		return types.NewError(types.ErrInvalidNetNS, "sluice: CNI_NETNS", err.Error())
	}
	if ad.podH, err = uplink.Handle(ad.pod); err != nil {
		return err
	}
	if cleared {
		// A monitor's devices end shortly after it.
		if err := uplink.RemoveDevice(ad.podH, ad.args.IfName); err != nil {
			return err
		}
	}
	ad.a = &Attachment{
		Version: recordVersion, Network: ad.c.Name, ContainerID: ad.args.ContainerID, IfName: ad.args.IfName,
		NetNS: ad.args.Netns, NetNSID: podID, BootID: boot, State: StateAdding, Since: time.Now(),
		Pod: podOf(ad.args.Args, ad.c.RuntimeConfig.Annotations), Delegated: !ad.c.chained(),
	}
	return nil
}

func (ad *adding) run(ctx context.Context) (err error) {
	if ad.a.Delegated {
		if ad.delegates, err = newChain(ad.c, ad.args, ad.p.Exec); err != nil {
			return err
		}
	}
	if !ad.c.Select.matches(ad.a.Pod) {
		return ad.pass(ctx)
	}
	spec, err := ad.spec()
	if err != nil {
		return err
	}
	if err := ad.p.Launcher.Check(*spec); err != nil {
		return err
	}
	if err := ad.interfaceAsExpected(); err != nil {
		return err
	}
	if err := ad.h.write(ad.a); err != nil {
		return err
	}
	if err := ad.undo.Done(uplink.StepRecorded, ad.h.remove); err != nil {
		return err
	}

	path := ad.h.store.netns(ad.h.name)
	if ad.uplink, err = uplink.MakeNetns(path); err != nil {
		return err
	}
	if err := ad.undo.Done(uplink.StepNamespace, func() error { return uplink.RemoveNetns(path) }); err != nil {
		return err
	}
	if ad.uplinkH, err = uplink.Handle(ad.uplink); err != nil {
		return err
	}
	if err := uplink.CloseUplink(ad.uplinkH, ad.args.IfName); err != nil {
		return err
	}
	link, err := ad.bringUplink(ctx)
	if err != nil {
		return err
	}
	if spec.Addrs = link.Prefixes(); len(spec.Addrs) == 0 {
		return fmt.Errorf("%s has no address: the main plugin must give it one", ad.args.IfName)
	}
	spec.Metadata, spec.NAT64 = ad.c.metadata, ad.c.nat64
	if spec.Resolvers, err = ad.c.resolversFor(ad.result, spec.Addrs); err != nil {
		return err
	}
	if spec.Device.MTU == 0 {
		spec.Device.MTU = min(max(link.MTU, tun.MinMTU), tun.MaxMTU)
	}
	spec.Inbound.MTU = min(max(link.MTU, tun.MinMTU), tun.MaxMTU)
	ad.a.Link, ad.a.Launch = link, spec
	if err := ad.p.serve(ctx, ad.h, ad.a, ad.pod, ad.podH, ad.uplink, ad.uplinkH, &ad.undo); err != nil {
		return err
	}
	ad.a.State = StateReady
	if err := ad.h.write(ad.a); err != nil {
		return err
	}
	if err := ad.undo.Done(uplink.StepCommitted, nil); err != nil {
		return err
	}
	return nil
}

// pass leaves a container to the main plugin.
func (ad *adding) pass(ctx context.Context) error {
	ad.a.State = StatePassed
	if err := ad.h.write(ad.a); err != nil {
		return err
	}
	if err := ad.undo.Done(uplink.StepRecorded, ad.h.remove); err != nil {
		return err
	}
	ad.result = ad.c.prevResult
	if !ad.a.Delegated {
		return nil
	}
	ad.undo.Push(func() error { return ad.delDelegates(ad.args.Netns) })
	r, err := ad.addDelegates(ctx, ad.args.Netns)
	if err != nil {
		return err
	}
	if ad.a.Result, err = json.Marshal(r); err != nil {
		return err
	}
	if ad.result, err = types100.NewResultFromResult(r); err != nil {
		return err
	}
	return ad.h.write(ad.a)
}

func (ad *adding) addDelegates(ctx context.Context, netns string) (r types.Result, err error) {
	err = ad.h.lend(func() error {
		r, err = ad.delegates.add(ctx, netns)
		return err
	})
	return r, err
}

func (ad *adding) delDelegates(netns string) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	return ad.h.lend(func() error { return ad.delegates.run(ctx, "DEL", netns, nil) })
}

// spec returns what the configuration specifies for the monitor.
func (ad *adding) spec() (*LaunchSpec, error) {
	c, a := ad.c, ad.a
	s := &LaunchSpec{
		Name:        ad.h.name,
		RuntimeDir:  ad.h.store.runtimeDir(),
		UplinkNetNS: ad.h.store.netns(ad.h.name),
		PodNetNS:    ad.args.Netns,
		Device:      tun.Config{Name: ad.args.IfName, Kind: c.kind, MTU: int(c.MTU), Queues: tun.DefaultQueues()},
		Inbound:     tun.Config{Name: uplink.InboundName, Kind: tun.TUN},
		Sysctls:     c.Sysctl,
		FlowLog:     c.FlowLog,

		FlowLogMaxSize: c.FlowLogMaxSize, FlowLogMaxFiles: c.FlowLogMaxFiles,
		Keep:     filepath.Join(ad.h.store.dir(ad.h.name), keepFile),
		Describe: []string{"container", a.ContainerID, a.IfName, "network", a.Network},
	}
	if a.Pod.Name != "" {
		s.Describe = []string{"pod", a.Pod.Namespace + "/" + a.Pod.Name, a.IfName, "network", a.Network}
	}
	var err error
	if s.Policy, err = c.policyFor(a.Pod); err != nil {
		return nil, err
	}
	if s.Limits, err = c.limits(); err != nil {
		return nil, err
	}
	if s.Cgroups, err = cgroupDirs(c.RuntimeConfig.CgroupPath); err != nil {
		return nil, err
	}
	return s, nil
}

// interfaceAsExpected checks that, chained, the main plugin's interface is in the pod and, alone,
// that no interface has that name.
func (ad *adding) interfaceAsExpected() error {
	link, err := uplink.FindLink(ad.podH, ad.args.IfName)
	switch {
	case err != nil:
		return err
	case link == nil && ad.a.Delegated:
		return nil
	case link == nil:
		return fmt.Errorf("the pod has no interface %s: the plugin before sluice must make it", ad.args.IfName)
	case ad.a.Delegated:
		return fmt.Errorf("the pod has an interface %s already", ad.args.IfName)
	case uplink.IsDevice(link):
		return fmt.Errorf("the interface %s is a TUN or TAP device: sluice must be chained once only", ad.args.IfName)
	}
	return nil
}

// bringUplink moves the main interface, with its addresses and routes, into the uplink namespace.
func (ad *adding) bringUplink(ctx context.Context) (*uplink.LinkState, error) {
	if ad.a.Delegated {
		return ad.runDelegates(ctx)
	}
	ad.result = ad.c.prevResult
	link, state, err := uplink.ReadMain(ad.pod, ad.podH, ad.args.IfName)
	if err != nil {
		return nil, err
	}
	ad.a.Link = state
	if err := ad.h.write(ad.a); err != nil {
		return nil, err
	}
	if err := ad.undo.Done(uplink.StepSaved, nil); err != nil {
		return nil, err
	}
	if err := uplink.MoveLink(ad.pod, link, ad.uplink, ad.args.IfName); err != nil {
		return nil, err
	}
	if err := ad.undo.Done(uplink.StepMoved, func() error {
		back := &giving{uplink: ad.uplink, pod: ad.pod, ifName: ad.args.IfName, state: state}
		return errors.Join(back.take(), back.give())
	}); err != nil {
		return nil, err
	}
	moved, err := ad.uplinkH.LinkByName(ad.args.IfName)
	if err != nil {
		return nil, fmt.Errorf("find %s after moving it: %w", ad.args.IfName, err)
	}
	if err := state.Apply(ad.uplinkH, moved, true); err != nil {
		return nil, fmt.Errorf("in the uplink namespace: %w", err)
	}
	if err := state.ApplyRules(ad.uplinkH); err != nil {
		return nil, fmt.Errorf("in the uplink namespace: %w", err)
	}
	if err := ad.undo.Done(uplink.StepRestored, nil); err != nil {
		return nil, err
	}
	return state, nil
}

func (ad *adding) runDelegates(ctx context.Context) (*uplink.LinkState, error) {
	path := ad.uplink.Path()
	ad.undo.Push(func() error { return ad.delDelegates(path) })
	r, err := ad.addDelegates(ctx, path)
	if err != nil {
		return nil, err
	}
	if err := ad.undo.Done(uplink.StepDelegated, nil); err != nil {
		return nil, err
	}
	if ad.a.Result, err = json.Marshal(r); err != nil {
		return nil, err
	}
	if ad.result, err = inPod(r, path, ad.args.Netns); err != nil {
		return nil, err
	}
	_, state, err := uplink.ReadLink(ad.uplinkH, ad.args.IfName)
	if err != nil {
		return nil, err
	}
	state.NoIPv6 = !state.Has(netlink.FAMILY_V6)
	state.Settings, err = uplink.ReadSettings(ad.uplink, ad.args.IfName)
	return state, err
}

// serve makes the devices and rules of an attachment whose main interface is in the
// uplink namespace, and starts its monitor. ADD and repair share it.
func (p *Plugin) serve(ctx context.Context, h *held, a *Attachment, pod ns.NetNS, podH *netlink.Handle, uplinkNS ns.NetNS, uplinkH *netlink.Handle, u *uplink.Undo) error {
	inbound, err := uplink.OpenInbound(uplinkNS, a.Launch.Inbound)
	if err != nil {
		return err
	}
	// The monitor has duplicates; ours are closed when this call ends.
	defer inbound.Close()
	if err := uplink.Steer(uplinkNS, uplinkH, a.IfName, a.Launch.Addrs); err != nil {
		return err
	}
	if err := u.Done(uplink.StepSteered, nil); err != nil {
		return err
	}
	device, err := uplink.OpenDevice(pod, a.Launch.Device)
	if err != nil {
		return err
	}
	defer device.Close()
	// A device ends with its descriptors, but the interface's name must be free before the main
	// plugin's interface returns.
	if err := u.Done(uplink.StepDevice, device.Close); err != nil {
		return err
	}
	if err := uplink.SetUpDevice(pod, podH, a.Launch.Device, a.Link); err != nil {
		return err
	}
	if err := u.Done(uplink.StepAddressed, nil); err != nil {
		return err
	}
	spec := *a.Launch
	if spec.DeviceFDs, err = uplink.Duplicate(device); err != nil {
		return err
	}
	defer uplink.CloseAll(spec.DeviceFDs)
	in, err := uplink.Duplicate(inbound)
	if err != nil {
		return err
	}
	defer uplink.CloseAll(in)
	spec.InboundFD = in[0]
	spec.Lock = h.lock
	pid, start, err := p.Launcher.Launch(ctx, spec)
	if err != nil {
		return err
	}
	a.MonitorPID, a.MonitorStart = pid, start
	if err := u.Done(uplink.StepLaunched, func() error {
		// In a rollback our descriptors are still open or already closed; either way the device
		// ends once the monitor has.
		ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
		defer cancel()
		return p.Launcher.Stop(ctx, spec)
	}); err != nil {
		return err
	}
	return nil
}
