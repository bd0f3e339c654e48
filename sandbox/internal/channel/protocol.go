package channel

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/tun"
)

// The bodies of the channel's messages.

// WorkerConfig is everything a worker needs to know. Descriptors come with it in this order: the
// device's queues, the inbound device's and the memory for its flows, then raw ICMP, raw ICMPv6 and
// the flow log. Those that the configuration does not announce are left out.
type WorkerConfig struct {
	Name       string           `json:"name"`
	Device     tun.Config       `json:"device"`
	Queues     int              `json:"queues"`
	GatewayMAC net.HardwareAddr `json:"gateway_mac,omitempty"`
	// Inbound is the device for traffic from outside; only an attachment has one.
	Inbound *tun.Config `json:"inbound,omitempty"`

	Guest   []netip.Addr `json:"guest"`
	Gateway []netip.Addr `json:"gateway"`
	DNS     []netip.Addr `json:"dns"`
	Prefix4 netip.Prefix `json:"prefix4,omitzero"`
	Prefix6 netip.Prefix `json:"prefix6,omitzero"`
	// SelfConfigured is the prefix in which a guest that nobody configures may choose addresses.
	SelfConfigured netip.Prefix `json:"self_configured,omitzero"`

	Upstreams dns.Upstreams `json:"upstreams"`
	// ResolversNote says where Upstreams come from; only an attachment has it.
	ResolversNote string                  `json:"resolvers_note,omitempty"`
	Hosts         map[string][]netip.Addr `json:"hosts,omitempty"`
	CallersHosts  map[string][]netip.Addr `json:"callers_hosts,omitempty"` // also in the sandbox's hosts file
	Grants        []GrantMessage          `json:"grants,omitempty"`        // of the previous worker
	Rules         RulesMessage            `json:"rules"`
	Sysctls       map[string]string       `json:"sysctls,omitempty"`

	HasRaw4    bool `json:"has_raw4,omitempty"`
	HasRaw6    bool `json:"has_raw6,omitempty"`
	HasFlowLog bool `json:"has_flow_log,omitempty"`
	// FlowLogMax is the size of the flow log's file, in bytes, at which the worker asks for
	// another; 0 means never.
	FlowLogMax int64 `json:"flow_log_max,omitempty"`
	// CgroupMemory is the smallest memory limit of the worker's cgroups in bytes; 0 means none.
	CgroupMemory int64 `json:"cgroup_memory,omitempty"`
	// GuestSockets means that the monitor hands out sockets of the guest's network namespace.
	GuestSockets bool `json:"guest_sockets,omitempty"`
}

// Resolvers returns the addresses that the sandbox asks for names, for display.
func (c *WorkerConfig) Resolvers() []netip.Addr {
	out := c.DNS
	if c.Inbound != nil {
		for _, s := range c.Upstreams.Servers {
			out = append(out, s.Addr())
		}
	}
	return out
}

// RulesMessage is a policy and where it applies. The zero value can be neither encoded nor
// compiled: a message that lost its policy denies.
type RulesMessage struct {
	Policy policy.Source      `json:"policy"`
	Env    policy.Environment `json:"env"`
	// Limits apply where the policy's own limits leave something open.
	Limits policy.Limits `json:"limits,omitzero"`
}

// Compile compiles the rules. Both monitor and worker do it: the monitor to report the errors, the
// worker because compiled rules are not sent.
func (r RulesMessage) Compile() (*policy.Rules, error) {
	p, err := r.Policy.Policy()
	if err != nil {
		return nil, err
	}
	p.Spec.Limits = p.Spec.Limits.Or(r.Limits)
	return policy.Compile(p, r.Env)
}

// PublishMessage names a listener. Its socket comes along with MsgPublish.
type PublishMessage struct {
	ID    uint64         `json:"id"`
	Proto string         `json:"proto,omitempty"`
	Host  netip.AddrPort `json:"host,omitzero"`
	Guest uint16         `json:"guest,omitempty"`
}

// ControlMessage is a client's request. The client's connection comes along.
type ControlMessage struct {
	Request api.Request `json:"request"`
}

// SocketMessage brings a socket of the guest's network namespace, or none if none could be made.
type SocketMessage struct {
	V6 bool `json:"v6"`
}

// Handed holds the descriptors that come with the configuration.
type Handed struct {
	Device     []int
	Inbound    []int // one or none
	Memory     int   // comes with Inbound
	Raw4, Raw6 int   // -1 if there is none
	FlowLog    *os.File
}

// Sort assigns the descriptors that came with the configuration to their purposes.
func (c *WorkerConfig) Sort(fds []int) (Handed, error) {
	h := Handed{Raw4: -1, Raw6: -1}
	want := c.Queues
	for _, has := range []bool{c.Inbound != nil, c.Inbound != nil, c.HasRaw4, c.HasRaw6, c.HasFlowLog} {
		if has {
			want++
		}
	}
	if c.Queues < 1 || len(fds) != want {
		return h, fmt.Errorf("the configuration came with %d descriptors, not %d", len(fds), want)
	}
	h.Device, fds = fds[:c.Queues], fds[c.Queues:]
	next := func() int {
		fd := fds[0]
		fds = fds[1:]
		return fd
	}
	if c.Inbound != nil {
		h.Inbound, h.Memory = []int{next()}, next()
	}
	if c.HasRaw4 {
		h.Raw4 = next()
	}
	if c.HasRaw6 {
		h.Raw6 = next()
	}
	if c.HasFlowLog {
		h.FlowLog = os.NewFile(uintptr(next()), "flow log")
	}
	return h, nil
}
