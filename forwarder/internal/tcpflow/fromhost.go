package tcpflow

// Connections that clients of published ports make to the sandbox's own address, through the
// stack.
//
// A flow is identified as its client sees it: by the client's address and port, and those of the
// host that it connected to. Several of the latter may lead to one port inside, so if the client's
// port is taken there, it gets another one inside.

import (
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpmem"
	"sluice.dev/sluice/nat"
)

// Caller is the client of a published port.
type Caller struct {
	From netip.AddrPort
	Host netip.AddrPort // what it connected to
	// Next tries another way if the sandbox refuses the connection; nil if there is none.
	Next func(fd int)
}

// Tuple returns the connection's tuple as the client knows it.
func (c *Caller) Tuple() nat.Tuple { return nat.NewTuple(unix.IPPROTO_TCP, c.From, c.Host) }

// FromHost makes the connection of c on the sandbox's link. It owns fd.
func (t *Forwarder) FromHost(fd int, c Caller, j admit.Judged) {
	guest := j.Query.Dst
	client := t.Onlink.ClientInside(c.From.Addr(), guest.Addr())
	if !client.IsValid() {
		t.noAddress.Add(1)
		t.Dialer.Reset(fd)
		return
	}
	fl := &Flow{
		T: t, number: t.numbers.Add(1), ingress: true, Phase: phaseHandshake,
		id: stack.TransportEndpointID{LocalAddress: packet.StackAddr(client), RemoteAddress: packet.StackAddr(guest.Addr()), RemotePort: guest.Port()},
	}
	fl.FD, fl.caller, fl.wq = fd, &c, new(waiter.Queue)
	fl.prepare()
	if err := t.Gate.EnterAnew(&fl.Pass, fl, j, admit.Entry{Orig: c.Tuple(), Memory: &fl.mem.Shares, Pending: fl.pending}); err != nil {
		t.Gate.NoteLimit(t.inwardLimited, j, err)
		fl.Abort(nat.ReasonStopped) // it was never in the table, which gives it no record
		return
	}
	fl.Lease.SetState(nat.SynSent)
	for port := range onlink.SourcePorts(c.From.Port()) {
		switch abort := fl.connectGuest(port); abort {
		case "":
			return
		case nat.ErrNoPort:
		default:
			fl.Abort(abort)
			return
		}
	}
	fl.Abort(nat.ErrNoPort)
}

// refusedInside tries the next way for a client that the sandbox refused.
func (fl *Flow) refusedInside(ep tcpip.Endpoint) {
	reason := nat.ReasonRefusedBySandbox
	_, refused := ep.LastError().(*tcpip.ErrConnectionRefused)
	if !refused && lostSandbox(ep) == nat.ReasonSandboxTimeout {
		reason = nat.ReasonSandboxTimeout
	}
	if !refused || fl.caller.Next == nil {
		fl.Abort(reason)
		return
	}
	fl.Mu.Lock()
	fd := fl.FD
	if fl.Phase != phaseHandshake {
		fd = -1 // whoever ended the flow has closed it
	} else {
		fl.FD = -1
	}
	fl.Mu.Unlock()
	fl.Abort(reason)
	if fd >= 0 {
		fl.caller.Next(fd)
	}
}

// indexCaller is index for a flow that is to appear under port.
func (t *Forwarder) indexCaller(fl *Flow, port uint16) (abort nat.Reason) {
	t.Mu.Lock()
	if t.closed {
		t.Mu.Unlock()
		return nat.ReasonStopped
	}
	id := fl.id
	if id.LocalPort = port; t.Flows[id] != nil {
		t.Mu.Unlock()
		return nat.ErrNoPort
	}
	fl.id.LocalPort = port
	t.Flows[id] = fl
	t.Mu.Unlock()
	if !t.indexed(fl) {
		return nat.ReasonStopped // the table has ended it, and knows why
	}
	return ""
}

// connectGuest starts the connection inside the stack, from the client's address and port; settle
// learns how it ends. After nat.ErrNoPort the caller may try another port.
func (fl *Flow) connectGuest(port uint16) (abort nat.Reason) {
	if abort := fl.T.indexCaller(fl, port); abort != "" {
		return abort
	}
	ep, abort := fl.guestEndpoint()
	if abort != "" {
		fl.T.unindex(fl)
		return abort
	}
	fl.Mu.Lock()
	if fl.Phase != phaseHandshake {
		fl.Mu.Unlock()
		ep.Close()
		return nat.ReasonStopped // whoever ended it has told the table why
	}
	fl.Ep = ep
	fl.wq.EventRegister(&fl.entry)
	fl.Mu.Unlock()
	fl.connecting.Store(true)
	guest := tcpip.FullAddress{NIC: packet.NICID, Addr: fl.id.RemoteAddress, Port: fl.id.RemotePort}
	switch ep.Connect(guest).(type) {
	case nil, *tcpip.ErrConnectStarted:
		fl.Lease.SetReply(nat.NewTuple(unix.IPPROTO_TCP, netip.AddrPortFrom(packet.NetipAddr(guest.Addr), guest.Port),
			netip.AddrPortFrom(packet.NetipAddr(fl.id.LocalAddress), port)))
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
func (fl *Flow) dropGuest(ep tcpip.Endpoint) {
	fl.Mu.Lock()
	mine := fl.Ep == ep && fl.Phase == phaseHandshake
	if mine {
		fl.Ep = nil
	}
	fl.Mu.Unlock()
	if !mine {
		return // abort has closed it
	}
	fl.connecting.Store(false)
	fl.wq.EventUnregister(&fl.entry)
	ep.Close()
	fl.T.unindex(fl)
}

// guestEndpoint makes the endpoint of connectGuest, bound to the client's address and port.
func (fl *Flow) guestEndpoint() (ep tcpip.Endpoint, abort nat.Reason) {
	ep, terr := fl.T.Stack.NewEndpoint(tcp.ProtocolNumber, packet.NetProto(packet.NetipAddr(fl.id.RemoteAddress)), fl.wq)
	if terr != nil {
		return nil, nat.ReasonNoSocket
	}
	opts := ep.SocketOptions()
	opts.SetReuseAddress(true)
	fl.T.Dialer.ProbeInside(ep)
	if fl.T.Gate.Memory.Pressed.Load() {
		opts.SetReceiveBufferSize(tcpmem.ReceiveStartPressed, false)
	}
	terr = ep.Bind(tcpip.FullAddress{NIC: packet.NICID, Addr: fl.id.LocalAddress, Port: fl.id.LocalPort})
	if terr == nil {
		return ep, ""
	}
	ep.Close()
	if _, taken := terr.(*tcpip.ErrPortInUse); taken {
		return nil, nat.ErrNoPort
	}
	return nil, nat.ReasonNoSocket
}
