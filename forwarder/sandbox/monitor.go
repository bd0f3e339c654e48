package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sluice/forwarder/dns"
	"sluice/forwarder/sandbox/api"
	"sluice/forwarder/sandbox/guest"
	"sluice/policy"
	"sluice/tun"
)

// StartGuest makes the inside of a sandbox: guest.Start, or an attachment to
// namespaces that exist.
type StartGuest func(context.Context, guest.Config) (*guest.Guest, error)

// monitor is the process that outlives the workers: what it holds is what a
// new worker is given.
//
// Lock order: change, then mu.
type monitor struct {
	cfg     Config
	log     *logRing
	dir     *Dir
	guest   *guest.Guest // nil in an attachment
	spawner *spawner
	early   *process // spawned for the first startWorker; nil afterwards
	signals chan os.Signal
	console atomic.Pointer[guest.Console] // for echo; nil until the command starts, and without a terminal
	ports   portTable
	base    api.Info  // what does not change
	flowLog *flowFile // nil without one
	raw     [2]int    // raw ICMP and ICMPv6, or -1

	// An attachment's only.
	att       *AttachmentConfig
	listener  *net.UnixListener // the control server's
	memory    *os.File          // where workers note flows for their successors
	takeovers chan takeover

	grants *policy.Names // what workers granted, for their successors

	// socketWants holds a token per socket being made for the worker.
	socketWants chan struct{}

	callersHosts map[string][]netip.Addr // set before the first worker starts

	// change serialises what alters a worker's world: starting one, and rules,
	// upstreams, ports and tunables while one runs. Each change is stored here
	// before the worker is told, so that its successor starts with it. The
	// fields below it are read under change or mu and written under both.
	change     sync.Mutex
	rules      rulesMessage
	generation uint64 // of rules: how often policy.set succeeded
	upstreams  dns.Upstreams
	named      dns.Upstreams // upstreams before their zones were looked up
	sysctls    map[string]string

	mu       sync.Mutex
	link     *workerLink   // nil while there is no worker
	starting *process      // a worker that is not ready yet, or nil
	came     chan struct{} // closed when link is set, then replaced
	state    api.State
	restarts uint64
	failure  string
}

func (m *monitor) setState(s api.State) {
	m.mu.Lock()
	m.state = s
	m.mu.Unlock()
}

// worker returns the link to the running worker, or nil.
func (m *monitor) worker() *workerLink {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.link
}

// workerWait bounds how long a client's request waits for a worker that is being
// restarted.
const workerWait = 2 * time.Second

// changePatience is how long a new policy waits for another change.
const changePatience = 700 * time.Millisecond

// lockChange takes change. Whoever holds it is waiting for a worker: one that keeps a new
// policy waiting is killed, so that nobody can put the policy off by stopping it.
func (m *monitor) lockChange() {
	t := time.AfterFunc(changePatience, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.starting != nil {
			_ = m.starting.cmd.Kill()
		}
		if m.link != nil {
			_ = m.link.p.cmd.Kill()
		}
	})
	defer t.Stop()
	m.change.Lock()
}

// awaitWorker returns the link to a running worker other than not, which the
// caller found dead; nil if there is none in time.
func (m *monitor) awaitWorker(ctx context.Context, not *workerLink) *workerLink {
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
func (m *monitor) spawnWorker() (*process, error) {
	return m.spawner.start(workerPlan(workerIDs()), m.workerLine)
}

// startWorker brings up a worker with all that the monitor holds.
func (m *monitor) startWorker(ctx context.Context) (supervised, error) {
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
	l := newWorkerLink(p, m.giveSocket, m.nextFlowLog, m.grants)
	if m.att != nil {
		// Before it is told anything: its memory is the pod's from the first page on.
		if err := joinCgroups(m.att.WorkerCgroups, p.cmd.Pid); err != nil {
			m.log.warnf("monitor", "%v", err)
		}
	}
	m.setStarting(p)
	defer m.setStarting(nil)
	if err := m.introduce(ctx, l); err != nil {
		p.kill()
		// Its own words explain more than a broken channel does.
		if errors.Is(err, errWorkerGone) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			err = errors.New(p.why)
		}
		return nil, fmt.Errorf("start the worker: %w", err)
	}
	m.mu.Lock()
	m.link, m.state = l, api.StateRunning
	close(m.came)
	m.came = make(chan struct{})
	m.mu.Unlock()
	go l.watch(watchEvery, watchPatience) // ends with the worker
	return l, nil
}

func (m *monitor) setStarting(p *process) {
	m.mu.Lock()
	m.starting = p
	m.mu.Unlock()
}

// introduce hands everything over and waits until the worker serves. Called
// with change held.
func (m *monitor) introduce(ctx context.Context, l *workerLink) error {
	cfg, fds := m.workerConfig()
	if m.flowLog != nil {
		m.flowLog.mend()
		f, err := m.flowLog.dup()
		if err != nil {
			return err
		}
		defer f.Close()
		cfg.HasFlowLog, cfg.FlowLogMax, fds = true, m.flowLog.maxSize, append(fds, fdOf(f))
	}
	if err := l.post(msgConfig, cfg, fds...); err != nil {
		return err
	}
	t := time.NewTimer(readyTimeout)
	defer t.Stop()
	select {
	case <-l.ready:
	case <-l.ended():
		return errWorkerGone
	case <-t.C:
		return fmt.Errorf("not ready after %s", readyTimeout)
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, p := range m.ports.list() {
		if err := m.offer(l, p); err != nil {
			return err
		}
	}
	return nil
}

// workerConfig collects what a new worker gets, but for the flow log. Called with change
// held.
func (m *monitor) workerConfig() (workerConfig, []int) {
	var w workerConfig
	var fds []int
	if m.att != nil {
		w, fds = m.att.workerConfig()
		fds = append(fds, fdOf(m.memory))
	} else {
		w, fds = m.sandboxConfig()
	}
	w.Upstreams, w.Rules, w.Sysctls = m.upstreams, m.rules, maps.Clone(m.sysctls)
	w.Grants = keptGrants(m.grants, time.Now())
	w.HasRaw4, w.HasRaw6 = m.raw[0] >= 0, m.raw[1] >= 0
	w.CgroupMemory = cgroupMemory()
	for _, fd := range m.raw {
		if fd >= 0 {
			fds = append(fds, fd)
		}
	}
	return w, fds
}

// sandboxConfig is the part of workerConfig that a sandbox with a guest has, with
// the device's descriptors.
func (m *monitor) sandboxConfig() (workerConfig, []int) {
	c := &m.cfg
	w := workerConfig{
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
		fds = append(fds, fdOf(f))
	}
	w.Queues = len(fds)
	return w, fds
}

// offer passes one published port to a worker. Called with change held.
func (m *monitor) offer(l *workerLink, p published) error {
	for _, s := range p.listeners {
		msg := publishMessage{ID: s.id, Proto: s.proto, Host: s.host, Guest: s.guest}
		if err := l.request(msgPublish, msg, s.fd); err != nil {
			return fmt.Errorf("publish %s: %w", FormatPort(p.port), err)
		}
	}
	return nil
}

// lost takes a worker's death down.
func (m *monitor) lost(why string, wait time.Duration) {
	m.mu.Lock()
	l := m.link
	m.link, m.state, m.failure = nil, api.StateRestarting, why
	m.restarts++
	m.mu.Unlock()
	if l != nil {
		_ = l.p.ch.Close()
	}
	m.log.warnf("monitor", "the worker ended: %s; its flows are lost, restarting %s", why, inWhen(wait))
}

func (m *monitor) startFailed(err error, wait time.Duration) {
	m.mu.Lock()
	m.failure = err.Error()
	m.mu.Unlock()
	m.log.warnf("monitor", "%v; trying again %s", err, inWhen(wait))
}

func inWhen(d time.Duration) string {
	if d <= 0 {
		return "now"
	}
	return "in " + d.String()
}

// workerLine takes one line of the worker's standard error. Lines of its log
// carry their level as sd-daemon(3) spells it; all others are its last words.
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
	m.log.add(level, "worker", line)
}

// tell passes a change on to the worker, if there is one; its successor gets
// the change anyway. Called with change held.
func (m *monitor) tell(typ string, body any, fds ...int) error {
	l := m.worker()
	if l == nil {
		return nil
	}
	return l.survived(l.request(typ, body, fds...))
}

// setUpstreams is called by the watcher of the host's resolver configuration.
func (m *monitor) setUpstreams(u dns.Upstreams, err error) {
	u = m.cfg.upstreams(u)
	switch {
	case err != nil:
		m.log.warnf("monitor", "read the host's resolver configuration: %v", err)
	case len(u.Servers) == 0:
		m.log.warnf("monitor", "%s names no server: names will not resolve (give one with --dns)", m.cfg.ResolvConf)
	}
	m.change.Lock()
	defer m.change.Unlock()
	m.passUpstreams(u)
}

// lookAgain has the zones of resolvers looked up again.
func (m *monitor) lookAgain() {
	m.change.Lock()
	defer m.change.Unlock()
	if m.att == nil { // a pod's resolvers have none
		m.passUpstreams(m.named)
	}
}

// passUpstreams stores the resolvers and tells the worker. change is held.
func (m *monitor) passUpstreams(named dns.Upstreams) {
	u, missing := withIndexes(named, interfaceIndex)
	news := !m.named.Equal(named)
	if news && len(missing) > 0 {
		m.log.warnf("monitor", "resolvers with the zones %q are not asked until there are such interfaces", missing)
	}
	if !news && m.upstreams.Equal(u) {
		return
	}
	m.mu.Lock()
	m.named, m.upstreams = named, u
	m.mu.Unlock()
	m.log.infof("monitor", "upstream resolvers are now %v", named.Servers)
	if err := m.tell(msgUpstreams, u); err != nil {
		m.log.warnf("monitor", "pass the resolvers on: %v", err)
	}
}

// setHost is called by the watcher of the host's addresses: the rules are compiled anew,
// because what is the host's own has changed. Where that cannot be told, or no rules can be
// made for it, the older list would leave addresses open: everything is denied.
func (m *monitor) setHost(list []netip.Prefix, err error) {
	m.change.Lock()
	defer m.change.Unlock()
	r := m.rules
	r.Env.Host, r.Env.HostUnknown = list, err != nil
	if err == nil {
		if slices.Equal(m.rules.Env.Host, list) && !m.rules.Env.HostUnknown {
			return
		}
		_, err = r.compile()
	}
	if err != nil {
		m.log.warnf("monitor", "%v: everything is denied until they are fewer", err)
		r.Env.Host, r.Env.HostUnknown = nil, true
	}
	if m.applyRules(r) != nil {
		return // the log has it
	}
	m.log.infof("monitor", "the host has %d addresses", len(list))
}

// applyRules makes rules that compile the ones in force, for good: a worker that does not
// take them is killed, and the next one starts with them. An error says that such a worker
// has not ended yet. Called with change held.
func (m *monitor) applyRules(r rulesMessage) error {
	m.mu.Lock()
	m.rules = r
	m.mu.Unlock()
	l := m.worker()
	if l == nil {
		return nil
	}
	err := l.requestWithin(rulesTimeout, msgRules, r)
	if err != nil && l.survived(err) != nil {
		// It says that it cannot: with other rules it must not go on.
		err = l.hung("refused the policy: " + err.Error())
	}
	if err = l.survived(err); err != nil {
		m.log.warnf("monitor", "the policy %s: %v", r.Policy.Name(), err)
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
		i.WorkerPID = m.link.p.cmd.Pid
	}
	for _, s := range m.upstreams.Servers {
		i.Upstreams = append(i.Upstreams, s.String())
	}
	return i
}
