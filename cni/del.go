package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"

	"sluice.dev/sluice/cni/uplink"
)

// The steps of DEL at which a test may fail, in addition to those of ADD.
const (
	stepStopped = "stopped" // the monitor is gone, and the devices with it
	stepGiven   = "given"   // the pod has the main plugin's interface again
	stepUnbound = "unbound" // the uplink namespace is gone
)

func (p *Plugin) del(ctx context.Context, c *Config, args *skel.CmdArgs) error {
	s, err := openStore(c.StateDir)
	if err != nil {
		return err
	}
	h, err := s.hold(ctx, attachmentName(c.Name, args.ContainerID, args.IfName))
	if err != nil {
		return err
	}
	defer h.release()
	a, err := h.read()
	if err != nil && !errors.Is(err, errNoRecord) && !errors.Is(err, errTorn) {
		return fmt.Errorf("sluice: DEL: %w", err)
	}
	if err := p.teardown(ctx, c, args, h, a, true); err != nil {
		if _, statErr := os.Lstat(s.netns(h.name)); a == nil && errors.Is(statErr, fs.ErrNotExist) {
			_ = h.remove() // the delegates' container, not ours
		}
		return fmt.Errorf("sluice: DEL: %w", err)
	}
	return nil
}

// teardown removes whatever exists of an attachment. a is its record, or nil if there is no
// readable one. Every step is tried; if one fails the record stays, so that the call can be
// repeated. final is false when an ADD is about to start over in the same directory.
func (p *Plugin) teardown(ctx context.Context, c *Config, args *skel.CmdArgs, h *held, a *Attachment, final bool) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	uplinkPath := h.store.netns(h.name)
	delegated := c.prevResult == nil || len(c.Delegate) > 0
	podPath, podID := args.Netns, ""
	if a != nil {
		delegated, podPath, podID = a.Delegated, a.NetNS, a.NetNSID
	}
	if a != nil && a.State == StateReady {
		// A half-removed attachment must not be repaired.
		a.State = StateDeleting
		if err := h.write(a); err != nil {
			return err
		}
	}
	var errs []error
	// After a reboot, recorded pids and namespaces mean nothing: only files are left.
	sameBoot := a == nil || a.BootID == boot
	uplinkNS, err := uplink.OpenNetns(uplinkPath)
	if err != nil {
		return err
	}
	if uplinkNS != nil {
		defer uplinkNS.Close()
	}
	var back *giving
	if !delegated && uplinkNS != nil && sameBoot {
		if back, err = newGiving(uplinkNS, podPath, podID, args.IfName, a); err != nil {
			return err
		}
		defer back.close()
	}
	// The kernel waits out grace periods when it moves an interface and when it removes one. Done
	// together they take half the time.
	taken := make(chan error, 1)
	go func() { taken <- back.take() }()
	spec := LaunchSpec{Name: h.name, RuntimeDir: h.store.runtimeDir()}
	if a != nil && a.Launch != nil {
		spec = *a.Launch
	}
	if sameBoot && (a == nil || a.State != StatePassed) {
		err = p.Launcher.Stop(ctx, spec)
	}
	errs = append(errs, <-taken)
	if err != nil {
		// While the monitor lives, nothing it uses can be removed.
		return errors.Join(append(errs, err)...)
	}
	if err := p.reached(stepStopped); err != nil {
		return err
	}
	errs = append(errs, back.give(), p.reached(stepGiven))

	// GC knows no container for which there is no record: the delegates' own GC finds their
	// leftovers.
	if delegated && args.ContainerID != "" {
		errs = append(errs, h.lend(func() error { return p.delDelegated(ctx, c, args, a, uplinkNS != nil, uplinkPath) }))
	}
	errs = append(errs, uplink.RemoveNetns(uplinkPath), p.reached(stepUnbound))
	removeCgroups(spec.Cgroups)
	if err := errors.Join(errs...); err != nil || !final {
		return err
	}
	return h.remove()
}

// hostLocalDir is where host-local keeps allocated addresses by default.
const hostLocalDir = "/var/lib/cni/networks"

// delDelegated runs the delegates' DEL in the namespace that they were added to, if it still
// exists.
func (p *Plugin) delDelegated(ctx context.Context, c *Config, args *skel.CmdArgs, a *Attachment, haveUplink bool, uplinkPath string) error {
	if a == nil && len(c.Delegate) == 0 {
		// Nothing shows that the default delegates ever ran for this container. But if they did,
		// before a reboot, an address is still allocated.
		if _, err := os.Stat(filepath.Join(hostLocalDir, c.Name)); err != nil {
			return nil //nolint:nilerr // no address is taken
		}
	}
	delegates, err := newChain(c, args, p.Exec)
	if err != nil {
		return err
	}
	netns := ""
	switch {
	case a != nil && a.State == StatePassed:
		netns = args.Netns
	case haveUplink:
		netns = uplinkPath
	}
	prev, err := asResult(c.prevResult, c.CNIVersion)
	if a != nil && len(a.Result) > 0 {
		prev, err = resultOf(a.Result, c.CNIVersion)
	}
	if err != nil {
		return err
	}
	return delegates.run(ctx, "DEL", netns, prev)
}
