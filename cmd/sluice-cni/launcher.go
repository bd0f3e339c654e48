package main

import (
	"context"
	"errors"
	"fmt"

	"sluice.dev/sluice/cmd/internal/cmdline"
	"sluice.dev/sluice/cni"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox"
)

// launcher wires the plugin to package sandbox.
type launcher struct{}

func (launcher) Launch(ctx context.Context, a cni.LaunchSpec) (int, uint64, error) {
	limits, err := limitsOf(a)
	if err != nil {
		return 0, 0, err
	}
	size, err := flowLogSizeOf(a)
	if err != nil {
		return 0, 0, err
	}
	return sandbox.LaunchAttachment(ctx, "", sandbox.AttachmentConfig{
		Name: a.Name, RuntimeDir: a.RuntimeDir, Describe: a.Describe, Version: cmdline.Version(),
		UplinkNetNS: a.UplinkNetNS, Link: a.Device, Inbound: a.Inbound, Addrs: a.Addrs,
		Resolvers: a.Resolvers.Servers, ResolversNote: a.Resolvers.Note,
		Metadata: a.Metadata, NAT64: a.NAT64,
		Policy: a.Policy, Limits: limits, Sysctls: a.Sysctls, Keep: a.Keep,
		FlowLog: a.FlowLog, FlowLogMaxSize: size, FlowLogMaxFiles: a.FlowLogMaxFiles,
		MonitorCgroups: a.Cgroups, WorkerCgroups: a.Cgroups,
		Device: a.DeviceFDs, In0: a.InboundFD, Lock: a.Lock,
	})
}

func (launcher) Stop(ctx context.Context, a cni.LaunchSpec) error {
	return sandbox.StopAttachment(ctx, a.RuntimeDir, a.Name)
}

func (launcher) Alive(ctx context.Context, a cni.LaunchSpec) error {
	return sandbox.AttachmentAlive(ctx, a.RuntimeDir, a.Name)
}

func (launcher) Gone(a cni.LaunchSpec) (bool, error) {
	return sandbox.AttachmentGone(a.RuntimeDir, a.Name)
}

func (launcher) Check(a cni.LaunchSpec) error {
	var errs []error
	_, err := a.Policy.Policy()
	errs = append(errs, err)
	_, err = limitsOf(a)
	errs = append(errs, err)
	_, err = flowLogSizeOf(a)
	errs = append(errs, err)
	if n := a.FlowLogMaxFiles; n != 0 {
		if err := sandbox.CheckFlowLogFiles(n); err != nil {
			errs = append(errs, fmt.Errorf("flowLogMaxFiles: %w", err))
		}
	}
	table := nat.NewTable(nat.Config{})
	for name, value := range a.Sysctls {
		errs = append(errs, table.SetSysctl(name, value))
	}
	return errors.Join(errs...)
}

// flowLogSizeOf returns the maximum size of the flow log; without one the default applies.
func flowLogSizeOf(a cni.LaunchSpec) (int64, error) {
	if a.FlowLogMaxSize == "" {
		return 0, nil
	}
	size, err := sandbox.ParseFlowLogSize(a.FlowLogMaxSize)
	if err != nil {
		return 0, fmt.Errorf("flowLogMaxSize: %w", err)
	}
	return size, nil
}

// limitsOf returns the limits in a policy's form.
func limitsOf(a cni.LaunchSpec) (policy.Limits, error) {
	if len(a.Limits) == 0 {
		return policy.Limits{}, nil
	}
	text := fmt.Appendf(nil, `{"apiVersion": %q, "kind": %q, "metadata": {"name": "limits"}, "spec": {"limits": %s}}`, policy.APIVersion, policy.Kind, a.Limits)
	p, err := policy.Parse("limits", text)
	if err != nil {
		return policy.Limits{}, fmt.Errorf("the limits %s: %w", a.Limits, err)
	}
	return p.Spec.Limits, nil
}
