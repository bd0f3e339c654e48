package forwarder

// Connections that clients of published ports make to the sandbox's own address, through the
// stack.
//
// A flow is known by what its client knows: its own address and port, and those of the
// host that it came to. Several of the latter may lead to one port inside, so the port
// that the client has inside is another one when its own is taken there.

import (
	"iter"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"sluice/nat"
)

// caller is the client of a published port.
type caller struct {
	from netip.AddrPort
	host netip.AddrPort // what it connected to
	// next takes the connection, if the sandbox refuses it, by another way; nil if there is none.
	next func(fd int)
}

// tuple is the connection as the client knows it.
func (c *caller) tuple() nat.Tuple { return nat.NewTuple(unix.IPPROTO_TCP, c.from, c.host) }

// fromHost makes the connection of c on the sandbox's link. It owns fd.
func (t *tcpForwarder) fromHost(fd int, c caller, j judged) {
	guest := j.query.Dst
	client := t.onlink.clientInside(c.from.Addr(), guest.Addr())
	if !client.IsValid() {
		t.noAddress.Add(1)
		t.dialer.reset(fd)
		return
	}
	fl := &tcpFlow{
		t: t, number: t.numbers.Add(1), fd: fd, ingress: true, caller: &c, phase: phaseHandshake, wq: new(waiter.Queue),
		id: stack.TransportEndpointID{LocalAddress: tcpipAddr(client), RemoteAddress: tcpipAddr(guest.Addr()), RemotePort: guest.Port()},
	}
	fl.prepare()
	if err := t.gate.enterAnew(&fl.pass, fl, j, entry{orig: c.tuple(), memory: &fl.mem.shares, pending: fl.pending}); err != nil {
		t.gate.noteLimit(t.inwardLimited, j, err)
		fl.abort(nat.ReasonStopped) // it was never in the table, which gives it no record
		return
	}
	fl.lease.SetState(nat.SynSent)
	for port := range sourcePorts(c.from.Port()) {
		switch abort := fl.connectGuest(port); abort {
		case "":
			return
		case nat.ErrNoPort:
		default:
			fl.abort(abort)
			return
		}
	}
	fl.abort(nat.ErrNoPort)
}

// refusedInside tries the next way for a client that the sandbox has refused.
func (fl *tcpFlow) refusedInside(ep tcpip.Endpoint) {
	reason := nat.ReasonRefusedBySandbox
	_, refused := ep.LastError().(*tcpip.ErrConnectionRefused)
	if !refused && lostSandbox(ep) == nat.ReasonSandboxTimeout {
		reason = nat.ReasonSandboxTimeout
	}
	if !refused || fl.caller.next == nil {
		fl.abort(reason)
		return
	}
	fl.mu.Lock()
	fd := fl.fd
	if fl.phase != phaseHandshake {
		fd = -1 // whoever ended the flow has closed it
	} else {
		fl.fd = -1
	}
	fl.mu.Unlock()
	fl.abort(reason)
	if fd >= 0 {
		fl.caller.next(fd)
	}
}

// indexCaller is index for a flow that is to appear under port.
func (t *tcpForwarder) indexCaller(fl *tcpFlow, port uint16) (abort nat.Reason) {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nat.ReasonStopped
	}
	id := fl.id
	if id.LocalPort = port; t.flows[id] != nil {
		t.mu.Unlock()
		return nat.ErrNoPort
	}
	fl.id.LocalPort = port
	t.flows[id] = fl
	t.mu.Unlock()
	if !t.indexed(fl) {
		return nat.ReasonStopped // the table has ended it, and knows why
	}
	return ""
}

// connectGuest starts the connection inside the stack, from the client's address and port;
// settle learns how it ends. After nat.ErrNoPort another port may be tried.
func (fl *tcpFlow) connectGuest(port uint16) (abort nat.Reason) {
	if abort := fl.t.indexCaller(fl, port); abort != "" {
		return abort
	}
	ep, abort := fl.guestEndpoint()
	if abort != "" {
		fl.t.unindex(fl)
		return abort
	}
	fl.mu.Lock()
	if fl.phase != phaseHandshake {
		fl.mu.Unlock()
		ep.Close()
		return nat.ReasonStopped // whoever ended it has told the table why
	}
	fl.ep = ep
	fl.wq.EventRegister(&fl.entry)
	fl.mu.Unlock()
	fl.connecting.Store(true)
	guest := tcpip.FullAddress{NIC: nicID, Addr: fl.id.RemoteAddress, Port: fl.id.RemotePort}
	switch ep.Connect(guest).(type) {
	case nil, *tcpip.ErrConnectStarted:
		fl.lease.SetReply(nat.NewTuple(unix.IPPROTO_TCP, netip.AddrPortFrom(netipAddr(guest.Addr), guest.Port),
			netip.AddrPortFrom(netipAddr(fl.id.LocalAddress), port)))
		return ""
	case *tcpip.ErrBadLocalAddress, *tcpip.ErrPortInUse:
		// The stack has the tuple, of a flow that is over for us.
		fl.dropGuest(ep)
		return nat.ErrNoPort
	default:
		fl.dropGuest(ep)
		return nat.ReasonNoSocket
	}
}

// dropGuest undoes an attempt of connectGuest.
func (fl *tcpFlow) dropGuest(ep tcpip.Endpoint) {
	fl.mu.Lock()
	mine := fl.ep == ep && fl.phase == phaseHandshake
	if mine {
		fl.ep = nil
	}
	fl.mu.Unlock()
	if !mine {
		return // abort has closed it
	}
	fl.connecting.Store(false)
	fl.wq.EventUnregister(&fl.entry)
	ep.Close()
	fl.t.unindex(fl)
}

// guestEndpoint makes the endpoint of connectGuest, bound to the client's address and port.
func (fl *tcpFlow) guestEndpoint() (ep tcpip.Endpoint, abort nat.Reason) {
	ep, terr := fl.t.stack.NewEndpoint(tcp.ProtocolNumber, netProto(netipAddr(fl.id.RemoteAddress)), fl.wq)
	if terr != nil {
		return nil, nat.ReasonNoSocket
	}
	opts := ep.SocketOptions()
	opts.SetReuseAddress(true)
	fl.t.dialer.probeInside(ep)
	if fl.t.gate.memory.pressed.Load() {
		opts.SetReceiveBufferSize(receiveStartPressed, false)
	}
	terr = ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: fl.id.LocalAddress, Port: fl.id.LocalPort})
	if terr == nil {
		return ep, ""
	}
	ep.Close()
	if _, taken := terr.(*tcpip.ErrPortInUse); taken {
		return nil, nat.ErrNoPort
	}
	return nil, nat.ReasonNoSocket
}

// sourceTries bounds the search for a port under which a client appears inside.
const sourceTries = 64

// sourcePorts yields the ports under which a client that has port may appear inside, its
// own first. The others are of the same kind, as nf_nat_core.c chooses them, because
// servers trust ports below 1024 as root's.
func sourcePorts(port uint16) iter.Seq[uint16] {
	low, high := 1024, 65535
	switch {
	case port < 512:
		low, high = 1, 511
	case port < 1024:
		low, high = 600, 1023
	}
	const step = 7919 // a prime that divides no range's size: each port comes once
	return func(yield func(uint16) bool) {
		if port != 0 && !yield(port) {
			return
		}
		for i := 1; i < sourceTries; i++ {
			if !yield(uint16(low + (int(port)+i*step)%(high-low+1))) {
				return
			}
		}
	}
}
