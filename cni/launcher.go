package cni

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/tun"
)

// Launcher starts, finds and ends the monitors of attachments. All methods know an
// attachment by Name and RuntimeDir; the rest of the specification may be missing from
// Stop when the record is.
type Launcher interface {
	// Launch starts the monitor of a prepared attachment, outside the caller's session
	// and cgroup, and returns when its worker serves. It is given duplicates of what it
	// needs: the descriptors stay the caller's to close.
	Launch(ctx context.Context, a LaunchSpec) (pid int, start uint64, err error)
	// Stop ends the monitor and waits until neither it nor its worker serves; it is no
	// error if that is so. Its devices may end a little later.
	Stop(ctx context.Context, a LaunchSpec) error
	// Alive says whether the monitor and its worker serve.
	Alive(ctx context.Context, a LaunchSpec) error
	// Gone says whether there is no monitor, without asking one: a monitor that is slow
	// to answer, or that is just replacing its worker, is not gone.
	Gone(a LaunchSpec) (bool, error)
	// Check says whether the specification's policy, limits and tunables are sound,
	// before anything is made for it.
	Check(a LaunchSpec) error
}

// LaunchSpec is everything that a monitor is told. It is kept in the record, so that
// a dead one can be replaced.
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

	// Resolvers are missing from records of builds that did not serve names.
	Resolvers Resolvers `json:"resolvers,omitzero"`

	// Metadata and NAT64 are the configuration's, as a policy.Environment has them.
	Metadata []netip.Prefix `json:"metadata,omitempty"`
	NAT64    []netip.Prefix `json:"nat64,omitempty"`

	// Policy is missing from records of builds that kept it otherwise: such a monitor is not
	// started anew, and its pod stays closed until it is made anew.
	Policy  policy.Source     `json:"policySource,omitzero"`
	Limits  json.RawMessage   `json:"limits,omitempty"` // as a policy's spec.limits
	Sysctls map[string]string `json:"sysctls,omitempty"`
	FlowLog string            `json:"flowLog,omitempty"`
	// FlowLogMaxSize and FlowLogMaxFiles are as in Config.
	FlowLogMaxSize  string `json:"flowLogMaxSize,omitempty"`
	FlowLogMaxFiles int    `json:"flowLogMaxFiles,omitempty"`
	// Keep is a file for what is set while it runs, for the monitor that replaces it.
	Keep string `json:"keep,omitempty"`
	// Cgroups are the directories that the monitor and its workers move to.
	Cgroups []string `json:"cgroups,omitempty"`

	DeviceFDs []*os.File `json:"-"` // one per queue
	InboundFD *os.File   `json:"-"`
	// Lock is the attachment's, which the monitor holds too until it can be found: the next
	// verb after one that was killed in Launch must not take the pod to have none.
	Lock *os.File `json:"-"`
}
