package tcpflow

// The sandbox's side of a handshake.
//
// tcp.Forwarder needs a goroutine for each handshake; a listening endpoint of the
// stack's does not. Ours, one for each family, listen at no address: they are taken out
// of the demultiplexer, so that no segment reaches them but the SYNs that answer gives
// them, whatever their tuple. The endpoints that come of it are registered by their own
// tuples, and handed over when the sandbox has completed the handshake.

import (
	"fmt"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/ports"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/internal/tcpmem"
)

// acceptBacklog keeps the stack from answering with SYN cookies, which forget window
// scaling. MaxHandshakes is the bound that holds.
const acceptBacklog = 1 << 20

type acceptor struct {
	t     *Forwarder
	entry waiter.Entry
	task  engine.Task

	mu sync.Mutex // held while a listener is used
	// What a listener accepts has the listener's receive buffer: those of pressed have less.
	Plain, pressed listeners
}

// listeners accepts connections for one family each.
type listeners struct{ V4, v6 *tcp.Endpoint }

func newAcceptor(t *Forwarder) (*acceptor, error) {
	a := &acceptor{t: t}
	a.task.Run = a.accept
	a.entry.Init(a, waiter.ReadableEvents)
	for _, row := range []struct {
		to     **tcp.Endpoint
		proto  tcpip.NetworkProtocolNumber
		buffer int64
	}{
		{&a.Plain.V4, header.IPv4ProtocolNumber, tcpmem.ReceiveStart},
		{&a.Plain.v6, header.IPv6ProtocolNumber, tcpmem.ReceiveStart},
		{&a.pressed.V4, header.IPv4ProtocolNumber, tcpmem.ReceiveStartPressed},
		{&a.pressed.v6, header.IPv6ProtocolNumber, tcpmem.ReceiveStartPressed},
	} {
		l, err := a.listen(row.proto, row.buffer)
		if err != nil {
			a.close()
			return nil, err
		}
		*row.to = l
	}
	return a, nil
}

// listen makes a listener whose connections begin with a receive buffer of that size.
func (a *acceptor) listen(proto tcpip.NetworkProtocolNumber, buffer int64) (*tcp.Endpoint, error) {
	var wq waiter.Queue
	s := a.t.Stack
	e, terr := s.NewEndpoint(tcp.ProtocolNumber, proto, &wq)
	if terr != nil {
		return nil, fmt.Errorf("making an endpoint that accepts: %s", terr)
	}
	ep := e.(*tcp.Endpoint)
	opts := ep.SocketOptions()
	opts.SetV6Only(true)
	// Untold, so that windows are scaled for what the buffer may grow to.
	opts.SetReceiveBufferSize(buffer, false)
	// What is accepted reserves its tuple; that of an endpoint which is in TIME_WAIT
	// but out of the demultiplexer may be reserved again.
	opts.SetReuseAddress(true)
	opts.SetReusePort(true)
	if terr := ep.Listen(acceptBacklog); terr != nil {
		ep.Close()
		return nil, fmt.Errorf("listening in the stack: %s", terr)
	}
	s.UnregisterTransportEndpoint([]tcpip.NetworkProtocolNumber{proto}, tcp.ProtocolNumber,
		ep.TransportEndpointInfo.ID, ep, ports.Flags{LoadBalanced: true, TupleOnly: true}, 0)
	wq.EventRegister(&a.entry)
	return ep, nil
}

// offer makes the stack answer syn, if it is well-formed.
func (a *acceptor) offer(id stack.TransportEndpointID, syn *stack.PacketBuffer) {
	set := &a.Plain
	if a.t.Gate.Memory.Pressed.Load() {
		set = &a.pressed
	}
	l := set.v6
	if id.LocalAddress.Len() == header.IPv4AddressSize {
		l = set.V4
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	// As a user holds it, the stack leaves the SYN to us; see inline.go.
	l.LockUser()
	l.ResumeWork()
	a.t.queue.queue.QueuePacket(l, id, syn)
	netstack.HandleListen(l)
}

// NotifyEvent is called by the stack when a handshake is complete. It runs under the lock of the
// endpoint concerned, so it only queues.
func (a *acceptor) NotifyEvent(waiter.EventMask) { a.t.Engine.Put(&a.task) }

// accept is a task.
func (a *acceptor) accept() {
	for _, l := range a.All() {
		for {
			a.mu.Lock()
			ep, wq, terr := l.Accept(nil)
			a.mu.Unlock()
			if terr != nil { // there is none
				break
			}
			a.t.accepted(ep.(*tcp.Endpoint), wq)
		}
	}
}

func (a *acceptor) All() [4]*tcp.Endpoint {
	return [...]*tcp.Endpoint{a.Plain.V4, a.Plain.v6, a.pressed.V4, a.pressed.v6}
}

func (a *acceptor) close() {
	for _, l := range a.All() {
		if l != nil {
			l.Close()
		}
	}
}
