package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/ports"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// maxControlConns bounds the connections that the monitor serves. A connection handed to the worker
// counts until the worker has it.
const maxControlConns = 32

// controlServer accepts on the control socket.
type controlServer struct {
	l      *net.UnixListener
	peers  registry.PeerPolicy
	handle func(ctx context.Context, c *net.UnixConn, req api.Request) error
	log    *logring.LogRing
}

// listenControl opens the control socket. Its directory is private; checking each peer is a second
// safeguard.
func (m *monitor) listenControl() (*controlServer, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: m.dir.Socket(), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("open the control socket: %w", err)
	}
	s := m.serverOn(l)
	if err := os.Chmod(m.dir.Socket(), 0o600); err != nil {
		s.close()
		return nil, fmt.Errorf("protect the control socket: %w", err)
	}
	return s, nil
}

// serverOn makes the server of a listener, and owns the listener.
func (m *monitor) serverOn(l *net.UnixListener) *controlServer {
	l.SetUnlinkOnClose(false) // the directory is removed as a whole
	return &controlServer{l: l, peers: registry.PeerPolicy{Uid: os.Geteuid()}, handle: control{m}.handle, log: m.log}
}

func (s *controlServer) close() { _ = s.l.Close() }

// serve accepts until ctx ends, and returns after its last goroutine has.
func (s *controlServer) serve(ctx context.Context) {
	defer s.close()
	stop := context.AfterFunc(ctx, func() { _ = s.l.Close() })
	defer stop()
	slots := make(chan struct{}, maxControlConns)
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		slots <- struct{}{}
		c, err := s.l.AcceptUnix()
		if err != nil {
			<-slots
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			// Most likely out of descriptors: the sandbox goes on, and the next client may succeed.
			s.log.Warnf("monitor", "accept on the control socket: %v", err)
			process.SleepContext(ctx, 100*time.Millisecond)
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			s.serveConn(ctx, c)
		})
	}
}

// serveConn answers one connection.
func (s *controlServer) serveConn(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = c.SetWriteDeadline(time.Now().Add(api.RequestTimeout))
	if err := s.peers.Check(c); err != nil {
		s.log.Warnf("monitor", "control socket: %v", err)
		_ = api.WriteError(c, &api.Error{Code: api.CodeDenied, Message: err.Error()})
		return
	}
	req, err := api.ReadRequest(c, time.Now().Add(api.RequestTimeout))
	if err == nil {
		// Each answer sets its own deadline.
		_ = c.SetWriteDeadline(time.Time{})
		err = s.handle(ctx, c, req)
	}
	if err != nil {
		_ = c.SetWriteDeadline(time.Now().Add(api.RequestTimeout))
		_ = api.WriteError(c, err)
	}
}

// control is the part of the monitor that answers on its control socket.
type control struct{ *monitor }

// handle answers one request. The error that it returns has not been written.
func (m control) handle(ctx context.Context, c *net.UnixConn, req api.Request) error {
	switch req.Method {
	case api.MethodLogs:
		return m.handleLogs(ctx, c, req)
	case api.MethodUpgrade:
		return m.kind.upgrade(ctx, c, req)
	case api.MethodFlows, api.MethodFlowsWatch, api.MethodStats, api.MethodSysctl, api.MethodCapture:
		return m.handOver(ctx, c, req)
	}
	result, err := m.answer(ctx, req)
	if err != nil {
		return err
	}
	_ = c.SetWriteDeadline(time.Now().Add(api.RequestTimeout))
	_ = api.WriteResult(c, result)
	return nil
}

// answer serves the methods that have a single answer and that the monitor handles itself.
func (m control) answer(ctx context.Context, req api.Request) (any, error) {
	switch req.Method {
	case api.MethodInfo:
		i := m.info()
		var flows api.FlowCount
		if m.callWorker(ctx, api.MethodFlowCount, &flows) == nil {
			i.Flows = flows.Flows
		}
		return i, nil
	case api.MethodPolicyShow:
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.policyResult()
	case api.MethodPolicySet:
		return decoded(req, m.setPolicy)
	case api.MethodPorts:
		return api.PortsResult{Ports: ports.ApiPorts(m.ports.List())}, nil
	case api.MethodPortsAdd:
		return decoded(req, publishing(m).addPort)
	case api.MethodPortsRm:
		return decoded(req, publishing(m).removePort)
	case api.MethodFlowLogReopen:
		return m.reopenFlowLog()
	case api.MethodSysctlSet:
		return decoded(req, func(p api.SysctlParams) (any, error) { return m.setSysctl(p) })
	}
	return nil, &api.Error{Code: api.CodeBadRequest, Message: fmt.Sprintf("unknown method %q", req.Method)}
}

// decoded decodes a request's parameters for f.
func decoded[P any](req api.Request, f func(P) (any, error)) (any, error) {
	var p P
	if err := api.DecodeStrict(req.Params, &p); err != nil {
		return nil, &api.Error{Code: api.CodeBadRequest, Message: fmt.Sprintf("%s: parameters: %v", req.Method, err)}
	}
	return f(p)
}

// handOver gives the connection to the worker, which answers from then on.
func (m control) handOver(ctx context.Context, c *net.UnixConn, req api.Request) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var dead *process.WorkerLink
	for {
		l := m.awaitWorker(ctx, dead)
		if l == nil {
			return errRestarting
		}
		var posted error
		err := rc.Control(func(fd uintptr) { posted = l.Post(channel.MsgControl, channel.ControlMessage{Request: req}, int(fd)) })
		if err := errors.Join(err, posted); err == nil || !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			return err
		}
		dead = l // it died without our being told yet
	}
}

var errRestarting = &api.Error{Code: api.CodeUnavailable, Message: "the worker is being restarted: try again in a moment"}

// callTimeout bounds the monitor's own calls to the worker.
const callTimeout = 2 * time.Second

// callWorker asks the worker as a client would.
func (m control) callWorker(ctx context.Context, method string, result any) error {
	l := m.worker()
	if l == nil {
		return errRestarting
	}
	ends, err := channel.Socketpair(unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	err = l.Post(channel.MsgControl, channel.ControlMessage{Request: api.Request{Method: method}}, channel.FDOf(ends[1]))
	_ = ends[1].Close()
	if err != nil {
		_ = ends[0].Close()
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s, err := api.Answer(ctx, ends[0], method, result)
	if err != nil {
		return err
	}
	return s.Close()
}

// policyResult is called with mu held.
func (m control) policyResult() (any, error) {
	text, err := m.rules.Policy.Text()
	if err != nil {
		return nil, err
	}
	return api.PolicyResult{Name: m.rules.Policy.Name(), Source: text, Generation: m.generation}, nil
}

// setPolicy puts a policy in force; if it has errors, the old one stays. Once the new policy is
// kept, no older one comes back, whatever happens to this process, the worker, or the answer.
func (m control) setPolicy(p api.PolicySetParams) (any, error) {
	name := cmp.Or(p.Name, "policy")
	m.lockChange()
	defer m.change.Unlock()
	r := m.rules
	d, err := policy.NewDocument(name, []byte(p.Source))
	if err == nil {
		r.Policy = policy.Given(d)
		_, err = r.Compile()
	}
	if err != nil {
		err = &api.Error{Code: api.CodeInvalid, Message: err.Error()}
	} else {
		err = m.kind.keep(func(k *kept) { k.Policy, k.Generation = r.Policy, m.generation+1 })
	}
	if err != nil {
		m.log.Infof("monitor", "policy %s refused: %v", name, err)
		return nil, fmt.Errorf("%w\nthe policy in force is still %s", err, m.rules.Policy.Name())
	}
	m.mu.Lock()
	m.generation++
	m.mu.Unlock()
	if err := m.applyRules(r); err != nil {
		return nil, &api.Error{Code: api.CodeFailed, Message: fmt.Sprintf("the policy is now %s, but not yet in force: %v", name, err)}
	}
	m.log.Infof("monitor", "policy %s is in force", name)
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.policyResult()
}

// setSysctl sets a tunable in the worker, and for its successors.
func (m control) setSysctl(p api.SysctlParams) (any, error) {
	if p.Name == "" || p.Value == "" {
		return nil, &api.Error{Code: api.CodeBadRequest, Message: "want a tunable and its value"}
	}
	m.change.Lock()
	defer m.change.Unlock()
	l := m.worker()
	if l == nil {
		return nil, errRestarting
	}
	next := maps.Clone(m.sysctls)
	if next == nil {
		next = make(map[string]string)
	}
	next[p.Name] = p.Value
	// Only the worker can tell whether the value is valid.
	switch err := l.Request(channel.MsgSysctl, p); {
	case err != nil && l.Survived(err) == nil:
		return nil, errRestarting
	case err != nil:
		return nil, &api.Error{Code: api.CodeInvalid, Message: err.Error()}
	}
	m.mu.Lock()
	m.sysctls = next
	m.mu.Unlock()
	if err := m.kind.keep(func(k *kept) { k.Sysctls = next }); err != nil {
		return nil, fmt.Errorf("the change is in force, but would be lost with the monitor: %w", err)
	}
	return api.SysctlResult{Values: map[string]string{p.Name: p.Value}}, nil
}

// handleLogs answers with the last lines and, if asked, follows new ones until the client hangs up.
func (m control) handleLogs(ctx context.Context, c *net.UnixConn, req api.Request) error {
	var p api.LogsParams
	if err := api.DecodeStrict(req.Params, &p); err != nil {
		return &api.Error{Code: api.CodeBadRequest, Message: "logs: parameters: " + err.Error()}
	}
	_ = c.SetWriteDeadline(time.Now().Add(api.RequestTimeout))
	if !p.Follow {
		lines, dropped := m.log.Last(p.Last)
		_ = api.WriteResult(c, api.LogsResult{Lines: lines, Dropped: dropped})
		return nil
	}
	lines, more, cancel := m.log.Follow(p.Last)
	if cancel == nil {
		return &api.Error{Code: api.CodeUnavailable, Message: fmt.Sprintf("%d clients follow the log already", logring.MaxLogFollowers)}
	}
	defer cancel()
	if api.WriteResult(c, api.LogsResult{Lines: lines}) != nil {
		return nil
	}
	gone := make(chan struct{})
	// Ends when the client hangs up, or with the deadline that serveConn sets when ctx ends.
	go func() {
		defer close(gone)
		_, _ = c.Read(make([]byte, 1))
	}()
	defer func() {
		_ = c.SetReadDeadline(time.Unix(1, 0))
		<-gone
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-gone:
			return nil
		case line := <-more:
			_ = c.SetWriteDeadline(time.Now().Add(api.RequestTimeout))
			if api.WriteLine(c, line) != nil {
				return nil
			}
		}
	}
}
