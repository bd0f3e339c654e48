package forwarder

// TCP from the sandbox: admission, dial, handshake.
//
// A SYN of an unknown tuple is judged and charged where it was read, and the dial
// starts there too, so that a flood costs neither a goroutine nor an endpoint. Only
// when the far side has answered does the stack get the SYN, and answers the
// sandbox's handshake:
//
//	SYN ─► Decide ─► Acquire ─► connect(2) ──ok──► SYN/ACK … ACK ─► splice
//	         │          │           └─ refused: RST · unreachable: ICMP · no answer: silence
//	         │          └─ over a limit: dropped, counted
//	         └─ reject: RST · drop: silence
//
// A sandbox that gives up during the dial may say so by RST, which finds no
// endpoint and therefore comes to handleTCP as well; more often it just stops
// repeating its SYN, and the dial ends when the next one is overdue. One that never completes
// the handshake is ended after handshakeTimeout, or earlier, oldest first, when
// there are more than maxHandshakes of them, by the RST it did not send.
//
// TIME_WAIT. When the stack's side closes last-but-one it would hold the tuple,
// and without a listener swallow every new SYN for it. This link neither loses
// nor reorders, so there are no old duplicates to wait for: an endpoint that
// reaches TIME_WAIT leaves the demultiplexer at once (tcpFlow.settle), and a new
// SYN comes to handleTCP like any other.

import (
	"container/list"
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"sluice/forwarder/seldom"
	"sluice/nat"
	"sluice/policy"
)

const (
	// maxHandshakes bounds the flows whose dial succeeded and whose sandbox has
	// not completed the handshake. Beyond it the oldest is reset.
	maxHandshakes = 1024
	// handshakeTimeout bounds each of them.
	handshakeTimeout = 10 * time.Second
	// synRead is by when the stack has taken in a SYN that was given to it.
	synRead = time.Second
	// synSlack is how much later than after another doubling the next SYN may come
	// before its sender is taken to have given up.
	synSlack = 4 * time.Second
	// stackTimeWait is how long an endpoint object outlives its tuple.
	stackTimeWait = 20 * time.Millisecond
	// repeatedly is how many dials must fail within seldom.Every to be told of.
	repeatedly = 3
	// tracerouteTTL is the largest hop limit that is taken to be meant: a SYN
	// with at most this many hops left is dialled with one less.
	tracerouteTTL = 30
)

// tcpParts are what the TCP flows share with the rest of the forwarder.
type tcpParts struct {
	gate     *admission
	engine   *engine
	dialer   *Dialer
	onlink   *addrs
	drops    *drops
	errs     *icmpErrors
	timer    *need
	stack    *stack.Stack
	link     stack.LinkEndpoint
	resolver streamServer // nil: there is none
	ctx      context.Context
	log      *slog.Logger
}

// streamServer answers the connections of DNS.
type streamServer interface {
	ServeStream(ctx context.Context, c net.Conn, became func(policy.Outcome))
}

// tcpForwarder owns the TCP flows of one sandbox.
type tcpForwarder struct {
	tcpParts
	nic      stack.NetworkDispatcher // takes segments as the sandbox's; set before the link delivers
	acceptor *acceptor
	queue    *tcpQueue // of every endpoint
	inline   inlineTCP
	// gsoPayload is the payload of the largest packet that the stack makes of a write,
	// gso_max_size less MAX_TCP_HEADER as in Linux.
	gsoPayload int

	mu         sync.Mutex
	numbers    atomic.Uint64 // of flows
	flows      map[stack.TransportEndpointID]*tcpFlow
	handshakes list.List // of *tcpFlow, oldest first
	dials      list.List // of *tcpFlow, those that wait for the far side
	checks     *checkList
	failures   seldom.Failures
	idle       *checkList     // of clients of HTTP/2 that were greeted (greet), for as long as they like
	wg         sync.WaitGroup // of the DNS handler's connections
	closed     bool

	refused, limited, cancelled, handshakeEvicted, handshakeExpired *atomic.Uint64
	dialTimeout, dialRefused, dialUnreachable, dialDescriptors      *atomic.Uint64
	shortRead, lastHop, malformed, noConnection                     *atomic.Uint64
	inwardLimited, noAddress                                        *atomic.Uint64
	refusedFirst, refusedRequest, refusedHello, firstMalformed      *atomic.Uint64
}

// newTCPForwarder needs the stack, whose segments go through queue. batched: the link says
// when a batch of packets ends.
func newTCPForwarder(parts tcpParts, queue *tcpQueue, batched bool) (*tcpForwarder, error) {
	c := parts.drops.stats.counter
	t := &tcpForwarder{
		tcpParts:         parts,
		queue:            queue,
		inwardLimited:    c("ingress_refused_by_limit"),
		noAddress:        c("ingress_accept_failed"),
		flows:            make(map[stack.TransportEndpointID]*tcpFlow),
		refused:          c("tcp_refused_by_policy"),
		limited:          c("tcp_refused_by_limit"),
		cancelled:        c("tcp_dial_cancelled"),
		handshakeEvicted: c("tcp_handshake_evicted"),
		handshakeExpired: c("tcp_handshake_timeout"),
		dialTimeout:      c("tcp_dial_timeout"),
		dialRefused:      c("tcp_dial_refused"),
		dialUnreachable:  c("tcp_dial_unreachable"),
		dialDescriptors:  c("tcp_dial_out_of_descriptors"),
		malformed:        c("tcp_malformed"),
		noConnection:     c("tcp_no_connection"), // answered by RST
		lastHop:          c("tcp_time_exceeded"),
		shortRead:        c("tcp_short_read"),
		refusedFirst:     c("tcp_refused_by_first_bytes"),
		refusedRequest:   c("tcp_refused_request"),
		refusedHello:     c("tcp_refused_hello"),
		firstMalformed:   c("tcp_first_bytes_malformed"),
		checks:           newCheckList(parts.drops.stats, parts.timer, parts.gate.now, "tcp"),
		idle:             newCheckList(parts.drops.stats, parts.timer, parts.gate.now, "tcp_idle"),
	}
	queue.t = t
	t.inline.batched = batched
	t.gsoPayload = downChunk
	if g, ok := parts.link.(stack.GSOEndpoint); ok && g.SupportedGSO() == stack.HostGSOSupported {
		t.gsoPayload = int(g.GSOMaxSize()) - header.TCPTotalHeaderMaximumSize - 1
	}
	var err error
	t.acceptor, err = newAcceptor(t)
	return t, err
}

// handleTCP receives each segment that belongs to no endpoint. It runs on the
// device's goroutine. The result tells the stack that the segment is dealt
// with; false makes it answer with RST.
func (t *tcpForwarder) handleTCP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	switch flags := h.Flags(); {
	case flags.Contains(header.TCPFlagRst):
		t.cancelDial(id)
		return true
	case !isSYN(flags):
		t.noConnection.Add(1)
		return false
	}
	if _, intact, ok := header.TCPValid(h, func() uint16 { return pkt.Data().Checksum() }, uint16(pkt.Data().Size()),
		id.RemoteAddress, id.LocalAddress, pkt.RXChecksumValidated); !ok || !intact {
		t.malformed.Add(1)
		return true
	}
	t.mu.Lock()
	known := t.flows[id]
	again := known != nil && t.meetLocked(known, h.SequenceNumber(), pkt)
	t.mu.Unlock()
	switch {
	case again:
		t.engine.put(&known.kept.task)
		return true
	case known != nil:
		if known.inHandshake() {
			t.acceptor.offer(id, pkt) // the stack has no endpoint for it: it had no room then
		}
		return true
	}

	src := netip.AddrPortFrom(netipAddr(id.RemoteAddress), id.RemotePort)
	dst := netip.AddrPortFrom(netipAddr(id.LocalAddress), id.LocalPort)
	a, ok := arrivalOf(pkt)
	if !ok {
		return true
	}
	own := t.onlink.isOwn(dst.Addr())
	if a.meta.ttl <= 1 && !own {
		t.lastHop.Add(1)
		t.errs.tell(icmpTimeExceeded, 0, pkt)
		return true
	}
	j := t.gate.decide(policy.Query{Proto: unix.IPPROTO_TCP, Src: src, Dst: dst})
	if !j.mayBegin() {
		t.refused.Add(1)
		t.drops.refused("policy", pkt)
		t.gate.refuse(j, j.verdict.Action() == policy.Reject)
		return j.verdict.Action() != policy.Reject
	}
	fl := &tcpFlow{t: t, number: t.numbers.Add(1), id: id, fd: -1, local: j.local, irs: h.SequenceNumber()}
	if j.waits() {
		fl.check = new(check)
	}
	fl.hops.tos = a.meta.tos
	if a.meta.ttl <= tracerouteTTL && !own {
		fl.hops.ttl = a.meta.ttl - 1
	}
	fl.firstSYN = t.gate.now()
	fl.lastSYN = fl.firstSYN
	fl.syn = pkt.IncRef()
	if err := t.gate.enter(&fl.pass, fl, j, entry{orig: nat.NewTuple(unix.IPPROTO_TCP, src, dst), memory: &fl.mem.shares, pending: fl.pending}); err != nil {
		t.gate.noteLimit(t.limited, j, err)
		t.drops.refused(err.Error(), pkt)
		fl.abort(nat.ReasonStopped) // it was never in the table, which gives it no record
		return true
	}
	fl.lease.SetState(nat.SynSent)
	fl.lease.Account(nat.Original, 1, int64(pkt.Size()))
	if !t.index(fl) {
		fl.abort(nat.ReasonStopped)
		return true
	}
	if fl.local {
		fl.answer()
	} else {
		fl.dial()
	}
	return true
}

// index makes a flow that has entered findable by its segments. It fails when no flow may
// begin any more, or this one has ended already.
func (t *tcpForwarder) index(fl *tcpFlow) bool {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return false
	}
	t.flows[fl.id] = fl
	t.mu.Unlock()
	return t.indexed(fl)
}

// indexed reports whether fl, which was put into the index, is still to be there.
func (t *tcpForwarder) indexed(fl *tcpFlow) bool {
	if fl.lease.Ended() {
		// Who ended it may have looked for it before it was here.
		t.forget(fl)
		return false
	}
	return true
}

// dial starts the connection to the far side.
func (fl *tcpFlow) dial() {
	t := fl.t
	fl.mu.Lock()
	if fl.phase != phaseDialing || fl.revoked.Load() {
		fl.mu.Unlock()
		return
	}
	fd, connected, err := t.dialer.tcpConnect(fl.verdict(), fl.hops, netipAddr(fl.id.RemoteAddress))
	fl.fd = fd
	if err == nil && !connected {
		t.enterDial(fl)
		fl.tok, err = t.engine.poll.add(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP, fl)
	}
	fl.mu.Unlock()
	switch {
	case err != nil:
		fl.dialFailed(err)
	case connected:
		fl.answer()
	}
}

// dialReady is called by the poller when the attempt has ended.
func (fl *tcpFlow) dialReady() {
	err := fl.dialResult()
	switch {
	case err == errNotDialing:
	case err != nil:
		fl.dialFailed(err)
	default:
		fl.answer()
	}
}

// errNotDialing says that nobody waits for the result of the dial any more.
var errNotDialing = errors.New("not dialling")

// dialResult is what became of the dial that the flow is waiting for.
func (fl *tcpFlow) dialResult() error {
	// Under mu, as closeHost gives the descriptor back to the kernel after it.
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.phase != phaseDialing || fl.fd < 0 || fl.revoked.Load() {
		return errNotDialing
	}
	err := dialed(fl.fd, fl.verdict().Contact().Addr().Is6())
	if errno := errnoOf(err); errno == unix.ECONNRESET || errno == unix.EPIPE {
		// The far side accepted, and has reset since: a SYN that is refused is ECONNREFUSED
		// (tcp_reset in net/ipv4/tcp_input.c). What it said before is there to be read.
		fl.broken.Store(uint32(errno))
		return nil
	}
	return err
}

// answer lets the sandbox's side be completed.
func (fl *tcpFlow) answer() {
	t := fl.t
	fl.mu.Lock()
	if fl.phase != phaseDialing {
		fl.mu.Unlock()
		return
	}
	fl.phase = phaseHandshake
	syn := fl.syn
	fl.syn = nil
	fl.mu.Unlock()

	fl.lease.SetState(nat.SynRecv)
	t.enterHandshake(fl)
	t.acceptor.offer(fl.id, syn)
	syn.DecRef()
	if !fl.inHandshake() {
		// It was ended meanwhile, perhaps before the stack knew of it.
		t.endHandshake(fl)
	}
}

// dialFailed tells the sandbox what the far side's network said.
func (fl *tcpFlow) dialFailed(err error) {
	t := fl.t
	reason := fl.dialReason(err)
	t.tellFailed(fl.verdict().Contact(), err)
	switch reason {
	case nat.ReasonRefused:
		fl.mu.Lock()
		fl.resetOnComplete = true
		fl.mu.Unlock()
	case nat.ReasonUnreachable:
		fl.mu.Lock()
		syn := originalPacket(fl.syn)
		var e extendedErr
		fromNetwork := false
		if fl.fd >= 0 {
			e, fromNetwork = dialError(fl.fd)
		}
		fl.mu.Unlock()
		t.errs.tellDialError(syn, e, fromNetwork, errnoOf(err))
	}
	fl.abort(reason)
}

// accepted receives an endpoint whose handshake the sandbox has completed.
func (t *tcpForwarder) accepted(ep *tcp.Endpoint, wq *waiter.Queue) {
	t.mu.Lock()
	fl := t.flows[ep.TransportEndpointInfo.ID]
	local := fl != nil && fl.local && !t.closed
	if local {
		t.wg.Add(1) // for serveLocal
	}
	t.mu.Unlock()
	if fl == nil || !fl.inHandshake() {
		ep.Abort()
		ep.Close()
		if local {
			t.wg.Done()
		}
		return
	}
	t.leaveHandshake(fl)
	t.dialer.probeInside(ep)
	if fl.check != nil {
		fl.wq = wq
		fl.verify(ep)
		return
	}
	fl.lease.SetState(nat.Established)
	if local {
		fl.mem.holdStream(ep)
		go func() { // ends with the connection, which close closes
			defer t.wg.Done()
			t.serveLocal(fl, gonet.NewTCPConn(wq, ep))
		}()
		return
	}
	fl.wq = wq
	fl.start(ep)
}

// serveLocal hands the connection to the DNS handler, which owns it from here.
func (t *tcpForwarder) serveLocal(fl *tcpFlow, c *gonet.TCPConn) {
	ctx, cancel := context.WithCancel(t.ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	fl.mu.Lock()
	if fl.phase != phaseHandshake || fl.revoked.Load() {
		fl.mu.Unlock()
		stop()
		c.Close()
		return
	}
	fl.phase = phaseOpen
	fl.cancel = cancel
	fl.mu.Unlock()
	t.resolver.ServeStream(ctx, &accountedConn{TCPConn: c, lease: fl.lease, overhead: tcpOverhead(fl.id.RemoteAddress.Len() == 4)}, fl.answered)
	stop()
	c.Close()
	fl.abort(nat.ReasonClosed)
}

// all returns the flows of the moment.
func (t *tcpForwarder) all() []*tcpFlow {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Values(t.flows))
}

// unindex removes fl from the index, if it is still the tuple's flow, and lets in who waits
// for the tuple.
func (t *tcpForwarder) unindex(fl *tcpFlow) {
	t.mu.Lock()
	id := fl.id
	if t.flows[id] == fl {
		delete(t.flows, id)
	}
	syn := t.takeKeptLocked(fl)
	t.mu.Unlock()
	if syn != nil {
		t.begin(id, syn)
		syn.DecRef()
	}
}

// forget gives back what fl has beside its sockets and its lease, which is released by then:
// a flow may begin by the same ports.
func (t *tcpForwarder) forget(fl *tcpFlow) {
	t.mu.Lock()
	t.leaveDialLocked(fl)
	t.mu.Unlock()
	fl.mem.leave()
	if fl.check != nil {
		t.checks.leave(&fl.check.entry)
		t.idle.leave(&fl.check.idle)
	}
	t.unindex(fl)
}

// close aborts every flow and waits for the DNS handler's goroutines.
func (t *tcpForwarder) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	for _, fl := range t.all() {
		fl.abort(nat.ReasonStopped)
	}
	t.wg.Wait()
	t.acceptor.close()
}

// accountedConn charges what the DNS handler reads and writes to the flow.
type accountedConn struct {
	*gonet.TCPConn
	lease    *nat.Lease
	overhead int // of each segment
}

func (c *accountedConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	if n > 0 {
		c.lease.Account(nat.Original, 1, int64(n+c.overhead))
	}
	return n, err
}

func (c *accountedConn) Write(p []byte) (int, error) {
	n, err := c.TCPConn.Write(p)
	if n > 0 {
		c.lease.Account(nat.Reply, 1, int64(n+c.overhead))
	}
	return n, err
}

var _ waiter.EventListener = (*tcpFlow)(nil)
