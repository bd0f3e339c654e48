package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sluice/forwarder"
	"sluice/forwarder/dhcp"
	"sluice/forwarder/dns"
	"sluice/forwarder/sandbox/api"
	"sluice/forwarder/sandbox/confine"
	"sluice/nat"
	"sluice/policy"
	"sluice/tun"
)

// worker is the process that parses packets. Its order of life:
//
//	nearly everything is given up (package confine)
//	configuration and descriptors come in by the channel
//	the device is adopted
//	what system calls are left is filtered
//	the endpoint is made, the stack attached: the first packet is read here
//	rules are set: until now every flow was dropped
//	ready; then the monitor's messages, one at a time, until stop or the end
//	of the channel
type worker struct {
	cfg   workerConfig
	ch    *channel
	log   *slog.Logger
	seal  func() error
	link  *tun.Endpoint
	in0   *tun.Endpoint // nil but in an attachment
	table *nat.Table
	fwd   *forwarder.Forwarder
	dns   *dns.Resolver
	names *policy.Names // granted by dns, asked by fwd; outlives the rules
	rules atomic.Pointer[policy.Rules]
	dial  *upstreamDialer
	stock *socketStock
	flows *flowLog
	hint  flagHint

	inbound   *tun.Device           // in0's, until that is made
	memory    []byte                // of its flows; never unmapped
	marks     forwarder.MemoryMarks // that fwd is made with
	keepalive forwarder.Keepalive   // as fwd has it, or is made with

	ctx     context.Context // of control connections; ends with the worker
	clients chan struct{}   // a token per control connection
	wg      sync.WaitGroup  // control connections

	// The message loop's own.
	limits  policy.Limits     // of the rules in force
	sysctls map[string]string // set by hand
}

// maxClients bounds the control connections that a worker serves at once.
const maxClients = 64

// WorkerMain is the worker process's main function; it returns the exit status.
func WorkerMain() int {
	log := slog.New(&journalHandler{w: os.Stderr})
	if err := runWorker(log); err != nil {
		log.Error("sluice: worker: " + err.Error())
		return 1
	}
	return 0
}

func runWorker(log *slog.Logger) error {
	// As early as can be; the flag of clone covers the time before.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("ask for the parent-death signal: %w", err)
	}
	seal, err := confine.Enter(confine.Config{KeepFDs: []int{0, 1, 2, workerChannelFD}})
	if err != nil {
		return fmt.Errorf("confine the worker: %w", err)
	}
	unix.CloseOnExec(workerChannelFD)
	ch := newChannel(os.NewFile(workerChannelFD, "channel"), true)
	m, fds, err := ch.Receive()
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("receive the configuration: %w", err)
	}
	if m.Type != msgConfig {
		return fmt.Errorf("the first message is %q, not the configuration: this command is for sluice itself", m.Type)
	}
	w := &worker{ch: ch, log: log, seal: seal, hint: flagHint{warn: func(s string) { log.Warn(s) }}, clients: make(chan struct{}, maxClients), sysctls: make(map[string]string)}
	if err := json.Unmarshal(m.Body, &w.cfg); err != nil {
		return fmt.Errorf("decode the configuration: %w", err)
	}
	return w.run(fds)
}

func (w *worker) run(fds []int) error {
	h, err := w.cfg.sort(fds)
	if err != nil {
		return err
	}
	if w.cfg.CgroupMemory > 0 {
		debug.SetMemoryLimit(w.cfg.CgroupMemory / 10 * 9)
	}
	rules, err := w.cfg.Rules.compile()
	if err != nil {
		return fmt.Errorf("compile the policy: %w", err)
	}
	device, err := tun.Adopt(h.device, w.cfg.Device)
	if err != nil {
		return fmt.Errorf("adopt the device: %w", err)
	}
	mac, err := device.HardwareAddr()
	if err != nil {
		return err
	}
	if w.cfg.Inbound != nil {
		if w.inbound, err = tun.Adopt(h.inbound, *w.cfg.Inbound); err != nil {
			return fmt.Errorf("adopt the inbound device: %w", err)
		}
		if w.memory, err = mapMemory(h.memory); err != nil {
			return fmt.Errorf("map the memory for flows: %w", err)
		}
	}
	if err := w.seal(); err != nil {
		return fmt.Errorf("confine the worker: %w", err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	w.ctx = ctx
	if err := w.assemble(device, mac, h); err != nil {
		return err
	}
	w.setRules(rules)
	ended := make(chan error, 1)
	// Owned by run, which waits for it; ends with ctx.
	go func() { ended <- w.fwd.Run(ctx) }()
	if err := w.ch.Send(msgReady, 0, nil); err != nil {
		return err
	}
	go w.watchLink("device", w.link)
	if w.in0 != nil {
		go w.watchLink("inbound device", w.in0)
	}

	in := w.receive()
	answer, err := w.messages(in, ended)
	cancel()
	if rerr := <-ended; err == nil {
		err = rerr
	}
	w.dns.Close()
	w.wg.Wait()
	w.closeFlowLog(in)
	if answer != nil {
		w.farewell(answer)
	}
	w.link.Close()
	if w.in0 != nil {
		w.in0.Close()
	}
	return err
}

// assemble makes the parts and joins them. Packets are read from its end on.
func (w *worker) assemble(device *tun.Device, mac []byte, h handed) error {
	c := &w.cfg
	var err error
	w.link, err = tun.NewEndpoint(device, tun.EndpointConfig{MTU: c.Device.MTU, LinkAddr: c.GatewayMAC, GuestAddr: mac})
	if err != nil {
		return fmt.Errorf("take over the device: %w", err)
	}
	var out io.Writer
	if h.flowLog != nil {
		out = h.flowLog
	}
	w.flows = newFlowLog(out, time.Now, w.log)
	w.flows.sink.max, w.flows.sink.want = c.FlowLogMax, w.wantFlowLog
	w.flows.resolvers = c.resolvers()
	w.flows.names, w.flows.policy = w.grantedNames, func() string { return w.rules.Load().Name() }
	go w.flows.run() // ends with flows.close
	w.table = nat.NewTable(nat.Config{OnEvent: w.flows.onEvent})
	w.marks, w.keepalive = memoryMarks(c.CgroupMemory), forwarder.DefaultKeepalive()
	for name, value := range c.Sysctls {
		if err := w.setTunable(name, value); err != nil {
			return err
		}
	}
	w.dial = newUpstreamDialer(c.Upstreams)
	w.names = newNames(c.Hosts, c.CallersHosts, c.Grants, w.log)
	w.dns, err = dns.New(dns.Config{
		Dialer: w.dial, Upstreams: c.Upstreams, Hosts: c.Hosts, Log: w.log,
		Rules: w.rules.Load, Names: toldGrants{names: w.names, tell: w.tellGrant}, Tell: w.flows.asked, OnlyGated: c.Inbound != nil,
	})
	if err != nil {
		return err
	}
	leases, err := w.dhcp()
	if err != nil {
		return err
	}
	fc := forwarder.Config{
		Link: w.link, MTU: uint32(c.Device.MTU),
		Guest: c.Guest, Gateway: c.Gateway, DNS: c.DNS, Prefix4: c.Prefix4, SelfConfigured: c.SelfConfigured,
		Table: w.table, Names: w.names, DNSHandler: w.dns, DHCPHandler: leases,
		RawICMP4: h.raw4, RawICMP6: h.raw6,
		Drop: w.link.NoteDrop, Refused: w.refused, Log: w.log,
	}
	fc.MemoryMarks, fc.MemoryPressure, fc.Keepalive = w.marks, collect(w.ctx), w.keepalive
	if c.GuestSockets {
		w.stock = newSocketStock(w.wantSocket)
		fc.Guests = w.stock
	}
	if w.inbound != nil {
		if w.in0, err = tun.NewEndpoint(w.inbound, tun.EndpointConfig{MTU: c.Inbound.MTU}); err != nil {
			return fmt.Errorf("take over the inbound device: %w", err)
		}
		// Who is told of the pod's addresses is told by its runtime.
		fc.Inbound, fc.OnlyHost, fc.DHCPHandler = w.in0, true, nil
		fc.Memory, fc.Asks = w.memory, w.dial.asks
	}
	if w.fwd, err = forwarder.New(fc); err != nil {
		return err
	}
	return nil
}

// dhcp answers guests that configure themselves.
func (w *worker) dhcp() (*dhcp.Server, error) {
	c := &w.cfg
	d := dhcp.Config{
		Guest4: c.Prefix4, Guest6: c.Prefix6, DNS: c.DNS,
		Search: c.Upstreams.Search, MTU: c.Device.MTU, GatewayMAC: c.GatewayMAC,
	}
	for _, g := range c.Gateway {
		if g.Is4() {
			d.Gateway4 = g
		}
	}
	if c.Prefix6.IsValid() {
		d.Gateway6 = forwarder.LinkLocal(w.link.LinkAddress())
	}
	return dhcp.New(d)
}

// refused takes a flow that policy refused down.
func (w *worker) refused(r forwarder.Refusal) {
	if r.Reason == nat.ReasonPolicy {
		w.hint.refused(w.cfg.Rules, r)
	}
	w.flows.refused(r)
}

// received is a message with its descriptors, or the error that ends the channel.
type received struct {
	m   message
	fds []int
	err error
}

// receive reads the monitor's messages.
func (w *worker) receive() <-chan received {
	in := make(chan received)
	// Ends with the channel or, as the process does right after, not at all.
	go func() {
		for {
			m, fds, err := w.ch.Receive()
			in <- received{m, fds, err}
			if err != nil {
				return
			}
		}
	}()
	return in
}

// messages serves the monitor until stop, the end of the channel, or that of
// the forwarder. With stop comes the connection to say farewell on.
func (w *worker) messages(in <-chan received, ended chan error) (answer *os.File, err error) {
	for {
		select {
		case err := <-ended:
			ended <- nil
			if err == nil {
				err = errors.New("the forwarder ended by itself")
			}
			return nil, err
		case r := <-in:
			switch {
			case errors.Is(r.err, io.EOF):
				return nil, nil // the monitor is gone
			case r.err != nil:
				return nil, r.err
			case r.m.Type == msgStop && len(r.fds) == 1:
				return os.NewFile(uintptr(r.fds[0]), "farewell"), nil
			}
			if r.m.Type == msgPing {
				closeAll(r.fds)
				w.wg.Go(func() { w.pong(r.m.Seq) })
				continue
			}
			err := w.message(r.m, r.fds)
			if r.m.Seq == 0 {
				if err != nil {
					w.log.Warn(fmt.Sprintf("%s: %v", r.m.Type, err))
				}
				continue
			}
			ack := message{Type: msgAck, Seq: r.m.Seq}
			if err != nil {
				ack.Error = err.Error()
			}
			if err := w.ch.send(ack, nil); err != nil {
				return nil, err
			}
		}
	}
}

// pong answers the monitor's question whether packets move, as soon as whoever moves them
// has had its turn. It is a goroutine of its own, since that may be never.
func (w *worker) pong(seq uint64) {
	select {
	case <-w.fwd.Responds():
		_ = w.ch.send(message{Type: msgAck, Seq: seq}, nil) // a monitor that does not read asks again
	case <-w.ctx.Done():
	}
}

// message handles one message and owns its descriptors.
func (w *worker) message(m message, fds []int) error {
	oneFD := func() (int, error) {
		if len(fds) != 1 {
			closeAll(fds)
			return -1, fmt.Errorf("came with %d descriptors, not 1", len(fds))
		}
		return fds[0], nil
	}
	switch m.Type {
	case msgPublish, msgUnpublish:
		var p publishMessage
		if err := json.Unmarshal(m.Body, &p); err != nil {
			closeAll(fds)
			return err
		}
		if m.Type == msgUnpublish {
			if w.fwd.Unpublish(protoNumber(p.Proto), p.Host) && w.takesLoopback(p) {
				w.stock.close(w.cfg.Guest)
			}
			return nil
		}
		fd, err := oneFD()
		if err != nil {
			return err
		}
		return w.publish(p, fd)
	case msgControl:
		fd, err := oneFD()
		if err != nil {
			return err
		}
		var c controlMessage
		if err := json.Unmarshal(m.Body, &c); err != nil {
			_ = unix.Close(fd)
			return err
		}
		w.accept(fd, c.Request)
		return nil
	case msgSocket:
		var s socketMessage
		if err := json.Unmarshal(m.Body, &s); err != nil || w.stock == nil || len(fds) > 1 {
			closeAll(fds)
			return err
		}
		w.stock.put(s.V6, fds)
		return nil
	case msgFlowLog:
		if len(fds) == 0 || !w.flows.logged {
			closeAll(fds)
			w.flows.sink.hand(nil)
			return nil
		}
		fd, err := oneFD()
		if err != nil {
			return err
		}
		w.flows.sink.hand(os.NewFile(uintptr(fd), "flow log"))
		return nil
	}
	closeAll(fds)
	switch m.Type {
	case msgRules:
		var r rulesMessage
		if err := json.Unmarshal(m.Body, &r); err != nil {
			return err
		}
		rules, err := r.compile()
		if err != nil {
			return err
		}
		w.setRules(rules)
		return nil
	case msgUpstreams:
		var u dns.Upstreams
		if err := json.Unmarshal(m.Body, &u); err != nil {
			return err
		}
		w.dial.allow(u)
		w.dns.SetUpstreams(u)
		return nil
	case msgSysctl:
		var p api.SysctlParams
		if err := json.Unmarshal(m.Body, &p); err != nil {
			return err
		}
		return w.setSysctl(p)
	}
	return fmt.Errorf("unknown message %q", m.Type)
}

// farewell tells the monitor what flows there were.
func (w *worker) farewell(f *os.File) {
	defer f.Close()
	var r api.FlowsResult
	r.Ended, r.Dropped = w.flows.ended()
	if err := api.WriteResult(f, r); err != nil {
		w.log.Warn("report the ended flows: " + err.Error())
	}
}
