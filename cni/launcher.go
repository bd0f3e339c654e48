package cni

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/tun"
)

// Launcher starts, finds and ends the monitors of attachments. All methods identify an attachment
// by Name and RuntimeDir. Stop may get no more than those, if the record is missing.
type Launcher interface {
	// Launch starts the monitor of a prepared attachment, outside the caller's session and cgroup,
	// and returns when its worker serves. The monitor gets duplicates: the caller still closes its
	// descriptors.
	Launch(ctx context.Context, a LaunchSpec) (pid int, start uint64, err error)
	// Stop ends the monitor and waits until neither it nor its worker serves; it is no error if
	// neither did. Its devices may end slightly later.
	Stop(ctx context.Context, a LaunchSpec) error
	// Alive reports whether the monitor and its worker serve.
	Alive(ctx context.Context, a LaunchSpec) error
	// Gone reports whether there is no monitor, without asking one: a monitor that is slow to
	// answer, or is replacing its worker, is not gone.
	Gone(a LaunchSpec) (bool, error)
	// Check reports whether the specification's policy, limits and tunables are valid, before
	// anything is made for it.
	Check(a LaunchSpec) error
}

// LaunchSpec is everything that a monitor is told. The record keeps it, so that a dead monitor can
// be replaced.
type LaunchSpec struct {
	Name string `json:"name"`
	// RuntimeDir is where the monitor keeps its control socket.
	RuntimeDir string   `json:"runtimeDir"`
	Describe   []string `json:"describe,omitempty"` // what `sluice ps` shows

	UplinkNetNS string         `json:"uplinkNetns"`
	PodNetNS    string         `json:"podNetns"`
	Device      tun.Config     `json:"device"`  // in the pod
	Inbound     tun.Config     `json:"inbound"` // in the uplink namespace
	Addrs       []netip.Prefix `json:"addrs"`   // the pod's

	// Resolvers are absent from records of builds that did not serve names.
	Resolvers Resolvers `json:"resolvers,omitzero"`

	// Metadata and NAT64 come from the configuration, in the form of policy.Environment.
	Metadata []netip.Prefix `json:"metadata,omitempty"`
	NAT64    []netip.Prefix `json:"nat64,omitempty"`

	// Policy is absent from records of builds that kept it elsewhere. Such a monitor is not
	// restarted: its pod stays closed until it is created anew.
	Policy  policy.Source     `json:"policySource,omitzero"`
	Limits  json.RawMessage   `json:"limits,omitempty"` // in the form of a policy's spec.limits
	Sysctls map[string]string `json:"sysctls,omitempty"`
	FlowLog string            `json:"flowLog,omitempty"`
	// FlowLogMaxSize and FlowLogMaxFiles are as in Config.
	FlowLogMaxSize  string `json:"flowLogMaxSize,omitempty"`
	FlowLogMaxFiles int    `json:"flowLogMaxFiles,omitempty"`
	// Keep is a file for settings made at run time, for the monitor's successor.
	Keep string `json:"keep,omitempty"`
	// Cgroups are the directories that the monitor and its workers move to.
	Cgroups []string `json:"cgroups,omitempty"`

	DeviceFDs []*os.File `json:"-"` // one per queue
	InboundFD *os.File   `json:"-"`
	// Lock is the attachment's lock. The monitor also holds it until it can be found: if a plugin
	// is killed in Launch, the next verb must not conclude that there is no monitor.
	Lock *os.File `json:"-"`
}
