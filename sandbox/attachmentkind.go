package sandbox

// The part of the monitor that is specific to a pod's attachment: kind, from its configuration.

import (
	"net/netip"
	"os"
	"slices"
	"time"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/tun"
)

// guest returns the pod's addresses.
func (c *AttachmentConfig) guest() []netip.Addr {
	var out []netip.Addr
	for _, p := range c.Addrs {
		out = append(out, p.Addr())
	}
	return out
}

// upstreams returns the servers that are asked for names.
func (c *AttachmentConfig) upstreams() dns.Upstreams {
	var u dns.Upstreams
	for _, a := range c.Resolvers {
		u.Servers = append(u.Servers, netip.AddrPortFrom(a, flowlog.DNSPort))
	}
	return u
}

// environment returns the environment of the rules, without the host's addresses: those of the
// node, whose network namespace the monitor is in. Clients that the node forwards have them.
func (c *AttachmentConfig) environment() policy.Environment {
	env := policy.Environment{Guest: c.guest(), HostClients: true, OpenIngress: true, Metadata: c.Metadata, NAT64: c.NAT64}
	for _, g := range c.Gateways {
		if g.Is4() {
			env.Gateway4 = g
		} else {
			env.Gateway6 = g
		}
	}
	return env
}

// workerConfig implements kind.
func (m *attachment) workerConfig() (channel.WorkerConfig, []int) {
	c := &m.cfg
	w := channel.WorkerConfig{
		Name: c.Name, Device: c.Link, GatewayMAC: c.GatewayMAC, Queues: len(c.Device),
		Guest: c.guest(), Gateway: c.Gateways, Inbound: &c.Inbound, ResolversNote: c.ResolversNote,
	}
	if c.Link.Kind == tun.TUN {
		w.GatewayMAC = nil
	}
	for _, p := range c.Addrs {
		if p.Addr().Is4() && !w.Prefix4.IsValid() {
			w.Prefix4 = p
		}
	}
	var fds []int
	for _, f := range append(slices.Clone(c.Device), c.In0) {
		fds = append(fds, channel.FDOf(f))
	}
	return w, append(fds, channel.FDOf(m.memory))
}

func (c *AttachmentConfig) info(started time.Time) api.Info {
	return api.Info{
		Name: c.Name, PID: os.Getpid(), Command: c.Describe, Started: started, Version: c.Version,
		Link: c.Link.Kind.String(), Interface: c.Link.Name, MTU: c.Link.MTU,
		Guest: c.Addrs, Gateway: c.Gateways, Attachment: true,
	}
}

// admit implements kind: the worker's memory is charged to the pod from its first page.
func (m *attachment) admit(p *process.Process) {
	if err := joinCgroups(m.cfg.WorkerCgroups, p.Cmd.Pid); err != nil {
		m.log.Warnf("monitor", "%v", err)
	}
}

// giveSocket implements kind: an attachment has no sockets inside, and tells its workers so.
func (m *attachment) giveSocket(*process.WorkerLink, bool) {}

// families implements kind.
func (m *attachment) families() (has4, has6 bool, err error) {
	return false, false, &api.Error{Code: api.CodeInvalid, Message: "a pod's ports need no publishing: every one is reached at the pod's own address, as far as the policy lets it"}
}

// followsHost implements kind.
func (m *attachment) followsHost() bool { return false }

// ended implements kind.
func (m *attachment) ended(api.FlowsResult) {}
