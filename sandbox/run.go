package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/forwarder/dns/resolvconf"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/console"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/sandbox/internal/host"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/ports"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// stopTimeout bounds a worker's orderly stop: all flows closed, the flow log written.
const stopTimeout = 3 * time.Second

// Run is the monitor's whole life: it makes a sandbox, runs the command in it and returns its exit
// status once the sandbox is gone. With an error the status is guest.StatusOurs, or 126 and 127 if
// the command could not be started. Cancelling ctx ends the sandbox.
func Run(ctx context.Context, cfg Config) (exit int, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return guest.StatusOurs, err
	}
	m := &run{monitor: newMonitor(cfg.Sysctls), cfg: cfg, socketWants: make(chan struct{}, maxSocketWants)}
	m.kind = m
	m.ports.Open = ports.ListenOn
	m.log = logring.NewLogRing(time.Now, m.echo)
	exit, err = m.live(ctx)
	var notStarted *guest.ExecError
	switch {
	case errors.As(err, &notStarted):
		exit = notStarted.Status
	case err != nil:
		exit = guest.StatusOurs
	}
	return exit, err
}

// run is a sandbox with a command, or one attached to existing namespaces.
type run struct {
	*monitor
	cfg     Config
	guest   *guest.Guest
	signals chan os.Signal
	console atomic.Pointer[console.Console] // for echo; nil until the command starts, and without a terminal
	// socketWants holds a token for each socket being made for the worker.
	socketWants chan struct{}

	callersHosts map[string][]netip.Addr // set before the first worker starts
}

// echo writes log lines to standard error: only warnings, unless Verbose is set.
func (m *run) echo(l api.LogLine) {
	if m.cfg.Verbose || l.Level == "warning" {
		_, _ = fmt.Fprintf(m.cfg.Stderr, "sluice: %s%s", l.Text, m.console.Load().Newline())
	}
}

func (m *run) live(ctx context.Context) (_ int, err error) {
	// Registered before there is anything to clean up; command handles signals that arrive
	// meanwhile.
	m.signals = make(chan os.Signal, 16)
	if len(m.cfg.Guest.Command) > 0 {
		m.cfg.Guest.Signals = guest.InheritedSignals()
		guest.NotifyJob(m.signals, m.cfg.Guest.Signals)
	} else {
		signal.Notify(m.signals, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2)
	}
	defer signal.Stop(m.signals)

	reg, err := registry.Open()
	if err != nil {
		return 0, err
	}
	if m.cfg.Name == "" {
		m.dir, m.cfg.Name, err = reg.ClaimGenerated()
	} else {
		m.dir, err = reg.Claim(m.cfg.Name)
	}
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, m.dir.Remove()) }()

	started := time.Now()
	m.base = m.cfg.info(started)
	born, err := processStart(os.Getpid())
	if err != nil {
		return 0, err
	}
	if err := m.dir.WriteState(registry.State{Name: m.cfg.Name, PID: os.Getpid(), Start: born, Command: m.cfg.Guest.Command, Started: started}); err != nil {
		return 0, err
	}
	// Missing prerequisites are found before anything is started.
	watcher, err := m.prepare()
	if watcher != nil {
		defer watcher.Close()
	}
	defer m.release()
	if err != nil {
		return 0, err
	}

	// The first worker confines itself while the guest is made. If it cannot start, the guest,
	// which needs the same facilities, reports why first.
	m.spawner = process.NewSpawner()
	defer m.spawner.Close()
	if p, err := m.spawnWorker(); err == nil {
		m.early = p
	}
	defer func() {
		if m.early != nil {
			m.early.Kill()
		}
	}()
	start := m.cfg.Start
	if start == nil {
		start = guest.Start
		if err := m.cover(reg); err != nil {
			return 0, err
		}
	}
	if m.guest, err = start(ctx, m.cfg.Guest); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, m.guest.Close()) }()
	for _, note := range m.guest.Notes() {
		m.log.Infof("guest", "%s", note)
	}
	if line := m.covered(); line != "" && m.cfg.Start == nil {
		_, _ = fmt.Fprintf(m.cfg.Stderr, "sluice: %s\n", line)
	}
	m.base.GuestPID = m.guest.PID()

	server, err := m.listenControl()
	if err != nil {
		return 0, err
	}
	first, err := m.startWorker(ctx)
	if err != nil {
		server.close()
		return 0, err
	}
	return m.serve(ctx, server, first, watcher)
}

// prepare opens what the sandbox needs from the host.
func (m *run) prepare() (*resolvconf.Watcher, error) {
	m.rules = channel.RulesMessage{Policy: m.cfg.Policy, Env: m.cfg.environment()}
	var err error
	if m.rules.Env.Host, err = host.HostRanges(); err != nil {
		return nil, err
	}
	if _, err := m.rules.Compile(); err != nil {
		return nil, err
	}
	if m.flowLog, err = flowlog.OpenFlowFile(m.cfg.FlowLog, m.cfg.FlowLogMaxSize, m.cfg.FlowLogMaxFiles, m.log); err != nil {
		return nil, err
	}
	for _, p := range m.cfg.Ports {
		if _, err := (publishing{m.monitor}).openPort(p); err != nil {
			return nil, err
		}
	}
	m.raw = host.RawICMP(process.WorkerIDs().Gid)
	watcher, err := resolvconf.NewWatcher(m.cfg.ResolvConf)
	if err != nil {
		return nil, err
	}
	upstreams, err := watcher.Upstreams()
	m.setUpstreams(upstreams, err)
	g := &m.cfg.Guest
	g.DNS = addrs(m.cfg.DNS4, m.cfg.DNS6)
	if g.PathMTU4, err = host.UplinkMTU(netlink.FAMILY_V4); err != nil {
		return watcher, err
	}
	if g.PathMTU6, err = host.UplinkMTU(netlink.FAMILY_V6); err != nil {
		return watcher, err
	}
	g.Search, g.ResolvOptions = m.upstreams.Search, m.upstreams.StubOptions
	for name, list := range m.cfg.Hosts {
		for _, a := range list {
			g.Hosts = append(g.Hosts, guest.HostEntry{Addr: a, Names: []string{name}})
		}
	}
	if m.cfg.Start == nil {
		var left int
		if m.callersHosts, left = host.HostsToGrant(guest.CallersHosts(g)); left > 0 {
			m.log.Warnf("monitor", "rules by domain do not match the last %d entries of /etc/hosts: at most %d are taken", left, host.MaxCallersHosts)
		}
	}
	return watcher, nil
}

// serve runs the command, and everything beside it, to the end.
func (m *run) serve(ctx context.Context, server *controlServer, first process.Supervised, watcher *resolvconf.Watcher) (int, error) {
	// Everything started here is owned by serve and stopped by inner.
	inner, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { server.serve(inner) })
	wg.Go(func() { m.watchHost(inner) })
	wg.Go(func() {
		if err := watcher.Run(inner, m.setUpstreams); err != nil {
			m.log.Warnf("monitor", "follow the host's resolver configuration: %v", err)
		}
	})
	if m.cfg.PublishAuto {
		wg.Go(func() { m.publishListening(inner) })
	}
	last := make(chan process.Supervised, 1)
	wg.Go(func() {
		s := process.Supervisor{Start: m.startWorker, Lost: m.lost, Failed: m.startFailed, Now: time.Now, Sleep: process.SleepContext}
		last <- s.Run(inner, first)
	})
	defer wg.Wait()
	defer cancel()

	status, err := m.command(ctx)

	m.setState(api.StateStopping)
	cancel()
	if l, ok := (<-last).(*process.WorkerLink); ok && l != nil {
		m.stopWorker(l)
	}
	if err != nil {
		return 0, err
	}
	return status.Code, nil
}

// command starts the command and waits until it or ctx ends. Without a command, attached to
// existing namespaces, a terminating signal ends the sandbox.
func (m *run) command(ctx context.Context) (guest.Status, error) {
	if m.cfg.Ready != nil {
		if err := m.cfg.Ready(m.info()); err != nil {
			return guest.Status{}, err
		}
	}
	if len(m.cfg.Guest.Command) > 0 {
		m.console.Store(m.guest.Console())
		// From here on the terminal may be raw; every return gives it back to the caller.
		defer m.guest.Console().Close()
		if err := m.guest.ReleaseJob(); err != nil {
			return guest.Status{}, err
		}
	}
	type outcome struct {
		status guest.Status
		err    error
	}
	over := make(chan outcome, 1)
	// Owned by command; ends with the guest, which Run always closes.
	go func() {
		s, err := m.guest.Wait()
		over <- outcome{s, err}
	}()
	for {
		select {
		case o := <-over:
			return o.status, o.err
		case <-ctx.Done():
			return guest.Status{}, nil
		case sig := <-m.guest.Stopped():
			if err := m.guest.StopJob(sig); err != nil {
				m.log.Warnf("monitor", "continue the command: %v", err)
			}
		case s := <-m.signals:
			sig, ok := s.(syscall.Signal)
			if len(m.cfg.Guest.Command) == 0 {
				if s == syscall.SIGUSR1 || s == syscall.SIGUSR2 {
					continue // there is no process to forward them to
				}
				return guest.Status{}, nil
			}
			if !ok {
				continue
			}
			if err := m.guest.PassOn(sig); err != nil {
				m.log.Warnf("monitor", "pass %s on: %v", unix.SignalName(sig), err)
			}
		}
	}
}

// setUpstreams is called by the watcher of the host's resolver configuration.
func (m *run) setUpstreams(u dns.Upstreams, err error) {
	u = m.cfg.upstreams(u)
	switch {
	case err != nil:
		m.log.Warnf("monitor", "read the host's resolver configuration: %v", err)
	case len(u.Servers) == 0:
		m.log.Warnf("monitor", "%s names no server: names will not resolve (give one with --dns)", m.cfg.ResolvConf)
	}
	m.change.Lock()
	defer m.change.Unlock()
	m.passUpstreams(u)
}
