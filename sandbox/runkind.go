package sandbox

// The part of the monitor that is specific to a sandbox with a command: kind.

import (
	"context"
	"net"

	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/ports"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/tun"
)

// workerConfig implements kind.
func (m *run) workerConfig() (channel.WorkerConfig, []int) {
	c := &m.cfg
	w := channel.WorkerConfig{
		Name:       c.Name,
		Device:     c.Guest.Link,
		GatewayMAC: c.GatewayMAC,
		Guest:      addrs(c.Guest.Addr4.Addr(), c.Guest.Addr6.Addr()),
		Gateway:    addrs(c.Guest.Gateway4, c.Guest.Gateway6),
		DNS:        addrs(c.DNS4, c.DNS6),
		Prefix4:    c.Guest.Addr4, Prefix6: c.Guest.Addr6,
		Hosts:        c.Hosts,
		CallersHosts: m.callersHosts,
		GuestSockets: true,
	}
	if c.Guest.Link.Kind == tun.TUN {
		w.GatewayMAC = nil
	}
	if c.Guest.NoConfigure {
		w.SelfConfigured = c.Guest.Addr6.Masked()
	}
	var fds []int
	for _, f := range m.guest.Device() {
		fds = append(fds, channel.FDOf(f))
	}
	w.Queues = len(fds)
	return w, fds
}

// admit implements kind.
func (m *run) admit(*process.Process) {}

// families implements kind.
func (m *run) families() (has4, has6 bool, err error) {
	return m.cfg.Guest.Addr4.IsValid(), m.cfg.Guest.Addr6.IsValid(), nil
}

// followsHost implements kind.
func (m *run) followsHost() bool { return true }

// keep implements kind: a sandbox ends with its monitor.
func (m *run) keep(func(*kept)) error { return nil }

// upgrade implements kind.
func (m *run) upgrade(context.Context, *net.UnixConn, api.Request) error {
	return &api.Error{Code: api.CodeInvalid, Message: "only the attachments of pods can be upgraded: end this sandbox and start it anew"}
}

// ended implements kind.
func (m *run) ended(flows api.FlowsResult) {
	if m.cfg.Ended != nil {
		m.cfg.Ended(flows)
	}
}

// publishListening runs --publish-auto until ctx or the guest ends.
func (m *run) publishListening(ctx context.Context) {
	pub := publishing{m.monitor}
	a := &autoPublisher{
		made: make(map[ports.AutoPort]api.Port), refused: make(map[ports.AutoPort]bool),
		publish: pub.publish, remove: pub.unpublish, taken: m.ports.Find, held: m.ports.HeldByOthers, log: m.log,
	}
	// Several sockets inside can share one host port, which closes with the last of them.
	listening := make(map[guest.Port]bool)
	for changes := range m.guest.Listening(ctx) {
		for _, c := range changes {
			if c.Up {
				listening[c.Port] = true
			} else {
				delete(listening, c.Port)
			}
		}
		now := make(map[ports.AutoPort]bool)
		for p := range listening {
			for _, host := range autoHosts(p, m.cfg.PublishAutoAddr) {
				if host.Addr().Is4() && !m.cfg.Guest.Addr4.IsValid() || host.Addr().Is6() && !m.cfg.Guest.Addr6.IsValid() {
					continue
				}
				now[ports.AutoPort{Proto: p.Network, Host: host}] = true
			}
		}
		a.update(now)
	}
}
