package tcpflow

// One TCP flow: its two sides, its phases, and its end.
//
//	phase          stack side            host side             who may act
//	dialing        a held SYN            connect(2) under way  poller, cancel
//	handshake      SYN/ACK sent          connected             the acceptor
//	open           an endpoint           connected             the pumps (splice.go)
//	closing        closed, not acked     closed                nobody: waits for the stack (tail.go)
//	resetting      bytes not acked       reset                 likewise
//	closed         gone                  gone                  nobody
//
// Locks: the pumps hold up.mu and down.mu while they run; code that needs both takes them in that
// order. mu guards the fields below it, and under it only the forwarder's mu may be taken. A waiter
// callback takes none of them, because it runs under the endpoint's own lock.

import (
	"container/list"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/ports"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/gate"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpmem"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

type Phase uint8

const (
	phaseDialing Phase = iota
	phaseHandshake
	PhaseOpen
	PhaseClosing
	PhaseClosed
	PhaseVerifying // verify.go
	phaseRefused   // likewise
	phaseResetting
)

// Flow is one connection. Its parts have one job each.
type Flow struct {
	admit.Pass
	T       *Forwarder
	number  uint64                    // unique to this flow
	id      stack.TransportEndpointID // Remote is the sandbox
	ingress bool                      // dialled by a client of a published port
	local   bool                      // served by ourselves: DNS over TCP

	beginning
	pumps
	batching
	inside
	outside
	judging
	mem tcpmem.Flow

	Mu    sync.Mutex
	Phase Phase
}

// beginning is the dial and the handshake.
type beginning struct {
	hops   packet.Meta // for the dial; ttl 0: the host's default
	caller *Caller     // the client of a published port
	Irs    uint32      // written before the handshake, under t.mu once indexed
	kept   keptSYN     // again.go

	halfOpen, Dialing *list.Element // guarded by t.mu
	firstSYN, lastSYN time.Time     // likewise
	deadline          time.Time     // of the handshake; set before halfOpen

	Syn             *stack.PacketBuffer // while dialing; guarded by the flow's mu
	resetOnComplete bool                // likewise
}

// pumps are the two directions.
type pumps struct {
	UpTask   engine.Task
	DownTask engine.Task
	Up       pump        // stack → host
	Down     pump        // host → stack
	reader   hostReader  // of the down pump, kept here so that a write allocates nothing
	Live     atomic.Bool // both sides are connected: the pumps may run
}

// batching is the device's reader, while it processes the endpoint (inline.go).
type batching struct {
	inBatch bool          // among inlineTCP.flows; guarded by its mu
	inlined atomic.Bool   // the reader processes the endpoint
	wanted  atomic.Uint32 // and has this to do then
}

// inside is the stack's side.
type inside struct {
	Ep         tcpip.Endpoint // guarded by the flow's mu, as are counts and cancel
	Counts     *tcp.Stats     // ep's
	wq         *waiter.Queue  // likewise
	entry      waiter.Entry
	settling   engine.Task
	connecting atomic.Bool        // it is being connected (ingress)
	tail       atomic.Bool        // the sandbox has yet to take what is left (awaitTail)
	cancel     context.CancelFunc // of a flow that is served by ourselves
}

// outside is the host's side.
type outside struct {
	FD         int // written under the flow's mu and both pumps' locks
	tok        engine.PollToken
	hostEvents atomic.Uint32 // EPOLLRDHUP, EPOLLHUP, EPOLLERR seen
	early      atomic.Bool   // the far side spoke before the flow was live
	broken     atomic.Uint32 // the error after which the host's kernel accepts nothing more (brokenUp)
	lost       nat.Reason    // set with phaseResetting; guarded by the flow's mu
}

// judging is what the flow's bytes are judged by.
type judging struct {
	check *check    // nil: the first bytes are not checked
	gate  gate.Gate // nil: requests are not judged; set before live, under the flow's mu
}

// pump is one direction's state. The goroutine that moves bytes holds mu.
type pump struct {
	Mu    sync.Mutex
	Again atomic.Bool // asked to run while running
	Done  atomic.Bool // its end of stream was passed on, or the flow ended; set under mu

	counted uint64 // segments charged to the flow so far; guarded by mu
}

// events are the endpoint events that the flow wants.
const events = waiter.ReadableEvents | waiter.WritableEvents | waiter.EventHUp | waiter.EventErr | waiter.EventRdHUp

// prepare sets up the tasks that events queue.
func (fl *Flow) prepare() {
	fl.UpTask.Run = fl.pumpUp
	fl.DownTask.Run = fl.pumpDown
	fl.settling.Run = fl.settle
	fl.entry.Init(fl, events)
}

// start makes the flow live: both sides are connected.
func (fl *Flow) start(ep tcpip.Endpoint) {
	registered := fl.ingress
	if !registered {
		fl.prepare()
	}
	fl.Mu.Lock()
	if fl.Phase != phaseHandshake {
		fl.Mu.Unlock()
		if !registered {
			ep.Abort()
			ep.Close()
		}
		return
	}
	fl.Ep, fl.Counts = ep, ep.Stats().(*tcp.Stats)
	err := fl.openLocked()
	fl.Mu.Unlock()
	if err != nil {
		fl.Abort(nat.ReasonOutOfDescriptors)
		return
	}
	if !registered {
		fl.wq.EventRegister(&fl.entry)
	}
	// Events before the registration were lost.
	fl.T.Engine.Put(&fl.UpTask)
	if fl.early.Load() {
		fl.T.Engine.Put(&fl.DownTask)
	}
}

// openLocked lets the pumps run, before any event can start them. mu is held.
func (fl *Flow) openLocked() error {
	fl.Phase = PhaseOpen
	fl.Live.Store(true)
	return fl.watchLocked()
}

// watchLocked makes the poller watch the host socket. mu is held.
func (fl *Flow) watchLocked() (err error) {
	if fl.tok == (engine.PollToken{}) {
		fl.tok, err = fl.T.Engine.Poll.Add(fl.FD, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP, fl)
	}
	return err
}

// NotifyEvent reports events of the endpoint. It runs under the endpoint's lock, so it only queues.
func (fl *Flow) NotifyEvent(mask waiter.EventMask) {
	if mask&(waiter.ReadableEvents|waiter.EventRdHUp) != 0 && !fl.want(wantUp) {
		fl.T.Engine.Put(&fl.UpTask)
	}
	if mask&waiter.WritableEvents != 0 && !fl.want(wantDown) {
		fl.T.Engine.Put(&fl.DownTask)
	}
	if mask&(waiter.EventHUp|waiter.EventErr) != 0 || fl.connecting.Load() || fl.tail.Load() {
		fl.T.Engine.Put(&fl.settling)
	}
}

// PollReady reports events of the host socket. Those about the socket's end are kept in any phase,
// as an edge comes only once.
func (fl *Flow) PollReady(events uint32) {
	if ended := events & (unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR); ended != 0 {
		fl.hostEvents.Or(ended)
	}
	if !fl.Live.Load() && events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		fl.early.Store(true)
	}
	fl.Mu.Lock()
	ph := fl.Phase
	fl.Mu.Unlock()
	switch ph {
	case phaseDialing:
		if events&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			fl.dialReady()
		}
	case PhaseVerifying:
		if events&unix.EPOLLHUP != 0 {
			fl.Abort(fl.lostUnread())
			return
		}
		if events&unix.EPOLLRDHUP != 0 {
			fl.T.Engine.Put(&fl.UpTask)
		}
	case PhaseOpen:
		if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
			fl.pumpDown()
		}
		if events&unix.EPOLLOUT != 0 {
			fl.T.Engine.Put(&fl.UpTask)
		}
	}
}

func (fl *Flow) inHandshake() bool { return fl.in(phaseHandshake) }

func (fl *Flow) in(ph Phase) bool {
	fl.Mu.Lock()
	defer fl.Mu.Unlock()
	return fl.Phase == ph
}

// settle looks at how far the endpoint has come. It is a task.
func (fl *Flow) settle() {
	finished := fl.Up.Done.Load() && fl.Down.Done.Load()
	fl.Mu.Lock()
	ep, ph := fl.Ep, fl.Phase
	if ph == PhaseOpen && finished {
		fl.Phase = PhaseClosing
	}
	fl.Mu.Unlock()
	switch {
	case ep == nil || ph == PhaseClosed:
		return
	case ph == phaseHandshake:
		fl.connected(ep)
		return
	case ph == PhaseOpen && finished:
		fl.closeHost(false)
		ep.Close()
		fl.settleTail(ep.(*tcp.Endpoint), PhaseClosing)
	case ph == PhaseOpen && fl.Up.Done.Load() && over(ep):
		// No reader is left to find out. The far side did not end its stream, so the sandbox has
		// reset the connection, or is gone.
		fl.Abort(lostSandbox(ep))
	case ph == PhaseOpen:
		// The endpoint failed or was reset while data may still be moving: the
		// pumps find out, pass on what is left, and abort.
		fl.T.Engine.Put(&fl.UpTask)
		fl.T.Engine.Put(&fl.DownTask)
	case ph == PhaseClosing, ph == phaseResetting:
		fl.settleTail(ep.(*tcp.Endpoint), ph)
	default:
		// Verification: only the sandbox's reset is of interest.
		if netstack.EndpointState(ep) == tcp.StateError || ph == PhaseVerifying && over(ep) {
			fl.Abort(lostSandbox(ep))
		}
	}
}

// connected checks how the connection into the sandbox has ended, if it has.
func (fl *Flow) connected(ep tcpip.Endpoint) {
	switch state := netstack.EndpointState(ep); {
	case state == tcp.StateEstablished || state == tcp.StateCloseWait:
		fl.connecting.Store(false)
		fl.Lease.SetState(nat.Established)
		fl.start(ep)
	case state == tcp.StateError || state == tcp.StateClose:
		fl.refusedInside(ep)
	}
}

// end releases what the flow still holds: its tuple and its lease.
func (fl *Flow) end(reason nat.Reason) {
	fl.Mu.Lock()
	if fl.Phase == PhaseClosed {
		fl.Mu.Unlock()
		return
	}
	fl.Phase = PhaseClosed
	ep := fl.Ep
	fl.Mu.Unlock()
	if ep != nil {
		fl.wq.EventUnregister(&fl.entry)
	}
	if fl.check != nil && fl.check.refused != "" {
		reason = fl.check.refused
	}
	fl.Release(reason)
	fl.T.forget(fl)
}

// Expire is called by the flow table when it ends the flow.
func (fl *Flow) Expire(reason nat.Reason) { fl.Abort(reason) }

// Abort ends the flow at once, with a reset to each side that is connected. It
// may be called from any goroutine that holds no lock, and more than once.
func (fl *Flow) Abort(reason nat.Reason) {
	fl.Mu.Lock()
	fl.abortLocked(reason)
}

// abortDial is abort for callers that only watch the dial, which may succeed at the same moment: it
// reports whether it came in time.
func (fl *Flow) abortDial(reason nat.Reason) bool {
	fl.Mu.Lock()
	if fl.Phase != phaseDialing {
		fl.Mu.Unlock()
		return false
	}
	fl.abortLocked(reason)
	return true
}

// abortLocked is called with mu held, and releases it.
func (fl *Flow) abortLocked(reason nat.Reason) {
	ph, ep, syn, cancel := fl.Phase, fl.Ep, fl.Syn, fl.cancel
	if ph == PhaseClosed {
		fl.Mu.Unlock()
		return
	}
	fl.Phase = PhaseClosed
	if fl.Revoked.Load() {
		reason = nat.ReasonPolicy // whatever error the halt has caused
	}
	reset := fl.resetOnComplete && reason != nat.ReasonPolicy
	fl.Syn = nil
	fl.Mu.Unlock()

	if cancel != nil {
		cancel()
	}
	switch {
	case syn != nil:
		if reset {
			fl.T.queue.HandleUnknownDestinationPacket(fl.id, syn)
		}
		syn.DecRef()
	case ph == phaseHandshake && !fl.ingress:
		fl.T.endHandshake(fl)
	}
	if ep != nil {
		fl.wq.EventUnregister(&fl.entry)
		ep.Abort()
		ep.Close()
	}
	if ph != PhaseClosing {
		fl.closeHost(true)
	}
	if fl.Lease != nil {
		fl.Lease.SetState(nat.Close)
	}
	fl.Release(reason)
	fl.T.forget(fl)
}

// Halt implements admitted. The pumps look at revoked; what the host's kernel has of the
// flow's bytes goes with the connection. The endpoint leaves the demultiplexer, so that
// acknowledgements fetch nothing more of what the stack has queued for the sandbox.
func (fl *Flow) Halt() {
	fl.Mu.Lock()
	ep, cancel := fl.Ep, fl.cancel
	if fl.FD >= 0 {
		fl.bury(fl.FD) // the kernel is going to forget the port
		fl.T.Dialer.Disconnect(fl.FD)
	}
	fl.Mu.Unlock()
	if cancel != nil {
		cancel()
	}
	if ep != nil && !fl.ingress {
		fl.unregister(ep)
	}
}

// unregister takes the endpoint of a connection that the sandbox began out of the stack's
// demultiplexer.
func (fl *Flow) unregister(ep tcpip.Endpoint) {
	fl.T.Stack.UnregisterTransportEndpoint([]tcpip.NetworkProtocolNumber{packet.NetProto(packet.NetipAddr(fl.id.RemoteAddress))},
		tcp.ProtocolNumber, fl.id, ep.(stack.TransportEndpoint), ports.Flags{}, 0)
}

// closeHost closes the host socket, with a reset if asked. The pumps' locks
// make sure that no system call on the descriptor is under way or will follow.
func (fl *Flow) closeHost(reset bool) {
	fl.Up.Mu.Lock()
	fl.Down.Mu.Lock()
	fl.Mu.Lock()
	fd, tok := fl.FD, fl.tok
	fl.FD, fl.tok = -1, engine.PollToken{}
	fl.Up.Done.Store(true)
	fl.Down.Done.Store(true)
	counts := fl.Counts
	fl.Mu.Unlock()
	if counts != nil {
		fl.tallyDown(0)
	}
	fl.Down.Mu.Unlock()
	if counts != nil {
		fl.TallyUp(0)
	}
	fl.Up.Mu.Unlock()
	if fd < 0 {
		return
	}
	fl.T.Engine.Poll.Release(tok) // closing takes it out of epoll
	fl.bury(fd)
	if reset {
		fl.T.Dialer.Reset(fd)
	} else {
		fl.T.Dialer.Close(fd)
	}
}

// bury makes the host socket's tuple rest (admit/tombs.go), once it has one.
func (fl *Flow) bury(fd int) {
	if !fl.ingress {
		fl.T.Gate.BurySocket(fd, fl.Verdict().Contact())
	}
}

// UnderWay implements admitted.
func (fl *Flow) UnderWay(q policy.Query) (all []policy.Query) {
	fl.Mu.Lock()
	gate := fl.gate
	fl.Mu.Unlock()
	if gate == nil {
		return nil
	}
	for _, seen := range gate.UnderWay() {
		q.Seen = seen
		all = append(all, q)
	}
	return all
}

// ErrnoOf finds the system's error number in err, or 0.
func ErrnoOf(err error) unix.Errno {
	var errno unix.Errno
	errors.As(err, &errno)
	return errno
}

// Delivers reports whether the sandbox has yet to take bytes of a flow that both sides have closed.
func (fl *Flow) Delivers() bool { return fl.in(PhaseClosing) }
