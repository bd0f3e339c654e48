package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/sandbox/internal/host"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/sandbox/internal/registry"
	"sluice.dev/sluice/tun"
)

// The monitor of an attachment: a pod that a CNI plugin has put behind sluice.
//
//	pod netns          │ uplink netns, one per pod         │ host's netns
//	eth0 = tap ═══════ worker ═ sockets with the pod's IP  │ monitor ── control.sock
//	                     ╚═════ in0, traffic from outside  │   holds tap, in0, lock, flow log
//
// It does less than the monitor of `sluice run`: its launcher makes the namespaces, devices,
// addresses and rules, and removes them again. There is no command to run, no resolver of ours
// except while the policy gates names, no port to publish (every port of the pod is reached at the
// pod's own address), and no host loopback behind the gateway.

// AttachmentConfig describes one attachment. Name, UplinkNetNS, Link, Addrs and the
// descriptors are required.
type AttachmentConfig struct {
	// Name is the attachment's name in `sluice ps` and the other commands; see CheckName.
	Name string `json:"name"`
	// RuntimeDir is the registry in which Name is claimed; "" means the caller's own, /run/sluice
	// for root.
	RuntimeDir string `json:"runtimeDir,omitempty"`
	// Describe says what the attachment is for; `sluice ps` shows it in place of a command.
	Describe []string `json:"describe,omitempty"`
	Version  string   `json:"version,omitempty"`

	// UplinkNetNS is the path of the network namespace that the worker lives in.
	UplinkNetNS string `json:"uplinkNetns"`
	// Link is the device in the pod: kind, name, MTU and number of queues.
	Link tun.Config `json:"link"`
	// Inbound is the device for traffic from outside, always a TUN; its MTU defaults to the
	// largest.
	Inbound tun.Config `json:"inbound"`
	// GatewayMAC is our address on the pod's link; default 52:55:a9:fe:01:01.
	GatewayMAC net.HardwareAddr `json:"gatewayMAC,omitempty"`
	// Addrs are the pod's own addresses with the lengths of their prefixes, any
	// number of each family.
	Addrs []netip.Prefix `json:"addrs"`
	// Gateways are our addresses on the pod's link, at most one of a family; default
	// 169.254.1.1 and fe80::1 for the families that the pod has.
	Gateways []netip.Addr `json:"gateways,omitempty"`

	// Resolvers are asked for the names that the policy allows, on port 53 and from the uplink
	// namespace, while the policy gates names. They then answer in place of the server that the pod
	// asks. Without any, such a policy closes DNS. ResolversNote says, for people, where they come
	// from and which were left out.
	Resolvers     []netip.Addr `json:"resolvers,omitempty"`
	ResolversNote string       `json:"resolversNote,omitempty"`

	// Metadata are metadata services in addition to the known ones, NAT64 the prefixes of the
	// network's translators.
	Metadata []netip.Prefix `json:"metadata,omitempty"`
	NAT64    []netip.Prefix `json:"nat64,omitempty"`

	// Policy is required: a document or, explicitly, none, with the built-in policy that applies
	// instead.
	Policy  policy.Source     `json:"policy"`
	Limits  policy.Limits     `json:"limits,omitzero"` // used where the policy sets none
	Sysctls map[string]string `json:"sysctls,omitempty"`
	// FlowLog is a file to append flow records to, FlowLogMaxSize and FlowLogMaxFiles its
	// bounds, as in Config.
	FlowLog         string `json:"flowLog,omitempty"`
	FlowLogMaxSize  int64  `json:"flowLogMaxSize,omitempty"`
	FlowLogMaxFiles int    `json:"flowLogMaxFiles,omitempty"`
	// Keep is a file for settings made at run time, with which the next monitor of the attachment
	// starts. "" keeps nothing.
	Keep string `json:"keep,omitempty"`

	// MonitorCgroups and WorkerCgroups are cgroup directories, one per mounted hierarchy, that the
	// monitor and its workers move to. Without any, they stay in the caller's.
	MonitorCgroups []string `json:"monitorCgroups,omitempty"`
	WorkerCgroups  []string `json:"workerCgroups,omitempty"`
	// LogFile receives the monitor's warnings and last words; "" means that only `sluice logs` has
	// them.
	LogFile string `json:"logFile,omitempty"`

	// Device are the queues of the pod's device, In0 the descriptor of the inbound one. The caller
	// closes them after RunAttachment has returned.
	Device []*os.File `json:"-"`
	In0    *os.File   `json:"-"`
	// Lock, if set, is the launcher's lock against others who would look for a monitor. It is
	// closed once the monitor can be found, in case the launcher is dead by then.
	Lock *os.File `json:"-"`
	// Ready, if set, is called once traffic flows.
	Ready func(api.Info) error `json:"-"`
	// Stderr gets warnings; nil means os.Stderr.
	Stderr io.Writer `json:"-"`

	resume *resumption // state left by the previous binary, or nil
}

// The gateway that a pod sees: addresses that mean nothing beyond the link, so no pod network can
// use them.
var (
	podGateway4   = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	podGateway6   = netip.MustParseAddr("fe80::1")
	podGatewayMAC = net.HardwareAddr{0x52, 0x55, 169, 254, 1, 1}
)

func (c AttachmentConfig) withDefaults() (AttachmentConfig, error) {
	if err := registry.CheckName(c.Name); err != nil {
		return c, err
	}
	switch {
	case c.UplinkNetNS == "":
		return c, errors.New("an attachment needs the uplink network namespace")
	case len(c.Addrs) == 0:
		return c, errors.New("an attachment needs an address of the pod")
	case c.Policy.IsZero():
		return c, fmt.Errorf("an attachment needs a policy: %w", policy.ErrNoSource)
	case len(c.Device) == 0 || c.In0 == nil:
		return c, errors.New("an attachment needs the descriptors of the pod's device and of the inbound one")
	}
	has4, has6 := false, false
	for _, p := range c.Addrs {
		if !p.IsValid() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
			return c, fmt.Errorf("the pod's address %v: want an IPv4 or IPv6 address with its prefix length", p)
		}
		has4, has6 = has4 || p.Addr().Is4(), has6 || p.Addr().Is6()
	}
	if len(c.Gateways) == 0 {
		if has4 {
			c.Gateways = append(c.Gateways, podGateway4)
		}
		if has6 {
			c.Gateways = append(c.Gateways, podGateway6)
		}
	}
	seen := make(map[bool]bool)
	for _, g := range c.Gateways {
		if !g.IsValid() || seen[g.Is4()] {
			return c, fmt.Errorf("the gateways %v: want at most one of a family", c.Gateways)
		}
		seen[g.Is4()] = true
	}
	if c.GatewayMAC == nil {
		c.GatewayMAC = podGatewayMAC
	}
	if c.Link.MTU == 0 {
		c.Link.MTU = tun.DefaultMTU
	}
	c.Link.Queues = len(c.Device)
	c.Inbound.Kind, c.Inbound.Queues = tun.TUN, 1
	if c.Inbound.MTU == 0 {
		c.Inbound.MTU = tun.MaxMTU
	}
	if c.Stderr == nil {
		c.Stderr = os.Stderr
	}
	return c, nil
}

// attachment is the monitor of one attachment.
type attachment struct {
	*monitor
	cfg       AttachmentConfig
	listener  *net.UnixListener // the control server's
	memory    *os.File          // where workers record flows for their successors
	takeovers chan takeover
}

// RunAttachment is the monitor's whole life: it serves the attachment until ctx ends, and returns
// once everything that it made is gone.
func RunAttachment(ctx context.Context, cfg AttachmentConfig) (err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return fmt.Errorf("attachment: %w", err)
	}
	m := &attachment{monitor: newMonitor(cfg.Sysctls), cfg: cfg, takeovers: make(chan takeover)}
	m.kind, m.upstreams = m, cfg.upstreams()
	m.log = logring.NewLogRing(time.Now, func(l api.LogLine) {
		if l.Level == "warning" {
			_, _ = fmt.Fprintf(cfg.Stderr, "sluice: %s\n", l.Text)
		}
	})
	if err := m.live(ctx); err != nil {
		return fmt.Errorf("attachment %s: %w", cfg.Name, err)
	}
	return nil
}

func (m *attachment) live(ctx context.Context) (err error) {
	cfg := &m.cfg
	if err := joinCgroups(cfg.MonitorCgroups, os.Getpid()); err != nil {
		m.log.Warnf("monitor", "%v", err)
	}
	m.rules = channel.RulesMessage{Policy: cfg.Policy, Env: cfg.environment(), Limits: cfg.Limits}
	started := time.Now()
	if cfg.resume != nil {
		started = cfg.resume.Started
		err = m.resume(cfg.resume)
	} else if err = m.claim(); err == nil {
		err = m.remember()
	}
	if m.dir != nil {
		defer func() {
			if err == nil || !cfg.resume.fails(err) { // else the guardian owns all of it
				err = errors.Join(err, m.dir.Remove())
			}
		}()
	}
	if cfg.Lock != nil {
		_ = cfg.Lock.Close()
	}
	if err != nil {
		return err
	}
	// A binary that takes over also starts from the node's current addresses.
	m.rules.Env = cfg.environment()
	var hostErr error
	if m.rules.Env.Host, hostErr = host.HostRanges(); hostErr != nil {
		m.log.Warnf("monitor", "%v: everything is denied until that is known", hostErr)
		m.rules.Env.HostUnknown = true
	}
	if _, err := m.rules.Compile(); err != nil {
		return err
	}
	if m.memory == nil {
		if m.memory, err = flowMemory(); err != nil {
			return err
		}
	}
	defer m.memory.Close()
	m.base = cfg.info(started)
	start, err := processStart(os.Getpid())
	if err != nil {
		return err
	}
	if err := m.dir.WriteState(registry.State{Name: cfg.Name, PID: os.Getpid(), Start: start, Command: cfg.Describe, Started: started, Keep: cfg.Keep}); err != nil {
		return err
	}
	if m.flowLog, err = flowlog.OpenFlowFile(cfg.FlowLog, cfg.FlowLogMaxSize, cfg.FlowLogMaxFiles, m.log); err != nil {
		return err
	}
	defer m.release()
	if m.spawner, err = newSpawnerIn(cfg.UplinkNetNS); err != nil {
		return err
	}
	defer m.spawner.Close()
	// Ping and raw sockets belong to the uplink namespace, like all others.
	m.spawner.Do(func() { m.raw = host.RawICMP(process.WorkerIDs().Gid) })

	var server *controlServer
	if m.listener != nil {
		server = m.serverOn(m.listener)
	} else if server, err = m.listenControl(); err != nil {
		return err
	}
	m.listener = server.l
	first, err := m.startWorker(ctx)
	if err != nil && cfg.resume != nil && cfg.resume.failure != "" {
		// There is no process to fall back to any more.
		first, err = stillborn(err.Error()), nil
	}
	if err != nil {
		server.close()
		return err
	}
	if cfg.resume != nil {
		m.tookOver(cfg.resume)
	}
	return m.serve(ctx, server, first)
}

// flowMemory makes the memory in which a worker records flows. Its size is sealed: a worker that
// could shrink it could crash its successor.
func flowMemory() (*os.File, error) {
	fd, err := unix.MemfdCreate("flows", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make the memory for flows: %w", err)
	}
	f := os.NewFile(uintptr(fd), "flows")
	if err = f.Truncate(forwarder.MemorySize); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("make the memory for flows: %w", err)
	}
	return f, nil
}

// claim takes the attachment's name.
func (m *attachment) claim() error {
	reg, err := registry.At(m.cfg.RuntimeDir)
	if err != nil {
		return err
	}
	m.dir, err = reg.Claim(m.cfg.Name)
	return err
}

// stillborn is a worker that never came up, which a supervisor replaces.
type stillborn string

func (s stillborn) Reason() string { return string(s) }

func (stillborn) Ended() <-chan struct{} {
	over := make(chan struct{})
	close(over)
	return over
}

// serve keeps a worker running until ctx ends.
func (m *attachment) serve(ctx context.Context, server *controlServer, first process.Supervised) error {
	// Everything started here is owned by serve and stopped by inner.
	inner, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { server.serve(inner) })
	wg.Go(func() { m.watchHost(inner) })

	if m.cfg.Ready != nil {
		if err := m.cfg.Ready(m.info()); err != nil {
			m.endWorker(m.supervise(inner, first)())
			return err
		}
	}
	for {
		stop := m.supervise(inner, first)
		select {
		case <-ctx.Done():
			m.setState(api.StateStopping)
			cancel()
			m.endWorker(stop())
			return nil
		case t := <-m.takeovers:
			last := stop()
			// A caller that changes something waits until a worker serves.
			m.change.Lock()
			m.endWorker(last)
			m.setState(api.StateRestarting)
			err := m.takeOver(t.exe, t.client)
			m.change.Unlock()
			var failed error
			if first, failed = m.startWorker(inner); failed != nil {
				first = stillborn(failed.Error())
			}
			t.failed <- err
		}
	}
}

// supervise looks after workers until the returned function is called, which returns the worker
// running then.
func (m *attachment) supervise(ctx context.Context, first process.Supervised) (stop func() process.Supervised) {
	ctx, cancel := context.WithCancel(ctx)
	last := make(chan process.Supervised, 1)
	// Owned by the caller of stop.
	go func() {
		s := process.Supervisor{Start: m.startWorker, Lost: m.lost, Failed: m.startFailed, Now: time.Now, Sleep: process.SleepContext}
		last <- s.Run(ctx, first)
	}()
	return func() process.Supervised {
		cancel()
		return <-last
	}
}

// endWorker stops the worker that was running when supervision ended, in order.
func (m *attachment) endWorker(last process.Supervised) {
	l, ok := last.(*process.WorkerLink)
	if !ok || l == nil {
		return
	}
	m.stopWorker(l)
	m.mu.Lock()
	m.link = nil
	m.mu.Unlock()
}

// joinCgroups moves a process to the cgroups whose directories are given.
func joinCgroups(dirs []string, pid int) error {
	var errs []error
	for _, dir := range dirs {
		if err := os.WriteFile(strings.TrimRight(dir, "/")+"/cgroup.procs", fmt.Appendf(nil, "%d", pid), 0); err != nil {
			errs = append(errs, fmt.Errorf("move process %d to its cgroup: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// newSpawnerIn makes a spawner whose thread is in the network namespace at path, so its children
// are too.
func newSpawnerIn(path string) (*process.Spawner, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the uplink network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	s := process.NewSpawner()
	s.Do(func() { err = unix.Setns(fd, unix.CLONE_NEWNET) })
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("enter the uplink network namespace %s: %w", path, err)
	}
	return s, nil
}
