package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/sandbox/internal/host"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/ports"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// StartGuest makes the inside of a sandbox: guest.Start, or an attachment to existing namespaces.
type StartGuest func(context.Context, guest.Config) (*guest.Guest, error)

// monitor is the process that outlives the workers, and holds everything that a new worker is
// given. A sandbox with a command (run) and a pod's attachment (attachment) are two kinds of it.
//
// Lock order: change, then mu.
type monitor struct {
	kind    kind
	log     *logring.LogRing
	dir     *registry.Dir
	spawner *process.Spawner
	early   *process.Process // spawned for the first startWorker; nil afterwards
	ports   ports.PortTable
	base    api.Info          // the part that does not change
	flowLog *flowlog.FlowFile // nil without one
	raw     [2]int            // raw ICMP and ICMPv6, or -1
	grants  *policy.Names     // grants by workers, for their successors

	// change serialises changes to a worker's world: starting a worker, and changing rules,
	// upstreams, ports and tunables while one runs. Each change is stored here before the worker is
	// told, so that its successor starts with it.
	change sync.Mutex
	world  // read under change or mu, written under both

	mu      sync.Mutex
	serving // under mu
}

// kind is the difference between sandboxes with a command and attachments.
type kind interface {
	// WorkerConfig is the part of a new worker's configuration that only this kind knows, with
	// the devices' descriptors. Called with change held.
	workerConfig() (channel.WorkerConfig, []int)
	// admit is called with each worker's process before that process is told anything.
	admit(p *process.Process)
	// giveSocket makes a socket inside the sandbox for the worker. The link's reader calls it, so
	// it must not block.
	giveSocket(l *process.WorkerLink, v6 bool)
	// families returns the addresses for which ports are published, or an error that says why there
	// are none.
	families() (has4, has6 bool, err error)
	// followsHost reports whether the resolvers are the host's.
	followsHost() bool
	// keep applies f to the state that outlives the monitor. Called with change held.
	keep(f func(*kept)) error
	// upgrade answers a request for an upgrade. If the upgrade succeeds, the new binary answers
	// instead.
	upgrade(ctx context.Context, c *net.UnixConn, req api.Request) error
	// ended receives the flows of the last worker.
	ended(api.FlowsResult)
}

// world is the state that a worker starts with and is told of when it changes.
type world struct {
	rules      channel.RulesMessage
	generation uint64 // of rules: how many policy.set calls have succeeded
	upstreams  dns.Upstreams
	named      dns.Upstreams // upstreams before their zones were looked up
	sysctls    map[string]string
}

// serving is the state of the monitor's workers.
type serving struct {
	link     *process.WorkerLink // nil while there is no worker
	starting *process.Process    // a worker that is not ready yet, or nil
	came     chan struct{}       // closed when link is set, then replaced
	state    api.State
	restarts uint64
	failure  string
}

// newMonitor makes the core of a monitor, whose kind and log are set before it is used.
func newMonitor(sysctls map[string]string) *monitor {
	return &monitor{
		raw: [2]int{-1, -1}, grants: channel.NewKeptGrants(), world: world{sysctls: sysctls},
		serving: serving{state: api.StateStarting, came: make(chan struct{})},
	}
}

func (m *monitor) setState(s api.State) {
	m.mu.Lock()
	m.state = s
	m.mu.Unlock()
}

// worker returns the link to the running worker, or nil.
func (m *monitor) worker() *process.WorkerLink {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.link
}

// workerWait bounds how long a client's request waits for a worker that is being
// restarted.
const workerWait = 2 * time.Second

// changePatience is how long a new policy waits for an earlier change.
const changePatience = 700 * time.Millisecond

// lockChange takes change. Its holder may be waiting for a worker; a worker that delays a new
// policy too long is killed, so that stopping a worker cannot put off a policy.
func (m *monitor) lockChange() {
	t := time.AfterFunc(changePatience, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.starting != nil {
			_ = m.starting.Cmd.Kill()
		}
		if m.link != nil {
			_ = m.link.P.Cmd.Kill()
		}
	})
	defer t.Stop()
	m.change.Lock()
}

// awaitWorker returns the link to a running worker other than not, which the caller found dead, or
// nil if none comes in time.
func (m *monitor) awaitWorker(ctx context.Context, not *process.WorkerLink) *process.WorkerLink {
	t := time.NewTimer(workerWait)
	defer t.Stop()
	for {
		m.mu.Lock()
		l, came := m.link, m.came
		m.mu.Unlock()
		if l != nil && l != not {
			return l
		}
		select {
		case <-came:
		case <-t.C:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// spawnWorker starts a worker's process, which then waits for its configuration.
func (m *monitor) spawnWorker() (*process.Process, error) {
	return m.spawner.Start(process.WorkerPlan(process.WorkerIDs()), m.workerLine)
}

// startWorker starts a worker with everything that the monitor holds.
func (m *monitor) startWorker(ctx context.Context) (process.Supervised, error) {
	m.change.Lock()
	defer m.change.Unlock()
	p := m.early
	m.early = nil
	if p == nil {
		var err error
		if p, err = m.spawnWorker(); err != nil {
			return nil, err
		}
	}
	l := process.NewWorkerLink(p, m.kind.giveSocket, m.nextFlowLog, m.grants)
	m.kind.admit(p)
	m.setStarting(p)
	defer m.setStarting(nil)
	if err := m.introduce(ctx, l); err != nil {
		p.Kill()
		// Its last words explain more than a broken channel.
		if errors.Is(err, process.ErrWorkerGone) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			err = errors.New(p.Why)
		}
		return nil, fmt.Errorf("start the worker: %w", err)
	}
	m.mu.Lock()
	m.link, m.state = l, api.StateRunning
	close(m.came)
	m.came = make(chan struct{})
	m.mu.Unlock()
	go l.Watch(process.WatchEvery, process.WatchPatience) // ends with the worker
	return l, nil
}

func (m *monitor) setStarting(p *process.Process) {
	m.mu.Lock()
	m.starting = p
	m.mu.Unlock()
}

// introduce hands everything over and waits until the worker serves. Called
// with change held.
func (m *monitor) introduce(ctx context.Context, l *process.WorkerLink) error {
	cfg, fds := m.workerConfig()
	if m.flowLog != nil {
		m.flowLog.Mend()
		f, err := m.flowLog.Dup()
		if err != nil {
			return err
		}
		defer f.Close()
		cfg.HasFlowLog, cfg.FlowLogMax, fds = true, m.flowLog.MaxSize, append(fds, channel.FDOf(f))
	}
	if err := l.Post(channel.MsgConfig, cfg, fds...); err != nil {
		return err
	}
	t := time.NewTimer(process.ReadyTimeout)
	defer t.Stop()
	select {
	case <-l.Ready:
	case <-l.Ended():
		return process.ErrWorkerGone
	case <-t.C:
		return fmt.Errorf("not ready after %s", process.ReadyTimeout)
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, p := range m.ports.List() {
		if err := (publishing{m}).offer(l, p); err != nil {
			return err
		}
	}
	return nil
}

// workerConfig returns a new worker's configuration, without the flow log. Called with change held.
func (m *monitor) workerConfig() (channel.WorkerConfig, []int) {
	w, fds := m.kind.workerConfig()
	w.Upstreams, w.Rules, w.Sysctls = m.upstreams, m.rules, maps.Clone(m.sysctls)
	w.Grants = channel.KeptGrants(m.grants, time.Now())
	w.HasRaw4, w.HasRaw6 = m.raw[0] >= 0, m.raw[1] >= 0
	w.CgroupMemory = host.CgroupMemory()
	for _, fd := range m.raw {
		if fd >= 0 {
			fds = append(fds, fd)
		}
	}
	return w, fds
}

// lost records a worker's death.
func (m *monitor) lost(why string, wait time.Duration) {
	m.mu.Lock()
	l := m.link
	m.link, m.state, m.failure = nil, api.StateRestarting, why
	m.restarts++
	m.mu.Unlock()
	if l != nil {
		_ = l.P.Ch.Close()
	}
	m.log.Warnf("monitor", "the worker ended: %s; its flows are lost, restarting %s", why, inWhen(wait))
}

func (m *monitor) startFailed(err error, wait time.Duration) {
	m.mu.Lock()
	m.failure = err.Error()
	m.mu.Unlock()
	m.log.Warnf("monitor", "%v; trying again %s", err, inWhen(wait))
}

func inWhen(d time.Duration) string {
	if d <= 0 {
		return "now"
	}
	return "in " + d.String()
}

// workerLine handles one line of the worker's standard error. Log lines carry their level in
// sd-daemon(3) form; all others are its last words.
func (m *monitor) workerLine(line string) {
	level := "error"
	if len(line) > 3 && line[0] == '<' && line[2] == '>' {
		switch line[1] {
		case '7', '6':
			level = "info"
		case '4':
			level = "warning"
		}
		line = line[3:]
	}
	m.log.Add(level, "worker", line)
}

// tell passes a change on to the worker, if there is one; its successor gets it anyway. Called with
// change held.
func (m *monitor) tell(typ string, body any, fds ...int) error {
	l := m.worker()
	if l == nil {
		return nil
	}
	return l.Survived(l.Request(typ, body, fds...))
}

// lookAgain has the zones of resolvers looked up again.
func (m *monitor) lookAgain() {
	m.change.Lock()
	defer m.change.Unlock()
	if m.kind.followsHost() { // a pod's resolvers have no zones
		m.passUpstreams(m.named)
	}
}

// passUpstreams stores the resolvers and tells the worker. change is held.
func (m *monitor) passUpstreams(named dns.Upstreams) {
	u, missing := host.WithIndexes(named, host.InterfaceIndex)
	news := !m.named.Equal(named)
	if news && len(missing) > 0 {
		m.log.Warnf("monitor", "resolvers with the zones %q are not asked until there are such interfaces", missing)
	}
	if !news && m.upstreams.Equal(u) {
		return
	}
	m.mu.Lock()
	m.named, m.upstreams = named, u
	m.mu.Unlock()
	m.log.Infof("monitor", "upstream resolvers are now %v", named.Servers)
	if err := m.tell(channel.MsgUpstreams, u); err != nil {
		m.log.Warnf("monitor", "pass the resolvers on: %v", err)
	}
}

// setHost is called by the watcher of the host's addresses. It recompiles the rules, because the
// set of host addresses has changed. If that set is unknown, or no rules can be compiled for it,
// the older set would leave addresses open, so everything is denied.
func (m *monitor) setHost(list []netip.Prefix, err error) {
	m.change.Lock()
	defer m.change.Unlock()
	r := m.rules
	r.Env.Host, r.Env.HostUnknown = list, err != nil
	if err == nil {
		if slices.Equal(m.rules.Env.Host, list) && !m.rules.Env.HostUnknown {
			return
		}
		_, err = r.Compile()
	}
	if err != nil {
		m.log.Warnf("monitor", "%v: everything is denied until they are fewer", err)
		r.Env.Host, r.Env.HostUnknown = nil, true
	}
	if m.applyRules(r) != nil {
		return // it has been logged
	}
	m.log.Infof("monitor", "the host has %d addresses", len(list))
}

// applyRules compiles and applies the rules for good: a worker that does not accept them is killed,
// and the next one starts with them. It returns an error if such a worker has not ended yet. Called
// with change held.
func (m *monitor) applyRules(r channel.RulesMessage) error {
	m.mu.Lock()
	m.rules = r
	m.mu.Unlock()
	l := m.worker()
	if l == nil {
		return nil
	}
	err := l.RequestWithin(process.RulesTimeout, channel.MsgRules, r)
	if err != nil && l.Survived(err) != nil {
		// The worker reports that it cannot: it must not go on under other rules.
		err = l.Hung("refused the policy: " + err.Error())
	}
	if err = l.Survived(err); err != nil {
		m.log.Warnf("monitor", "the policy %s: %v", r.Policy.Name(), err)
	}
	return err
}

// info describes the sandbox, without asking the worker.
func (m *monitor) info() api.Info {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := m.base
	i.State, i.Restarts, i.LastFailure, i.Policy = m.state, m.restarts, m.failure, m.rules.Policy.Name()
	i.Flows = -1
	if m.link != nil {
		i.WorkerPID = m.link.P.Cmd.Pid
	}
	for _, s := range m.upstreams.Servers {
		i.Upstreams = append(i.Upstreams, s.String())
	}
	return i
}

// release closes what the monitor holds on the host.
func (m *monitor) release() {
	m.ports.CloseAll()
	for _, fd := range m.raw {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	if m.flowLog != nil {
		m.flowLog.Close()
	}
}

// watchHost follows the host's addresses until ctx ends.
func (m *monitor) watchHost(ctx context.Context) {
	for {
		err := host.WatchHostRanges(ctx, m.setHost, m.lookAgain)
		if ctx.Err() != nil {
			return
		}
		m.log.Warnf("monitor", "%v; starting over", err)
		process.SleepContext(ctx, time.Second)
	}
}

// stopWorker stops the last worker, in order or by force.
func (m *monitor) stopWorker(l *process.WorkerLink) {
	defer l.P.Kill()
	timer := time.AfterFunc(stopTimeout, func() { _ = l.P.Cmd.Kill() })
	defer timer.Stop()
	ends, err := channel.Socketpair(unix.SOCK_STREAM)
	if err != nil {
		return
	}
	defer ends[0].Close()
	err = l.Post(channel.MsgStop, nil, channel.FDOf(ends[1]))
	_ = ends[1].Close()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	var flows api.FlowsResult
	s, err := api.Answer(ctx, ends[0], "stop", &flows)
	if err != nil {
		m.log.Warnf("monitor", "the worker did not end in order: %v", err)
		return
	}
	_ = s.Close()
	m.kind.ended(flows)
	<-l.P.Done
}
