package forwarder

// One TCP flow: its two sides, its phases, and its end.
//
//	phase          stack side            host side             who may act
//	dialing        a held SYN            connect(2) under way  poller, cancel
//	handshake      SYN/ACK sent          connected             the acceptor
//	open           an endpoint           connected             the pumps (splice.go)
//	closing        closed, not acked     closed                nobody: waits for the stack (tcp_tail.go)
//	resetting      bytes not acked       reset                 likewise
//	closed         gone                  gone                  nobody
//
// Locks: up.mu and down.mu are held by the pumps while they run, in that order
// by whoever needs both; mu guards the fields below it, and under it only the
// forwarder's mu may be taken. None is taken by a waiter callback, which runs under the endpoint's own lock.

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

	"sluice/nat"
	"sluice/policy"
)

type phase uint8

const (
	phaseDialing phase = iota
	phaseHandshake
	phaseOpen
	phaseClosing
	phaseClosed
	phaseVerifying // verify_tcp.go
	phaseRefused   // likewise
	phaseResetting
)

type tcpFlow struct {
	pass
	number  uint64 // of this flow and of no other
	t       *tcpForwarder
	id      stack.TransportEndpointID // Remote is the sandbox
	check   *check                    // nil: the first bytes are nobody's business
	hops    ipMeta                    // for the dial; ttl 0: the host's default
	ingress bool                      // dialled by a client of a published port
	caller  *caller                   // who that is
	local   bool                      // served by ourselves: DNS over TCP
	irs     uint32                    // written before the handshake, under t.mu once indexed
	kept    keptSYN                   // tcp_again.go

	wq       *waiter.Queue // ep's
	entry    waiter.Entry
	upTask   task
	downTask task
	settling task
	up       pump       // stack → host
	down     pump       // host → stack
	gate     gate       // nil: requests are not judged; set before live, under mu
	reader   hostReader // of the down pump, kept here so that a write allocates nothing
	mem      tcpMemory

	inBatch bool          // among inlineTCP.flows; guarded by its mu
	inlined atomic.Bool   // the device's reader processes the endpoint
	wanted  atomic.Uint32 // and has this to do then

	hostEvents atomic.Uint32 // EPOLLRDHUP, EPOLLHUP, EPOLLERR seen
	early      atomic.Bool   // the far side spoke before the flow was live
	connecting atomic.Bool   // the stack's side is being connected (ingress)
	live       atomic.Bool   // both sides are connected: the pumps may run
	broken     atomic.Uint32 // the error by which the host's kernel takes nothing more (brokenUp)
	tail       atomic.Bool   // the sandbox has yet to take what is left (awaitTail)

	halfOpen, dialing *list.Element // guarded by t.mu
	firstSYN, lastSYN time.Time     // likewise
	deadline          time.Time     // of the handshake; set before halfOpen

	mu              sync.Mutex
	phase           phase
	fd              int // written under mu and both pumps' locks
	tok             pollToken
	ep              tcpip.Endpoint
	counts          *tcp.Stats          // ep's
	syn             *stack.PacketBuffer // while dialing
	cancel          context.CancelFunc
	resetOnComplete bool
	lost            nat.Reason // set with phaseResetting
}

// pump is one direction's state. Whoever moves bytes holds mu.
type pump struct {
	mu    sync.Mutex
	again atomic.Bool // asked to run while running
	done  atomic.Bool // its end of stream was passed on, or the flow ended; set under mu

	counted uint64 // segments charged to the flow so far; guarded by mu
}

// events are what the flow wants to hear of its endpoint.
const events = waiter.ReadableEvents | waiter.WritableEvents | waiter.EventHUp | waiter.EventErr | waiter.EventRdHUp

// prepare sets up what events queue.
func (fl *tcpFlow) prepare() {
	fl.upTask.run = fl.pumpUp
	fl.downTask.run = fl.pumpDown
	fl.settling.run = fl.settle
	fl.entry.Init(fl, events)
}

// start makes the flow live: both sides are connected.
func (fl *tcpFlow) start(ep tcpip.Endpoint) {
	registered := fl.ingress
	if !registered {
		fl.prepare()
	}
	fl.mu.Lock()
	if fl.phase != phaseHandshake {
		fl.mu.Unlock()
		if !registered {
			ep.Abort()
			ep.Close()
		}
		return
	}
	fl.ep, fl.counts = ep, ep.Stats().(*tcp.Stats)
	err := fl.openLocked()
	fl.mu.Unlock()
	if err != nil {
		fl.abort(nat.ReasonOutOfDescriptors)
		return
	}
	if !registered {
		fl.wq.EventRegister(&fl.entry)
	}
	// What happened before the registration was told to nobody.
	fl.t.engine.put(&fl.upTask)
	if fl.early.Load() {
		fl.t.engine.put(&fl.downTask)
	}
}

// openLocked lets the pumps run, which nothing tells to yet. mu is held.
func (fl *tcpFlow) openLocked() error {
	fl.phase = phaseOpen
	fl.live.Store(true)
	return fl.watchLocked()
}

// watchLocked has the poller tell of the host socket. mu is held.
func (fl *tcpFlow) watchLocked() (err error) {
	if fl.tok == (pollToken{}) {
		fl.tok, err = fl.t.engine.poll.add(fl.fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP, fl)
	}
	return err
}

// NotifyEvent is the stack's word on the endpoint. It runs under the endpoint's
// lock: it only queues.
func (fl *tcpFlow) NotifyEvent(mask waiter.EventMask) {
	if mask&(waiter.ReadableEvents|waiter.EventRdHUp) != 0 && !fl.want(wantUp) {
		fl.t.engine.put(&fl.upTask)
	}
	if mask&waiter.WritableEvents != 0 && !fl.want(wantDown) {
		fl.t.engine.put(&fl.downTask)
	}
	if mask&(waiter.EventHUp|waiter.EventErr) != 0 || fl.connecting.Load() || fl.tail.Load() {
		fl.t.engine.put(&fl.settling)
	}
}

// pollReady is the kernel's word on the host socket. What it says of the socket's
// end is kept whatever the phase, as an edge comes only once.
func (fl *tcpFlow) pollReady(events uint32) {
	if ended := events & (unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR); ended != 0 {
		fl.hostEvents.Or(ended)
	}
	if !fl.live.Load() && events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		fl.early.Store(true)
	}
	fl.mu.Lock()
	ph := fl.phase
	fl.mu.Unlock()
	switch ph {
	case phaseDialing:
		if events&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			fl.dialReady()
		}
	case phaseVerifying:
		if events&unix.EPOLLHUP != 0 {
			fl.abort(fl.lostUnread())
			return
		}
		if events&unix.EPOLLRDHUP != 0 {
			fl.t.engine.put(&fl.upTask)
		}
	case phaseOpen:
		if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
			fl.pumpDown()
		}
		if events&unix.EPOLLOUT != 0 {
			fl.t.engine.put(&fl.upTask)
		}
	}
}

func (fl *tcpFlow) inHandshake() bool { return fl.in(phaseHandshake) }

func (fl *tcpFlow) in(ph phase) bool {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	return fl.phase == ph
}

// settle looks at how far the endpoint has come. It is a task.
func (fl *tcpFlow) settle() {
	finished := fl.up.done.Load() && fl.down.done.Load()
	fl.mu.Lock()
	ep, ph := fl.ep, fl.phase
	if ph == phaseOpen && finished {
		fl.phase = phaseClosing
	}
	fl.mu.Unlock()
	switch {
	case ep == nil || ph == phaseClosed:
		return
	case ph == phaseHandshake:
		fl.connected(ep)
		return
	case ph == phaseOpen && finished:
		fl.closeHost(false)
		ep.Close()
		fl.settleTail(ep.(*tcp.Endpoint), phaseClosing)
	case ph == phaseOpen && fl.up.done.Load() && over(ep):
		// Nobody reads from it any more who would find out. The far side did not end its
		// stream, so the sandbox has reset the connection, or is gone.
		fl.abort(lostSandbox(ep))
	case ph == phaseOpen:
		// The endpoint failed or was reset while data may still be moving: the
		// pumps find out, pass on what is left, and abort.
		fl.t.engine.put(&fl.upTask)
		fl.t.engine.put(&fl.downTask)
	case ph == phaseClosing, ph == phaseResetting:
		fl.settleTail(ep.(*tcp.Endpoint), ph)
	default:
		// Verification: only the sandbox's reset is of interest.
		if endpointState(ep) == tcp.StateError || ph == phaseVerifying && over(ep) {
			fl.abort(lostSandbox(ep))
		}
	}
}

// connected looks at how the connection into the sandbox has ended, if it has.
func (fl *tcpFlow) connected(ep tcpip.Endpoint) {
	switch state := endpointState(ep); {
	case state == tcp.StateEstablished || state == tcp.StateCloseWait:
		fl.connecting.Store(false)
		fl.lease.SetState(nat.Established)
		fl.start(ep)
	case state == tcp.StateError || state == tcp.StateClose:
		fl.refusedInside(ep)
	}
}

// end releases what the flow still holds: its tuple and its lease.
func (fl *tcpFlow) end(reason nat.Reason) {
	fl.mu.Lock()
	if fl.phase == phaseClosed {
		fl.mu.Unlock()
		return
	}
	fl.phase = phaseClosed
	ep := fl.ep
	fl.mu.Unlock()
	if ep != nil {
		fl.wq.EventUnregister(&fl.entry)
	}
	if fl.check != nil && fl.check.refused != "" {
		reason = fl.check.refused
	}
	fl.release(reason)
	fl.t.forget(fl)
}

// expire is called by the flow table when it ends the flow.
func (fl *tcpFlow) expire(reason nat.Reason) { fl.abort(reason) }

// abort ends the flow at once, with a reset to each side that is connected. It
// may be called from any goroutine that holds no lock, and more than once.
func (fl *tcpFlow) abort(reason nat.Reason) {
	fl.mu.Lock()
	fl.abortLocked(reason)
}

// abortDial is abort for those who look at the dial only, which may succeed at
// the same moment: it tells whether it came in time.
func (fl *tcpFlow) abortDial(reason nat.Reason) bool {
	fl.mu.Lock()
	if fl.phase != phaseDialing {
		fl.mu.Unlock()
		return false
	}
	fl.abortLocked(reason)
	return true
}

// abortLocked is called with mu held, and releases it.
func (fl *tcpFlow) abortLocked(reason nat.Reason) {
	ph, ep, syn, cancel := fl.phase, fl.ep, fl.syn, fl.cancel
	if ph == phaseClosed {
		fl.mu.Unlock()
		return
	}
	fl.phase = phaseClosed
	if fl.revoked.Load() {
		reason = nat.ReasonPolicy // whatever it was that halting has caused
	}
	reset := fl.resetOnComplete && reason != nat.ReasonPolicy
	fl.syn = nil
	fl.mu.Unlock()

	if cancel != nil {
		cancel()
	}
	switch {
	case syn != nil:
		if reset {
			fl.t.queue.HandleUnknownDestinationPacket(fl.id, syn)
		}
		syn.DecRef()
	case ph == phaseHandshake && !fl.ingress:
		fl.t.endHandshake(fl)
	}
	if ep != nil {
		fl.wq.EventUnregister(&fl.entry)
		ep.Abort()
		ep.Close()
	}
	if ph != phaseClosing {
		fl.closeHost(true)
	}
	if fl.lease != nil {
		fl.lease.SetState(nat.Close)
	}
	fl.release(reason)
	fl.t.forget(fl)
}

// halt implements admitted. The pumps look at revoked; what the host's kernel has of the
// flow's bytes goes with the connection. The endpoint leaves the demultiplexer, so that
// acknowledgements fetch nothing more of what the stack has queued for the sandbox.
func (fl *tcpFlow) halt() {
	fl.mu.Lock()
	ep, cancel := fl.ep, fl.cancel
	if fl.fd >= 0 {
		fl.bury(fl.fd) // the kernel is going to forget the port
		fl.t.dialer.disconnect(fl.fd)
	}
	fl.mu.Unlock()
	if cancel != nil {
		cancel()
	}
	if ep != nil && !fl.ingress {
		fl.unregister(ep)
	}
}

// unregister takes the endpoint of a connection that the sandbox began out of the stack's
// demultiplexer.
func (fl *tcpFlow) unregister(ep tcpip.Endpoint) {
	fl.t.stack.UnregisterTransportEndpoint([]tcpip.NetworkProtocolNumber{netProto(netipAddr(fl.id.RemoteAddress))},
		tcp.ProtocolNumber, fl.id, ep.(stack.TransportEndpoint), ports.Flags{}, 0)
}

// closeHost closes the host socket, with a reset if asked. The pumps' locks
// make sure that no system call on the descriptor is under way or will follow.
func (fl *tcpFlow) closeHost(reset bool) {
	fl.up.mu.Lock()
	fl.down.mu.Lock()
	fl.mu.Lock()
	fd, tok := fl.fd, fl.tok
	fl.fd, fl.tok = -1, pollToken{}
	fl.up.done.Store(true)
	fl.down.done.Store(true)
	counts := fl.counts
	fl.mu.Unlock()
	if counts != nil {
		fl.tallyDown(0)
	}
	fl.down.mu.Unlock()
	if counts != nil {
		fl.tallyUp(0)
	}
	fl.up.mu.Unlock()
	if fd < 0 {
		return
	}
	fl.t.engine.poll.release(tok) // closing takes it out of epoll
	fl.bury(fd)
	if reset {
		fl.t.dialer.reset(fd)
	} else {
		fl.t.dialer.close(fd)
	}
}

// bury has the tuple of the host socket rest (tombs.go), once it has one.
func (fl *tcpFlow) bury(fd int) {
	if !fl.ingress {
		fl.t.gate.burySocket(fd, fl.verdict().Contact())
	}
}

// underWay implements admitted.
func (fl *tcpFlow) underWay(q policy.Query) (all []policy.Query) {
	fl.mu.Lock()
	gate := fl.gate
	fl.mu.Unlock()
	if gate == nil {
		return nil
	}
	for _, seen := range gate.underWay() {
		q.Seen = seen
		all = append(all, q)
	}
	return all
}

// errnoOf finds the system's error number in err, or 0.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	errors.As(err, &errno)
	return errno
}

// delivers reports whether the sandbox has not taken all yet of a flow that both have closed.
func (fl *tcpFlow) delivers() bool { return fl.in(phaseClosing) }
