package forwarder

// Clients of published TCP ports: from the accepted connection to one in the sandbox.
//
// A flow is known by what its client knows: its own address and port, and those of the
// host that it came to. Several of the latter may lead to one port inside, so the port
// that the client has inside is another one when its own is taken there.
//
// The host's kernel accepts before anybody here knows whether the sandbox listens. A port
// published on both families must not look open on one of them because of that: a client
// that asks for localhost tries the second only if the first refuses. So a connection that
// the sandbox refuses at one of its addresses is made to the next: on its loopback of the
// client's family and of the other, on its link of the client's family and of the other.
// If all refuse, it is reset at once.

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
	"sluice/policy"
)

// caller is who an accepted connection is of.
type caller struct {
	from netip.AddrPort
	host netip.AddrPort // what it was made to
	ways []way          // not tried yet
}

// way is one by which a client may find a server inside.
type way struct {
	guest    netip.AddrPort
	loopback bool // from the sandbox's loopback, of guest's family
}

// ways are in the order in which a client takes them.
func (l *Listener) ways(client netip.AddrPort) []way {
	ways := make([]way, 0, 4)
	for _, loopback := range []bool{true, false} {
		if loopback && !client.Addr().IsLoopback() {
			continue
		}
		for _, guest := range []netip.AddrPort{l.Guest, l.Other} {
			if guest.IsValid() {
				ways = append(ways, way{guest, loopback})
			}
		}
	}
	return ways
}

// tuple is the connection as the client knows it.
func (c *caller) tuple() nat.Tuple { return nat.NewTuple(unix.IPPROTO_TCP, c.from, c.host) }

// localAddr is the host's end of an accepted connection; listener where the kernel does not tell.
func localAddr(fd int, listener netip.AddrPort) netip.AddrPort {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return listener
	}
	return addrPort(sa)
}

// ingress carries an accepted connection into the sandbox. It owns fd.
func (t *tcpForwarder) ingress(fd int, c caller) {
	if err := t.dialer.tuneStream(fd); err != nil {
		t.dialer.reset(fd)
		return
	}
	t.tryNext(fd, c)
}

// tryNext goes the next of c's ways. It owns fd.
func (t *tcpForwarder) tryNext(fd int, c caller) {
	for len(c.ways) > 0 {
		w := c.ways[0]
		c.ways = c.ways[1:]
		j := t.gate.decide(policy.Query{Ingress: true, Proto: unix.IPPROTO_TCP, Src: c.from, Dst: w.guest})
		if !j.mayBegin() {
			t.inward.refused.Add(1)
			t.gate.refuse(j)
			break
		}
		if !w.loopback {
			t.ingressThroughStack(fd, c, j)
			return
		}
		if t.relayLoopback(fd, c, j) {
			return
		}
	}
	t.dialer.reset(fd)
}

// ingressThroughStack makes the connection on the sandbox's link. It owns fd.
func (t *tcpForwarder) ingressThroughStack(fd int, c caller, j judged) {
	guest := j.query.Dst
	client := t.onlink.clientInside(c.from.Addr(), guest.Addr())
	if !client.IsValid() {
		t.inward.failed.Add(1)
		t.dialer.reset(fd)
		return
	}
	fl := &tcpFlow{
		t: t, number: t.numbers.Add(1), fd: fd, ingress: true, caller: &c, phase: phaseHandshake, wq: new(waiter.Queue),
		id: stack.TransportEndpointID{LocalAddress: tcpipAddr(client), RemoteAddress: tcpipAddr(guest.Addr()), RemotePort: guest.Port()},
	}
	fl.prepare()
	if err := t.enterCaller(&fl.pass, fl, c, j, &fl.mem.shares); err != nil {
		fl.abort(err.Error())
		return
	}
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

// carrier is a flow that holds bytes of a stream.
type carrier interface {
	admitted
	pending() bool // nat.Spec.Pending
}

// refusedInside tries the next way for a client that the sandbox has refused.
func (fl *tcpFlow) refusedInside(ep tcpip.Endpoint) {
	const reason = "refused_by_sandbox"
	_, refused := ep.LastError().(*tcpip.ErrConnectionRefused)
	if !refused || len(fl.caller.ways) == 0 {
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
		fl.t.tryNext(fd, *fl.caller)
	}
}

// enterCaller has the flow of c enter.
func (t *tcpForwarder) enterCaller(p *pass, fl carrier, c caller, j judged, mem *shares) error {
	e := entry{orig: c.tuple(), memory: mem, pending: fl.pending}
	err := t.gate.enter(p, fl, j, e)
	if errors.Is(err, nat.ErrExists) && t.supersede(e.orig) {
		err = t.gate.enter(p, fl, j, e)
	}
	if err != nil {
		t.inward.limited.Add(1)
		return err
	}
	p.lease.SetState(nat.SynSent)
	return nil
}

// supersede ends the flow whose client has begun another one by the same ports, as the
// host's kernel allows only when the connection before is over: the client has reset it,
// and the poller has not come to that yet. A flow that is closing still has bytes to
// deliver, and stays.
func (t *tcpForwarder) supersede(tuple nat.Tuple) bool {
	l := t.gate.table.Lookup(tuple)
	if l == nil {
		return true
	}
	if p, ok := l.Owner().(*pass); ok {
		if fl, ok := p.flow.(*tcpFlow); ok && fl.in(phaseClosing) {
			return false
		}
	}
	return l.Kill("replaced")
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
	fl.t.dialer.keepalive.Load().probeInside(ep)
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
