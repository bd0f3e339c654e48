package worker

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

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/forwarder/dhcp"
	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/confine"
	"sluice.dev/sluice/sandbox/internal/flowlog"
	"sluice.dev/sluice/tun"
)

// Worker is the process that parses packets. In the order of its life:
//
//	nearly everything is given up (package confine)
//	configuration and descriptors come in by the channel
//	the device is adopted
//	what system calls are left is filtered
//	the endpoint is made, the stack attached: the first packet is read here
//	rules are set: until now every flow was dropped
//	ready; then the monitor's messages, one at a time, until stop or the end
//	of the channel
type Worker struct {
	cfg   channel.WorkerConfig
	ch    *channel.Conn
	log   *slog.Logger
	seal  func() error
	link  *tun.Endpoint
	in0   *tun.Endpoint // nil except in an attachment
	Table *nat.Table
	fwd   *forwarder.Forwarder
	dns   *dns.Resolver
	names *policy.Names // granted by dns, read by fwd; outlives the rules
	rules atomic.Pointer[policy.Rules]
	dial  *upstreamDialer
	stock *socketStock
	flows *flowlog.FlowLog
	hint  flowlog.FlagHint

	inbound   *tun.Device           // for in0, until that is made
	memory    []byte                // for its flows; never unmapped
	Marks     forwarder.MemoryMarks // fwd is made with them
	keepalive forwarder.Keepalive   // fwd's, or what fwd is made with

	ctx     context.Context // for control connections; ends with the worker
	clients chan struct{}   // one token per control connection
	wg      sync.WaitGroup  // control connections

	// Owned by the message loop.
	limits  policy.Limits     // of the rules in force
	sysctls map[string]string // set by hand
}

// maxClients bounds the control connections that a worker serves at once.
const maxClients = 64

// WorkerMain is the worker process's main function. It returns the exit status.
func WorkerMain() int {
	log := slog.New(&JournalHandler{W: os.Stderr})
	if err := runWorker(log); err != nil {
		log.Error("sluice: worker: " + err.Error())
		return 1
	}
	return 0
}

func runWorker(log *slog.Logger) error {
	// As early as possible; the flag of clone covers the time before.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("ask for the parent-death signal: %w", err)
	}
	seal, err := confine.Enter(confine.Config{KeepFDs: []int{0, 1, 2, channel.WorkerChannelFD}})
	if err != nil {
		return fmt.Errorf("confine the worker: %w", err)
	}
	unix.CloseOnExec(channel.WorkerChannelFD)
	ch := channel.New(os.NewFile(channel.WorkerChannelFD, "channel"), true)
	m, fds, err := ch.Receive()
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("receive the configuration: %w", err)
	}
	if m.Type != channel.MsgConfig {
		return fmt.Errorf("the first message is %q, not the configuration: this command is for sluice itself", m.Type)
	}
	w := &Worker{ch: ch, log: log, seal: seal, hint: flowlog.FlagHint{Warn: func(s string) { log.Warn(s) }}, clients: make(chan struct{}, maxClients), sysctls: make(map[string]string)}
	if err := json.Unmarshal(m.Body, &w.cfg); err != nil {
		return fmt.Errorf("decode the configuration: %w", err)
	}
	return w.run(fds)
}

func (w *Worker) run(fds []int) error {
	h, err := w.cfg.Sort(fds)
	if err != nil {
		return err
	}
	if w.cfg.CgroupMemory > 0 {
		debug.SetMemoryLimit(w.cfg.CgroupMemory / 10 * 9)
	}
	rules, err := w.cfg.Rules.Compile()
	if err != nil {
		return fmt.Errorf("compile the policy: %w", err)
	}
	device, err := tun.Adopt(h.Device, w.cfg.Device)
	if err != nil {
		return fmt.Errorf("adopt the device: %w", err)
	}
	mac, err := device.HardwareAddr()
	if err != nil {
		return err
	}
	if w.cfg.Inbound != nil {
		if w.inbound, err = tun.Adopt(h.Inbound, *w.cfg.Inbound); err != nil {
			return fmt.Errorf("adopt the inbound device: %w", err)
		}
		if w.memory, err = mapMemory(h.Memory); err != nil {
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
	if err := w.ch.Send(channel.MsgReady, 0, nil); err != nil {
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

// assemble makes the parts and connects them. From its end on, packets are read.
func (w *Worker) assemble(device *tun.Device, mac []byte, h channel.Handed) error {
	c := &w.cfg
	var err error
	w.link, err = tun.NewEndpoint(device, tun.EndpointConfig{MTU: c.Device.MTU, LinkAddr: c.GatewayMAC, GuestAddr: mac})
	if err != nil {
		return fmt.Errorf("take over the device: %w", err)
	}
	var out io.Writer
	if h.FlowLog != nil {
		out = h.FlowLog
	}
	w.flows = flowlog.NewFlowLog(out, time.Now, w.log)
	w.flows.Sink.Max, w.flows.Sink.Want = c.FlowLogMax, w.wantFlowLog
	w.flows.Resolvers = c.Resolvers()
	w.flows.Names, w.flows.Policy = w.grantedNames, func() string { return w.rules.Load().Name() }
	go w.flows.Run() // ends with flows.Close
	w.Table = nat.NewTable(nat.Config{OnEvent: w.flows.OnEvent})
	w.Marks, w.keepalive = MemoryMarks(c.CgroupMemory), forwarder.DefaultKeepalive()
	for name, value := range c.Sysctls {
		if err := w.SetTunable(name, value); err != nil {
			return err
		}
	}
	w.dial = NewUpstreamDialer(c.Upstreams)
	w.names = NewNames(c.Hosts, c.CallersHosts, c.Grants, w.log)
	w.dns, err = dns.New(dns.Config{
		Dialer: w.dial, Upstreams: c.Upstreams, Hosts: c.Hosts, Log: w.log,
		Rules: w.rules.Load, Names: ToldGrants{Names: w.names, Tell: w.tellGrant}, Tell: w.flows.Asked, OnlyGated: c.Inbound != nil,
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
		Table: w.Table, Names: w.names, DNSHandler: w.dns, DHCPHandler: leases,
		RawICMP4: h.Raw4, RawICMP6: h.Raw6,
		Drop: w.link.NoteDrop, Refused: w.refused, Log: w.log,
	}
	fc.MemoryMarks, fc.MemoryPressure, fc.Keepalive = w.Marks, collect(w.ctx), w.keepalive
	if c.GuestSockets {
		w.stock = NewSocketStock(w.wantSocket)
		fc.Guests = w.stock
	}
	if w.inbound != nil {
		if w.in0, err = tun.NewEndpoint(w.inbound, tun.EndpointConfig{MTU: c.Inbound.MTU}); err != nil {
			return fmt.Errorf("take over the inbound device: %w", err)
		}
		// The pod's runtime tells everyone who has to know the pod's addresses.
		fc.Inbound, fc.OnlyHost, fc.DHCPHandler = w.in0, true, nil
		fc.Memory, fc.Asks = w.memory, w.dial.asks
	}
	if w.fwd, err = forwarder.New(fc); err != nil {
		return err
	}
	return nil
}

// dhcp returns the DHCP server for guests that configure themselves.
func (w *Worker) dhcp() (*dhcp.Server, error) {
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

// refused records a flow that policy refused.
func (w *Worker) refused(r forwarder.Refusal) {
	if r.Reason == nat.ReasonPolicy {
		w.hint.Refused(w.cfg.Rules, r)
	}
	w.flows.Refused(r)
}

// received is a message with its descriptors, or the error that ends the channel.
type received struct {
	m   channel.Message
	fds []int
	err error
}

// receive reads the monitor's messages.
func (w *Worker) receive() <-chan received {
	in := make(chan received)
	// Ends with the channel, or not at all if the process ends first.
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

// messages serves the monitor until stop, until the channel ends, or until the forwarder does. The
// stop message brings the connection for the farewell.
func (w *Worker) messages(in <-chan received, ended chan error) (answer *os.File, err error) {
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
			case r.m.Type == channel.MsgStop && len(r.fds) == 1:
				return os.NewFile(uintptr(r.fds[0]), "farewell"), nil
			}
			if r.m.Type == channel.MsgPing {
				channel.CloseAll(r.fds)
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
			ack := channel.Message{Type: channel.MsgAck, Seq: r.m.Seq}
			if err != nil {
				ack.Error = err.Error()
			}
			if err := w.ch.SendMessage(ack, nil); err != nil {
				return nil, err
			}
		}
	}
}

// pong answers the monitor's ping once the goroutine that moves packets has had its turn. It runs
// in a goroutine of its own, since that may never happen.
func (w *Worker) pong(seq uint64) {
	select {
	case <-w.fwd.Responds():
		_ = w.ch.SendMessage(channel.Message{Type: channel.MsgAck, Seq: seq}, nil) // a monitor that does not read asks again
	case <-w.ctx.Done():
	}
}

// message handles one message and takes ownership of its descriptors.
func (w *Worker) message(m channel.Message, fds []int) error {
	oneFD := func() (int, error) {
		if len(fds) != 1 {
			channel.CloseAll(fds)
			return -1, fmt.Errorf("came with %d descriptors, not 1", len(fds))
		}
		return fds[0], nil
	}
	switch m.Type {
	case channel.MsgPublish, channel.MsgUnpublish:
		var p channel.PublishMessage
		if err := json.Unmarshal(m.Body, &p); err != nil {
			channel.CloseAll(fds)
			return err
		}
		if m.Type == channel.MsgUnpublish {
			if w.fwd.Unpublish(protoNumber(p.Proto), p.Host) && w.takesLoopback(p) {
				w.stock.Close(w.cfg.Guest)
			}
			return nil
		}
		fd, err := oneFD()
		if err != nil {
			return err
		}
		return w.publish(p, fd)
	case channel.MsgControl:
		fd, err := oneFD()
		if err != nil {
			return err
		}
		var c channel.ControlMessage
		if err := json.Unmarshal(m.Body, &c); err != nil {
			_ = unix.Close(fd)
			return err
		}
		w.accept(fd, c.Request)
		return nil
	case channel.MsgSocket:
		var s channel.SocketMessage
		if err := json.Unmarshal(m.Body, &s); err != nil || w.stock == nil || len(fds) > 1 {
			channel.CloseAll(fds)
			return err
		}
		w.stock.Put(s.V6, fds)
		return nil
	case channel.MsgFlowLog:
		if len(fds) == 0 || !w.flows.Logged {
			channel.CloseAll(fds)
			w.flows.Sink.Hand(nil)
			return nil
		}
		fd, err := oneFD()
		if err != nil {
			return err
		}
		w.flows.Sink.Hand(os.NewFile(uintptr(fd), "flow log"))
		return nil
	}
	channel.CloseAll(fds)
	switch m.Type {
	case channel.MsgRules:
		var r channel.RulesMessage
		if err := json.Unmarshal(m.Body, &r); err != nil {
			return err
		}
		rules, err := r.Compile()
		if err != nil {
			return err
		}
		w.setRules(rules)
		return nil
	case channel.MsgUpstreams:
		var u dns.Upstreams
		if err := json.Unmarshal(m.Body, &u); err != nil {
			return err
		}
		w.dial.Allow(u)
		w.dns.SetUpstreams(u)
		return nil
	case channel.MsgSysctl:
		var p api.SysctlParams
		if err := json.Unmarshal(m.Body, &p); err != nil {
			return err
		}
		return w.setSysctl(p)
	}
	return fmt.Errorf("unknown message %q", m.Type)
}

// farewell sends the monitor the flows that ended.
func (w *Worker) farewell(f *os.File) {
	defer f.Close()
	var r api.FlowsResult
	r.Ended, r.Dropped = w.flows.Ended()
	if err := api.WriteResult(f, r); err != nil {
		w.log.Warn("report the ended flows: " + err.Error())
	}
}
