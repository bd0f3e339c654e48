package cni

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/plugins/pkg/ns"

	"sluice.dev/sluice/cni/uplink"
)

// gc removes this network's attachments that the runtime no longer knows, and repairs those that it
// knows and whose monitor is dead. It continues after errors.
func (p *Plugin) gc(ctx context.Context, c *Config, args *skel.CmdArgs) error {
	s, err := openStore(c.StateDir)
	if err != nil {
		return err
	}
	valid := make(map[string]bool)
	for _, v := range c.ValidAttachments {
		valid[attachmentName(c.Name, v.ContainerID, v.IfName)] = true
	}
	names, err := s.names()
	if err != nil {
		return err
	}
	var errs []error
	alone := len(c.Delegate) > 0
	for _, name := range names {
		if !ofNetwork(name, c.Name) {
			continue
		}
		delegated, err := p.sweep(ctx, c, args, s, name, valid[name])
		alone = alone || delegated
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	// If no attachment of ours is left, only the configuration can say whether delegates have
	// leases of their own to sweep.
	if alone {
		delegates, err := newChain(c, args, p.Exec)
		if err == nil {
			delegates.withAttachments(c.ValidAttachments)
			err = delegates.run(ctx, "GC", "", nil)
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sluice: GC: %w", err)
	}
	return nil
}

// sweep removes or repairs one attachment.
func (p *Plugin) sweep(ctx context.Context, c *Config, args *skel.CmdArgs, s store, name string, valid bool) (delegated bool, err error) {
	h, err := s.hold(ctx, name)
	if err != nil {
		return false, err
	}
	defer h.release()
	a, err := h.read()
	if err != nil && !errors.Is(err, errNoRecord) && !errors.Is(err, errTorn) {
		return false, err
	}
	delegated = a != nil && a.Delegated
	if valid {
		if a == nil {
			// Its container lives, and DEL will clean up: there is nothing to go by until then.
			return delegated, nil
		}
		return delegated, p.repair(ctx, h, a)
	}
	// The delegates are told which container the leftovers belong to.
	mine := *args
	if a != nil {
		mine.ContainerID, mine.IfName, mine.Netns = a.ContainerID, a.IfName, a.NetNS
	}
	return delegated, p.teardown(ctx, c, &mine, h, a, true)
}

// Repair starts the missing monitors of all attachments in the given state directory. The node's
// agent calls it; STATUS and GC do too.
func (p *Plugin) Repair(ctx context.Context, stateDir string) error {
	s, err := openStore(stateDir)
	if err != nil {
		return err
	}
	names, err := s.names()
	if err != nil {
		return err
	}
	// A slow one, as in a container that is short of CPU, must not delay the others.
	errs := make([]error, len(names))
	slots := make(chan struct{}, repairsAtOnce)
	var wg sync.WaitGroup
	for i, name := range names {
		slots <- struct{}{}
		// Owned by Repair, which waits for it.
		wg.Go(func() {
			defer func() { <-slots }()
			if err := p.repairNamed(ctx, s, name); err != nil {
				errs[i] = fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// repairsAtOnce bounds the attachments that are checked in parallel.
const repairsAtOnce = 8

func (p *Plugin) repairNamed(ctx context.Context, s store, name string) error {
	h, err := s.tryHold(name)
	if err != nil {
		return nil // a verb is working on it, or it is gone
	}
	defer h.release()
	a, err := h.read()
	if errors.Is(err, errNoRecord) {
		// tryHold made the directory, or a DEL left it: it is empty. Anything else belongs to GC,
		// which knows what is valid.
		return h.remove()
	}
	if err != nil {
		return nil // torn: DEL and GC handle it
	}
	return p.repair(ctx, h, a)
}

// repair replaces the monitor of an attachment if it is dead and everything else is in place. The
// pod's interface comes back with the same addresses, and the policy is the one set last.
func (p *Plugin) repair(ctx context.Context, h *held, a *Attachment) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	if a.State != StateReady || a.BootID != boot || a.Launch == nil || a.Link == nil {
		return nil
	}
	if gone, err := p.Launcher.Gone(*a.Launch); err != nil || !gone {
		return err
	}
	id, err := uplink.NetnsID(a.NetNS)
	if err != nil || id != a.NetNSID {
		return nil // the pod is gone
	}
	pod, err := ns.GetNS(a.NetNS)
	if err != nil {
		return err
	}
	defer pod.Close()
	uplinkNS, err := ns.GetNS(a.Launch.UplinkNetNS)
	if err != nil {
		return fmt.Errorf("the uplink namespace is gone, and with it the pod's interface: delete the pod: %w", err)
	}
	defer uplinkNS.Close()
	podH, err := uplink.Handle(pod)
	if err != nil {
		return err
	}
	defer podH.Close()
	uplinkH, err := uplink.Handle(uplinkNS)
	if err != nil {
		return err
	}
	defer uplinkH.Close()
	if err := p.Launcher.Stop(ctx, *a.Launch); err != nil {
		return err
	}
	if err := errors.Join(uplink.RemoveDevice(podH, a.IfName), uplink.RemoveDevice(uplinkH, uplink.InboundName)); err != nil {
		return err
	}
	var u uplink.Undo
	if err := u.Rollback(p.serve(ctx, h, a, pod, podH, uplinkNS, uplinkH, &u)); err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	return h.write(a)
}
