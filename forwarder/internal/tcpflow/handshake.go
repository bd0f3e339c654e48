package tcpflow

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
// endpoint and therefore comes to HandleTCP as well; more often it just stops
// repeating its SYN, and the dial ends when the next one is overdue. One that never completes
// the handshake is ended after HandshakeTimeout, or earlier, oldest first, when
// there are more than MaxHandshakes of them, by the RST it did not send.
//
// TIME_WAIT. When the stack's side closes last-but-one it would hold the tuple,
// and without a listener swallow every new SYN for it. This link neither loses
// nor reorders, so there are no old duplicates to wait for: an endpoint that
// reaches TIME_WAIT leaves the demultiplexer at once (Flow.settle), and a new
// SYN comes to HandleTCP like any other.

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

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/gate"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/seldom"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

const (
	// MaxHandshakes bounds the flows whose dial succeeded and whose sandbox has
	// not completed the handshake. Beyond it the oldest is reset.
	MaxHandshakes = 1024
	// HandshakeTimeout bounds each of them.
	HandshakeTimeout = 10 * time.Second
	// synRead is by when the stack has taken in a SYN that was given to it.
	synRead = time.Second
	// SynSlack is how much later than a doubled interval the next SYN may arrive before its sender
	// counts as having given up.
	SynSlack = 4 * time.Second
	// StackTimeWait is how long an endpoint object outlives its tuple.
	StackTimeWait = 20 * time.Millisecond
	// repeatedly is how many dials must fail within seldom.Every to be logged.
	repeatedly = 3
	// tracerouteTTL is the largest hop limit that is taken as deliberate: a SYN with at most this
	// many hops left is dialled with one less.
	tracerouteTTL = 30
)

// Config is what the TCP flows share with the rest of the forwarder.
type Config struct {
	Gate     *admit.Gate
	Engine   *engine.Engine
	Dialer   *hostsock.Dialer
	Onlink   *onlink.Addrs
	Drops    *packet.Drops
	Errs     *packet.Errors
	Timer    *engine.Need
	Stack    *stack.Stack
	Link     stack.LinkEndpoint
	Resolver streamServer // nil: there is none
	Ctx      context.Context
	Log      *slog.Logger
}

// streamServer answers the connections of DNS.
type streamServer interface {
	ServeStream(ctx context.Context, c net.Conn, became func(policy.Outcome))
}

// Forwarder owns the TCP flows of one sandbox.
type Forwarder struct {
	Config
	NIC      stack.NetworkDispatcher // takes segments as the sandbox's; set before the link delivers
	Acceptor *acceptor
	queue    *Queue // of every endpoint
	Inline   inlineTCP
	// gsoPayload is the payload of the largest packet that the stack makes of a write,
	// gso_max_size less MAX_TCP_HEADER as in Linux.
	gsoPayload int

	Mu         sync.Mutex
	numbers    atomic.Uint64 // of flows
	Flows      map[stack.TransportEndpointID]*Flow
	handshakes list.List // of *Flow, oldest first
	Dials      list.List // of *Flow, those that wait for the far side
	gates      *gate.Shared
	Checks     *firstbytes.List
	failures   seldom.Failures
	Idle       *firstbytes.List // of clients of HTTP/2 that were greeted, for as long as they like
	wg         sync.WaitGroup   // of the DNS handler's connections
	closed     bool

	refused, Limited, cancelled, handshakeEvicted, handshakeExpired *atomic.Uint64
	dialTimeout, dialRefused, dialUnreachable, dialDescriptors      *atomic.Uint64
	shortRead, lastHop, malformed, noConnection                     *atomic.Uint64
	inwardLimited, noAddress                                        *atomic.Uint64
}

// New needs the stack, whose segments go through queue. batched: the link says
// when a batch of packets ends.
func New(parts Config, queue *Queue, batched bool) (*Forwarder, error) {
	c := parts.Drops.Stats.Counter
	t := &Forwarder{
		Config:           parts,
		queue:            queue,
		inwardLimited:    c("ingress_refused_by_limit"),
		noAddress:        c("ingress_accept_failed"),
		Flows:            make(map[stack.TransportEndpointID]*Flow),
		refused:          c("tcp_refused_by_policy"),
		Limited:          c("tcp_refused_by_limit"),
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
		gates:            gate.NewShared(parts.Gate, parts.Drops.Stats),
		Checks:           firstbytes.NewList(parts.Drops.Stats, parts.Timer, parts.Gate.Now, "tcp"),
		Idle:             firstbytes.NewList(parts.Drops.Stats, parts.Timer, parts.Gate.Now, "tcp_idle"),
	}
	queue.t = t
	t.Inline.batched = batched
	t.gsoPayload = gate.Chunk
	if g, ok := parts.Link.(stack.GSOEndpoint); ok && g.SupportedGSO() == stack.HostGSOSupported {
		t.gsoPayload = int(g.GSOMaxSize()) - header.TCPTotalHeaderMaximumSize - 1
	}
	var err error
	t.Acceptor, err = newAcceptor(t)
	return t, err
}

// HandleTCP receives each segment that belongs to no endpoint. It runs on the device's goroutine.
// It returns true if the segment is handled; false makes the stack answer with RST.
func (t *Forwarder) HandleTCP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
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
	t.Mu.Lock()
	known := t.Flows[id]
	again := known != nil && t.meetLocked(known, h.SequenceNumber(), pkt)
	t.Mu.Unlock()
	switch {
	case again:
		t.Engine.Put(&known.kept.task)
		return true
	case known != nil:
		if known.inHandshake() {
			t.Acceptor.offer(id, pkt) // the stack has no endpoint for it: it had no room then
		}
		return true
	}

	src := netip.AddrPortFrom(packet.NetipAddr(id.RemoteAddress), id.RemotePort)
	dst := netip.AddrPortFrom(packet.NetipAddr(id.LocalAddress), id.LocalPort)
	a, ok := packet.ArrivalOf(pkt)
	if !ok {
		return true
	}
	own := t.Onlink.IsOwn(dst.Addr())
	if a.Meta.TTL <= 1 && !own {
		t.lastHop.Add(1)
		t.Errs.Tell(packet.ICMPTimeExceeded, 0, pkt)
		return true
	}
	j := t.Gate.Decide(policy.Query{Proto: unix.IPPROTO_TCP, Src: src, Dst: dst})
	if !j.MayBegin() {
		t.refused.Add(1)
		t.Drops.Refused("policy", pkt)
		t.Gate.Refuse(j, j.Verdict.Action() == policy.Reject)
		return j.Verdict.Action() != policy.Reject
	}
	fl := &Flow{T: t, number: t.numbers.Add(1), id: id, local: j.Local}
	fl.FD, fl.Irs = -1, h.SequenceNumber()
	if j.Waits() {
		fl.check = newCheck(fl)
	}
	fl.hops.Tos = a.Meta.Tos
	if a.Meta.TTL <= tracerouteTTL && !own {
		fl.hops.TTL = a.Meta.TTL - 1
	}
	fl.firstSYN = t.Gate.Now()
	fl.lastSYN = fl.firstSYN
	fl.Syn = pkt.IncRef()
	if err := t.Gate.Enter(&fl.Pass, fl, j, admit.Entry{Orig: nat.NewTuple(unix.IPPROTO_TCP, src, dst), Memory: &fl.mem.Shares, Pending: fl.pending}); err != nil {
		t.Gate.NoteLimit(t.Limited, j, err)
		t.Drops.Refused(err.Error(), pkt)
		fl.Abort(nat.ReasonStopped) // it was never in the table, which gives it no record
		return true
	}
	fl.Lease.SetState(nat.SynSent)
	fl.Lease.Account(nat.Original, 1, int64(pkt.Size()))
	if !t.index(fl) {
		fl.Abort(nat.ReasonStopped)
		return true
	}
	if fl.local {
		fl.answer()
	} else {
		fl.dial()
	}
	return true
}

// index makes an admitted flow findable by its segments. It fails if no flow may begin any more, or
// if this one has ended already.
func (t *Forwarder) index(fl *Flow) bool {
	t.Mu.Lock()
	if t.closed {
		t.Mu.Unlock()
		return false
	}
	t.Flows[fl.id] = fl
	t.Mu.Unlock()
	return t.indexed(fl)
}

// indexed reports whether fl, which was put into the index, still belongs there.
func (t *Forwarder) indexed(fl *Flow) bool {
	if fl.Lease.Ended() {
		// Who ended it may have looked for it before it was here.
		t.forget(fl)
		return false
	}
	return true
}

// dial starts the connection to the far side.
func (fl *Flow) dial() {
	t := fl.T
	fl.Mu.Lock()
	if fl.Phase != phaseDialing || fl.Revoked.Load() {
		fl.Mu.Unlock()
		return
	}
	fd, connected, err := t.Dialer.TCPConnect(fl.Verdict(), fl.hops, packet.NetipAddr(fl.id.RemoteAddress))
	fl.FD = fd
	if err == nil && !connected {
		t.enterDial(fl)
		fl.tok, err = t.Engine.Poll.Add(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP, fl)
	}
	fl.Mu.Unlock()
	switch {
	case err != nil:
		fl.dialFailed(err)
	case connected:
		fl.answer()
	}
}

// dialReady is called by the poller when the attempt has ended.
func (fl *Flow) dialReady() {
	err := fl.dialResult()
	switch {
	case err == errNotDialing:
	case err != nil:
		fl.dialFailed(err)
	default:
		fl.answer()
	}
}

// errNotDialing means that the result of the dial is no longer wanted.
var errNotDialing = errors.New("not dialling")

// dialResult returns the result of the dial that the flow is waiting for.
func (fl *Flow) dialResult() error {
	// Under mu, as closeHost gives the descriptor back to the kernel after it.
	fl.Mu.Lock()
	defer fl.Mu.Unlock()
	if fl.Phase != phaseDialing || fl.FD < 0 || fl.Revoked.Load() {
		return errNotDialing
	}
	err := hostsock.Dialed(fl.FD, fl.Verdict().Contact().Addr().Is6())
	if errno := ErrnoOf(err); errno == unix.ECONNRESET || errno == unix.EPIPE {
		// The far side accepted, and has reset since: a SYN that is refused is ECONNREFUSED
		// (tcp_reset in net/ipv4/tcp_input.c). What it said before is there to be read.
		fl.broken.Store(uint32(errno))
		return nil
	}
	return err
}

// answer lets the sandbox's side complete its handshake.
func (fl *Flow) answer() {
	t := fl.T
	fl.Mu.Lock()
	if fl.Phase != phaseDialing {
		fl.Mu.Unlock()
		return
	}
	fl.Phase = phaseHandshake
	syn := fl.Syn
	fl.Syn = nil
	fl.Mu.Unlock()

	fl.Lease.SetState(nat.SynRecv)
	t.enterHandshake(fl)
	t.Acceptor.offer(fl.id, syn)
	syn.DecRef()
	if !fl.inHandshake() {
		// It was ended meanwhile, perhaps before the stack knew of it.
		t.endHandshake(fl)
	}
}

// dialFailed passes the far side's network error on to the sandbox.
func (fl *Flow) dialFailed(err error) {
	t := fl.T
	reason := fl.dialReason(err)
	t.tellFailed(fl.Verdict().Contact(), err)
	switch reason {
	case nat.ReasonRefused:
		fl.Mu.Lock()
		fl.resetOnComplete = true
		fl.Mu.Unlock()
	case nat.ReasonUnreachable:
		fl.Mu.Lock()
		syn := packet.OriginalPacket(fl.Syn)
		var e packet.ExtendedErr
		fromNetwork := false
		if fl.FD >= 0 {
			e, fromNetwork = hostsock.DialError(fl.FD)
		}
		fl.Mu.Unlock()
		t.Errs.TellDialError(syn, e, fromNetwork, ErrnoOf(err))
	}
	fl.Abort(reason)
}

// accepted receives an endpoint whose handshake the sandbox has completed.
func (t *Forwarder) accepted(ep *tcp.Endpoint, wq *waiter.Queue) {
	t.Mu.Lock()
	fl := t.Flows[ep.TransportEndpointInfo.ID]
	local := fl != nil && fl.local && !t.closed
	if local {
		t.wg.Add(1) // for serveLocal
	}
	t.Mu.Unlock()
	if fl == nil || !fl.inHandshake() {
		ep.Abort()
		ep.Close()
		if local {
			t.wg.Done()
		}
		return
	}
	t.leaveHandshake(fl)
	t.Dialer.ProbeInside(ep)
	if fl.check != nil {
		fl.wq = wq
		fl.check.verify(ep)
		return
	}
	fl.Lease.SetState(nat.Established)
	if local {
		fl.mem.HoldStream(ep)
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
func (t *Forwarder) serveLocal(fl *Flow, c *gonet.TCPConn) {
	ctx, cancel := context.WithCancel(t.Ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	fl.Mu.Lock()
	if fl.Phase != phaseHandshake || fl.Revoked.Load() {
		fl.Mu.Unlock()
		stop()
		c.Close()
		return
	}
	fl.Phase = PhaseOpen
	fl.cancel = cancel
	fl.Mu.Unlock()
	t.Resolver.ServeStream(ctx, &accountedConn{TCPConn: c, lease: fl.Lease, overhead: Overhead(fl.id.RemoteAddress.Len() == 4)}, fl.Answered)
	stop()
	c.Close()
	fl.Abort(nat.ReasonClosed)
}

// All returns the current flows.
func (t *Forwarder) All() []*Flow {
	t.Mu.Lock()
	defer t.Mu.Unlock()
	return slices.Collect(maps.Values(t.Flows))
}

// unindex removes fl from the index, if it is still the tuple's flow, and admits a SYN that waits
// for the tuple.
func (t *Forwarder) unindex(fl *Flow) {
	t.Mu.Lock()
	id := fl.id
	if t.Flows[id] == fl {
		delete(t.Flows, id)
	}
	syn := t.takeKeptLocked(fl)
	t.Mu.Unlock()
	if syn != nil {
		t.begin(id, syn)
		syn.DecRef()
	}
}

// forget releases what fl has besides its sockets and its lease, which is released by then: a flow
// may begin on the same ports.
func (t *Forwarder) forget(fl *Flow) {
	t.Mu.Lock()
	t.leaveDialLocked(fl)
	t.Mu.Unlock()
	fl.mem.Leave()
	if fl.check != nil {
		fl.check.leave()
	}
	t.unindex(fl)
}

// Close aborts every flow and waits for the DNS handler's goroutines.
func (t *Forwarder) Close() {
	t.Mu.Lock()
	t.closed = true
	t.Mu.Unlock()
	for _, fl := range t.All() {
		fl.Abort(nat.ReasonStopped)
	}
	t.wg.Wait()
	t.Acceptor.close()
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

var _ waiter.EventListener = (*Flow)(nil)
