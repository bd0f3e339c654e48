package forwarder

// Flows of datagrams: what UDP and ICMP echo have in common.
//
//	flows: tuple as the sandbox sees it ──► dgramFlow ──► hostSocket
//	                                                        │ peers: host-side address ──► dgramFlow
//
// A hostSocket belongs to one endpoint of the sandbox (address and port, or echo
// identifier) and serves every peer of it: endpoint-independent mapping, RFC 4787
// section 4.1. What arrives on it is let in only if the sandbox has sent to that
// address: address-dependent filtering, section 5. From a port that it has not sent
// to, it begins a flow if the sandbox would be allowed to answer. A flow lives
// exactly as long as its nat.Lease; a socket as long as one of its flows.
//
// Lock order: openMu, mu, hostSocket.mu. No lock is held while the flow table is
// asked for a lease, because the table may end another flow to make room and then
// calls expire. hostSocket.txMu and rxMu stand apart (see there).
//
// The sandbox's packets arrive on the device reader. They are queued for the batch
// and sent when the link says that the batch is over, so that packets for one
// socket share a system call and datagrams of one flow share a UDP_SEGMENT send.

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice/nat"
	"sluice/policy"
)

const (
	// maxPending is how many packets of a batch wait at most before they are sent.
	maxPending = 128
	// maxHostSockets bounds the host sockets of one kind, whatever the flow table allows.
	maxHostSockets = 16384
)

var errTooManySockets = errors.New("too many host sockets")

// datagrams is everything of UDP and ICMP in one forwarder.
type datagrams struct {
	emit *emitter
	udp  *udpForwarder
	echo *echoForwarder
}

// dgramParts are what the flows of datagrams share with the rest of the forwarder.
type dgramParts struct {
	gate     *admission
	engine   *engine
	dialer   *Dialer
	onlink   *addrs
	drops    *drops
	emit     *emitter
	errs     *icmpErrors
	timer    *need
	resolver packetServer // nil: there is none
	ctx      context.Context
	log      *slog.Logger
}

// packetServer answers the datagrams of DNS.
type packetServer interface {
	ServePacket(ctx context.Context, query []byte, from netip.AddrPort, reply func([]byte, policy.Outcome))
	AnswerPacket(query []byte, from netip.AddrPort) []byte
}

// newDatagrams takes over the raw ICMP sockets, each of which may be missing. batched: the
// link says when a batch of packets ends.
func newDatagrams(p dgramParts, raw4, raw6 int, batched bool) *datagrams {
	d := &datagrams{emit: p.emit}
	d.udp = newUDPForwarder(p, d)
	d.echo = newEchoForwarder(p, d, raw4, raw6)
	d.udp.batched, d.echo.batched = batched, batched
	return d
}

// flush sends what waits for the end of the batch.
func (d *datagrams) flush() {
	d.udp.flush()
	d.echo.flush()
}

// close ends every flow. The emitter must still work, and is closed last.
func (d *datagrams) close() {
	d.udp.quic.close()
	d.udp.close()
	d.echo.close()
	d.emit.close()
}

// dgramFlow is one pair of a sandbox endpoint and a peer.
type dgramFlow struct {
	pass
	d       *dgramTable
	tuple   nat.Tuple      // key in flows: what a packet of the sandbox carries
	guest   netip.AddrPort // the sandbox's endpoint; the port is an echo identifier in ICMP
	peer    netip.AddrPort // the far side as the sandbox sees it
	target  netip.AddrPort // the far side as the host sees it
	ingress bool           // begun by a client of a published port
	quic    *quicTuple     // of a flow whose first bytes were read; nil else
	echo    *echoFlow      // of a flow of echo requests; nil else
	sock    *hostSocket    // nil for the resolver's flows; guarded by d.mu
	local   netip.Addr     // of a published flow: the host's address that the client writes to, if known
	sent    atomic.Uint64  // header fields of the last packet, see noteSent
	queries atomic.Int32   // of a short flow: sent and not answered
	short   atomic.Bool    // done when every query was answered (query.go)
	replied atomic.Bool    // the reply tuple is known
	unasked atomic.Bool    // begun by the peer, and the sandbox has sent nothing; cleared with d.mu and sock.mu held
	ended   bool           // guarded by d.mu
}

// noteSent remembers the header of the sandbox's last packet, for an ICMP error to quote.
func (fl *dgramFlow) noteSent(a arrival) {
	v := uint64(a.id)<<48 | uint64(uint16(a.size))<<32 | uint64(a.meta.ttl)<<24 | uint64(a.meta.tos)<<16
	if a.df {
		v |= 1
	}
	fl.sent.Store(v)
}

func (fl *dgramFlow) lastSent() (a arrival) {
	v := fl.sent.Load()
	a.id, a.size = uint16(v>>48), int(uint16(v>>32))
	a.meta = ipMeta{ttl: uint8(v >> 24), tos: uint8(v >> 16)}
	a.df = v&1 != 0
	return a
}

// outDir is the direction of packets that the sandbox sends.
func (fl *dgramFlow) outDir() nat.Dir {
	if fl.ingress {
		return nat.Reply
	}
	return nat.Original
}

func (fl *dgramFlow) inDir() nat.Dir {
	if fl.ingress {
		return nat.Original
	}
	return nat.Reply
}

// expire implements admitted.
func (fl *dgramFlow) expire(nat.Reason) { fl.d.forget(fl) }

// abort implements admitted.
func (fl *dgramFlow) abort(reason nat.Reason) { fl.end(reason) }

// halt implements admitted: who sends and who receives look at revoked. The peer of what
// was cut off does not begin anew by the same ports.
func (fl *dgramFlow) halt() {
	if fl.tuple.Proto() == protoUDP && !fl.ingress {
		fl.d.gate.tombs.bury(fl.tuple.Reverse())
	}
}

// underWay implements admitted: all that QUIC connections on the flow have said.
func (fl *dgramFlow) underWay(policy.Query) []policy.Query {
	if fl.quic == nil {
		return nil
	}
	return fl.quic.questions()
}

// end releases the flow for a reason of ours. Its tuple is free before it is forgotten, as
// when the table ends it: what comes in between still finds the flow, not a tuple that
// somebody has.
func (fl *dgramFlow) end(reason nat.Reason) {
	fl.release(reason)
	fl.d.forget(fl)
}

// dgramTable holds the flows of one protocol.
type dgramTable struct {
	dgramParts
	all     *datagrams
	n       dgramCounters
	batched bool // the link says when a batch of packets ends

	openMu sync.Mutex // held while a flow is set up, so that one endpoint gets one socket

	mu     sync.RWMutex
	flows  map[nat.Tuple]*dgramFlow
	socks  map[netip.AddrPort]*hostSocket // by sandbox endpoint
	closed bool

	pendMu  sync.Mutex
	pending []txItem

	flushMu sync.Mutex // orders senders; guards what follows
	spare   []txItem
	tx      *txBatch
}

type dgramCounters struct {
	flow, refused, sockets, unsolicited, hop   reason
	again, unreachable, forbidden, failed, big reason
	slowUp, slowDown                           reason
	errors, strayErrors                        *atomic.Uint64
}

func (d *dgramTable) init(p dgramParts, all *datagrams, proto string) {
	d.dgramParts, d.all = p, all
	d.flows = make(map[nat.Tuple]*dgramFlow)
	d.socks = make(map[netip.AddrPort]*hostSocket)
	d.tx = new(txBatch)
	r := func(name string) reason { return d.drops.reason(proto + "_" + name) }
	d.n = dgramCounters{
		flow:        r("no_flow"),     // the flow table refused
		refused:     r("refused"),     // policy refused
		sockets:     r("no_socket"),   // no host socket to be had
		unsolicited: r("unsolicited"), // from a peer that the sandbox has not addressed
		hop:         r("hop_limit"),
		again:       r("send_queue_full"),
		unreachable: r("send_unreachable"),
		forbidden:   r("send_forbidden"),
		failed:      r("send_failed"),
		big:         r("send_too_big"),
		slowUp:      r("egress_bandwidth"),  // over the policy's limit
		slowDown:    r("ingress_bandwidth"), // likewise, to the sandbox
		errors:      d.drops.stats.counter(proto + "_icmp_errors"),
		strayErrors: d.drops.stats.counter(proto + "_stray_icmp_errors"),
	}
}

func (d *dgramTable) lookup(t nat.Tuple) *dgramFlow {
	d.mu.RLock()
	fl := d.flows[t]
	d.mu.RUnlock()
	return fl
}

// install makes fl findable, on the endpoint's socket or, if it has none yet, on
// one that open returns. openMu is held.
func (d *dgramTable) install(fl *dgramFlow, open func() (*hostSocket, error)) error {
	d.mu.Lock()
	s := d.socks[fl.guest]
	full := len(d.socks) >= maxHostSockets
	d.mu.Unlock()
	if s == nil {
		if full {
			return errTooManySockets
		}
		var err error
		if s, err = open(); err != nil {
			return err
		}
	}
	d.mu.Lock()
	if fl.ended || d.closed || s.dead {
		// The flow, or the last one of its socket, ended between the two locks.
		unused := !s.dead && len(s.peers) == 0
		s.dead = s.dead || unused
		d.mu.Unlock()
		if unused {
			s.close()
		}
		return errFlowEnded
	}
	d.socks[fl.guest] = s
	s.mu.Lock()
	s.guest = fl.guest
	s.mu.Unlock()
	d.attachLocked(fl, s)
	d.mu.Unlock()
	return nil
}

// attachLocked enters fl into both maps. mu is held for writing.
func (d *dgramTable) attachLocked(fl *dgramFlow, s *hostSocket) {
	fl.sock = s
	d.flows[fl.tuple] = fl
	s.mu.Lock()
	s.addPeer(fl)
	s.mu.Unlock()
}

// asked notes that the sandbox sends to a peer that began the flow: from then on the
// address may begin others.
func (d *dgramTable) asked(fl *dgramFlow) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fl.sock.mu.Lock()
	defer fl.sock.mu.Unlock()
	if !fl.ended && fl.unasked.Swap(false) {
		fl.sock.addKnown(fl)
	}
}

// forget removes a flow, and closes its socket if it was the last one. It may be
// called more than once.
func (d *dgramTable) forget(fl *dgramFlow) {
	d.mu.Lock()
	if fl.ended {
		d.mu.Unlock()
		return
	}
	fl.ended = true
	if d.flows[fl.tuple] == fl {
		delete(d.flows, fl.tuple)
	}
	s, proto := fl.sock, fl.tuple.Proto()
	var last bool
	if s != nil {
		s.mu.Lock()
		s.removePeer(fl)
		last = len(s.peers) == 0 && !s.shared
		s.mu.Unlock()
		if last {
			s.dead = true
			if d.socks[fl.guest] == s {
				delete(d.socks, fl.guest)
			}
		}
	}
	d.mu.Unlock()
	if s != nil && d.gate.tombs != nil && proto != protoUDP && !fl.ingress {
		d.gate.tombs.bury(nat.NewTuple(proto, netip.AddrPortFrom(fl.target.Addr(), s.identifier()), netip.AddrPortFrom(fl.guest.Addr(), fl.tuple.Dst().Port())))
	}
	if last {
		s.close()
	}
	fl.rest()
}

// rest lets go of what is known of the flow's QUIC connections and echo requests. It may
// be called again.
func (fl *dgramFlow) rest() {
	if fl.quic != nil {
		fl.quic.detach(fl)
	}
	if fl.echo != nil {
		fl.d.all.echo.book.forget(fl)
	}
}

// startSocket makes a polled socket of a descriptor of the dialer's.
func (d *dgramTable) startSocket(fd int, proto uint8) (*hostSocket, error) {
	s := d.newHostSocket(fd, proto, d.dialer.close)
	if proto == protoUDP && d.gate.tombs != nil {
		s.tombs = d.gate.tombs
		s.tombs.opened(s.ownPort())
	}
	if err := s.start(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (d *dgramTable) list() []*dgramFlow {
	d.mu.RLock()
	defer d.mu.RUnlock()
	all := make([]*dgramFlow, 0, len(d.flows))
	for _, fl := range d.flows {
		all = append(all, fl)
	}
	return all
}

// close ends every flow and closes every socket. No flow can begin afterwards.
func (d *dgramTable) close() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	for _, fl := range d.list() {
		fl.end(nat.ReasonStopped)
	}
	d.pendMu.Lock()
	pending := d.pending
	d.pending = nil
	d.pendMu.Unlock()
	for i := range pending {
		pending[i].pkt.DecRef()
	}
}

// refuse answers a packet whose flow policy did not allow: with silence, or with
// what a reject rule of nftables sends by default.
func (d *dgramTable) refuse(j judged, kind icmpKind, pkt *stack.PacketBuffer) {
	d.n.refused.drop(pkt)
	told := j.verdict.Action() == policy.Reject
	d.gate.refuse(j, told)
	if told {
		d.errs.tell(kind, 0, pkt)
	}
}

// lastHop deals with a packet that may go no further than the gateway, which is a
// hop like any router. It reports whether there was such a packet.
func (d *dgramTable) lastHop(a arrival, pkt *stack.PacketBuffer) bool {
	if a.meta.ttl > 1 || d.onlink.isOwn(a.dst) {
		return false
	}
	d.n.hop.Add(1)
	d.errs.tell(icmpTimeExceeded, 0, pkt)
	return true
}

// noSocketReason is why a flow ends for which the host gave no socket.
func noSocketReason(err error) nat.Reason {
	return cmp.Or(shortage(errnoOf(err)), nat.ReasonNoSocket)
}

// noSocket answers a packet for which the host has no socket left.
func (d *dgramTable) noSocket(err error, pkt *stack.PacketBuffer) {
	d.n.sockets.drop(pkt)
	if errors.Is(err, errFlowEnded) {
		return
	}
	kind := icmpHostUnreachable
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		kind = icmpAdminProhibited
	}
	d.errs.tell(kind, 0, pkt)
}
