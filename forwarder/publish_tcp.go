package forwarder

// Connections that clients of published ports make to the sandbox's own address, through the
// stack.
//
// A flow is known by what its client knows: its own address and port, and those of the
// host that it came to. Several of the latter may lead to one port inside, so the port
// that the client has inside is another one when its own is taken there.

import (
	"errors"
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
		t.inwardLimited.Add(1)
		fl.abort(err.Error())
		return
	}
	fl.lease.SetState(nat.SynSent)
	for port := range sourcePorts(c.from.Port()) {
		switch err := fl.connectGuest(port); err {
		case nil:
			return
		case errPortTaken:
		default:
			fl.abort(err.Error())
			return
		}
	}
	fl.abort(errPortTaken.Error())
}

// refusedInside tries the next way for a client that the sandbox has refused.
func (fl *tcpFlow) refusedInside(ep tcpip.Endpoint) {
	const reason = "refused_by_sandbox"
	_, refused := ep.LastError().(*tcpip.ErrConnectionRefused)
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

// errPortTaken says that another flow has the port under which a client was to appear.
var errPortTaken = errors.New("no port for the client inside")

// indexCaller is index for a flow that is to appear under port.
func (t *tcpForwarder) indexCaller(fl *tcpFlow, port uint16) error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return errStopped
	}
	id := fl.id
	if id.LocalPort = port; t.flows[id] != nil {
		t.mu.Unlock()
		return errPortTaken
	}
	fl.id.LocalPort = port
	t.flows[id] = fl
	t.mu.Unlock()
	if !t.indexed(fl) {
		return errFlowEnded
	}
	return nil
}

// connectGuest starts the connection inside the stack, from the client's address and port;
// settle learns how it ends. After errPortTaken another port may be tried.
func (fl *tcpFlow) connectGuest(port uint16) error {
	if err := fl.t.indexCaller(fl, port); err != nil {
		return err
	}
	ep, err := fl.guestEndpoint()
	if err != nil {
		fl.t.unindex(fl)
		return err
	}
	fl.mu.Lock()
	if fl.phase != phaseHandshake {
		fl.mu.Unlock()
		ep.Close()
		return errFlowEnded
	}
	fl.ep = ep
	fl.wq.EventRegister(&fl.entry)
	fl.mu.Unlock()
	fl.connecting.Store(true)
	guest := tcpip.FullAddress{NIC: nicID, Addr: fl.id.RemoteAddress, Port: fl.id.RemotePort}
	switch terr := ep.Connect(guest).(type) {
	case nil, *tcpip.ErrConnectStarted:
		fl.lease.SetReply(nat.NewTuple(unix.IPPROTO_TCP, netip.AddrPortFrom(netipAddr(guest.Addr), guest.Port),
			netip.AddrPortFrom(netipAddr(fl.id.LocalAddress), port)))
		return nil
	case *tcpip.ErrBadLocalAddress, *tcpip.ErrPortInUse:
		// The stack has the tuple, of a flow that is over for us.
		fl.dropGuest(ep)
		return errPortTaken
	default:
		fl.dropGuest(ep)
		return errors.New(terr.String())
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
func (fl *tcpFlow) guestEndpoint() (tcpip.Endpoint, error) {
	ep, terr := fl.t.stack.NewEndpoint(tcp.ProtocolNumber, netProto(netipAddr(fl.id.RemoteAddress)), fl.wq)
	if terr != nil {
		return nil, errors.New(terr.String())
	}
	opts := ep.SocketOptions()
	opts.SetReuseAddress(true)
	fl.t.dialer.probeInside(ep)
	if fl.t.gate.memory.pressed.Load() {
		opts.SetReceiveBufferSize(receiveStartPressed, false)
	}
	terr = ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: fl.id.LocalAddress, Port: fl.id.LocalPort})
	if terr == nil {
		return ep, nil
	}
	ep.Close()
	if _, taken := terr.(*tcpip.ErrPortInUse); taken {
		return nil, errPortTaken
	}
	return nil, errors.New(terr.String())
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
