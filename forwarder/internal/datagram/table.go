package datagram

// Flows of datagrams: what UDP and ICMP echo have in common.
//
//	flows: tuple as the sandbox sees it ──► Flow ──► hostSocket
//	                                                        │ peers: host-side address ──► Flow
//
// A hostSocket belongs to one endpoint of the sandbox (address and port, or echo identifier) and
// serves every peer of it: endpoint-independent mapping, RFC 4787 section 4.1. An arriving datagram
// is let in only if the sandbox has sent to its source address: address-dependent filtering,
// section 5. If the sandbox has not sent to its source port, it begins a flow, provided that the
// sandbox would be allowed to answer. A flow lives exactly as long as its nat.Lease, and a socket
// as long as one of its flows.
//
// Lock order: openMu, mu, hostSocket.mu. No lock is held while the flow table is asked for a lease,
// because the table may end another flow to make room and then calls expire. hostSocket.txMu and
// rxMu are separate (see there).
//
// The sandbox's packets arrive on the device reader. They are queued for the batch and sent when
// the link reports the end of the batch, so that packets for one socket share a system call and
// datagrams of one flow share a UDP_SEGMENT send.

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

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

const (
	// maxPending is how many packets of a batch may wait before they are sent.
	maxPending = 128
	// maxHostSockets bounds the host sockets of one kind, whatever the flow table allows.
	maxHostSockets = 16384
)

var errTooManySockets = errors.New("too many host sockets")

// Forwarder carries all UDP and ICMP of one forwarder.
type Forwarder struct {
	Emit *packet.Emitter
	UDP  *udpForwarder
	Echo *echoForwarder
}

// Config holds what the flows of datagrams share with the rest of the forwarder.
type Config struct {
	Gate     *admit.Gate
	Engine   *engine.Engine
	Dialer   *hostsock.Dialer
	Onlink   *onlink.Addrs
	Drops    *packet.Drops
	Emit     *packet.Emitter
	Errs     *packet.Errors
	Timer    *engine.Need
	Resolver packetServer // nil: there is none
	Ctx      context.Context
	Log      *slog.Logger
}

// packetServer answers DNS datagrams.
type packetServer interface {
	ServePacket(ctx context.Context, query []byte, from netip.AddrPort, reply func([]byte, policy.Outcome))
	AnswerPacket(query []byte, from netip.AddrPort) []byte
}

// New takes over the raw ICMP sockets, either of which may be missing. batched means that the link
// reports the end of each batch of packets.
func New(p Config, raw4, raw6 int, batched bool) *Forwarder {
	d := &Forwarder{Emit: p.Emit}
	d.UDP = newUDPForwarder(p, d)
	d.Echo = newEchoForwarder(p, d, raw4, raw6)
	d.UDP.Batched, d.Echo.Batched = batched, batched
	return d
}

// Flush sends the packets that wait for the end of the batch.
func (d *Forwarder) Flush() {
	d.UDP.flush()
	d.Echo.flush()
}

// Close ends every flow. The emitter must still work, and is closed last.
func (d *Forwarder) Close() {
	d.UDP.QUIC.Close()
	d.UDP.close()
	d.Echo.close()
	d.Emit.Close()
}

// Flow is one pair of a sandbox endpoint and a peer.
type Flow struct {
	admit.Pass
	d       *dgramTable
	Tuple   nat.Tuple      // key in flows: the tuple in the sandbox's packets
	Guest   netip.AddrPort // the sandbox's endpoint; the port is an echo identifier in ICMP
	Peer    netip.AddrPort // the far side as the sandbox sees it
	Target  netip.AddrPort // the far side as the host sees it
	ingress bool           // begun by a client of a published port
	moved   bool           // likewise, and refused at the sandbox's other family (otherfamily.go)
	quic    *QUICTuple     // of a flow whose first bytes were read; else nil
	echo    *echoFlow      // of a flow of echo requests; else nil
	Sock    *hostSocket    // nil for the resolver's flows; guarded by d.mu
	local   netip.Addr     // of a published flow: the host address that the client writes to, if known
	Sent    atomic.Uint64  // header fields of the last packet, see noteSent
	queries atomic.Int32   // of a short flow: sent and not answered
	short   atomic.Bool    // ends when every query has been answered (dns.go)
	Replied atomic.Bool    // the reply tuple is known
	unasked atomic.Bool    // begun by the peer, and the sandbox has sent nothing; cleared with d.mu and sock.mu held
	ended   bool           // guarded by d.mu
}

// noteSent stores the header of the sandbox's last packet, for an ICMP error to quote.
func (fl *Flow) noteSent(a packet.Arrival) {
	v := uint64(a.ID)<<48 | uint64(uint16(a.Size))<<32 | uint64(a.Meta.TTL)<<24 | uint64(a.Meta.Tos)<<16
	if a.Df {
		v |= 1
	}
	fl.Sent.Store(v)
}

func (fl *Flow) LastSent() (a packet.Arrival) {
	v := fl.Sent.Load()
	a.ID, a.Size = uint16(v>>48), int(uint16(v>>32))
	a.Meta = packet.Meta{TTL: uint8(v >> 24), Tos: uint8(v >> 16)}
	a.Df = v&1 != 0
	return a
}

// outDir is the direction of packets that the sandbox sends.
func (fl *Flow) outDir() nat.Dir {
	if fl.ingress {
		return nat.Reply
	}
	return nat.Original
}

func (fl *Flow) inDir() nat.Dir {
	if fl.ingress {
		return nat.Original
	}
	return nat.Reply
}

// Expire implements admitted.
func (fl *Flow) Expire(nat.Reason) { fl.d.forget(fl) }

// Abort implements admitted.
func (fl *Flow) Abort(reason nat.Reason) { fl.end(reason) }

// Halt implements admitted: both sending and receiving check revoked. After the cut, the peer does
// not begin anew on the same ports.
func (fl *Flow) Halt() {
	if fl.Tuple.Proto() == packet.ProtoUDP && !fl.ingress {
		fl.d.Gate.Tombs.Bury(fl.Tuple.Reverse())
	}
}

// UnderWay implements admitted: the hellos of all QUIC connections on the flow.
func (fl *Flow) UnderWay(policy.Query) []policy.Query {
	if fl.quic == nil {
		return nil
	}
	return fl.quic.questions()
}

// end releases the flow for a reason of ours. Its tuple is free before it is forgotten, as when the
// table ends it: a packet in between still finds the flow, not a tuple that is taken.
func (fl *Flow) end(reason nat.Reason) {
	fl.Release(reason)
	fl.d.forget(fl)
}

// dgramTable holds the flows of one protocol.
type dgramTable struct {
	Config
	all     *Forwarder
	n       dgramCounters
	Batched bool // the link reports the end of each batch of packets

	openMu sync.Mutex // held while a flow is set up, so that one endpoint gets one socket

	Mu     sync.RWMutex
	flows  map[nat.Tuple]*Flow
	Socks  map[netip.AddrPort]*hostSocket // by sandbox endpoint
	closed bool

	pendMu  sync.Mutex
	pending []TxItem

	flushMu sync.Mutex // orders senders; guards the fields below
	spare   []TxItem
	tx      *txBatch
}

type dgramCounters struct {
	flow, refused, sockets, unsolicited, hop   packet.Reason
	again, unreachable, forbidden, failed, big packet.Reason
	slowUp, slowDown                           packet.Reason
	errors, strayErrors                        *atomic.Uint64
}

func (d *dgramTable) init(p Config, all *Forwarder, proto string) {
	d.Config, d.all = p, all
	d.flows = make(map[nat.Tuple]*Flow)
	d.Socks = make(map[netip.AddrPort]*hostSocket)
	d.tx = new(txBatch)
	r := func(name string) packet.Reason { return d.Drops.Reason(proto + "_" + name) }
	d.n = dgramCounters{
		flow:        r("no_flow"),     // the flow table refused
		refused:     r("refused"),     // policy refused
		sockets:     r("no_socket"),   // no host socket available
		unsolicited: r("unsolicited"), // from a peer that the sandbox has not addressed
		hop:         r("hop_limit"),
		again:       r("send_queue_full"),
		unreachable: r("send_unreachable"),
		forbidden:   r("send_forbidden"),
		failed:      r("send_failed"),
		big:         r("send_too_big"),
		slowUp:      r("egress_bandwidth"),  // over the policy's limit
		slowDown:    r("ingress_bandwidth"), // likewise, to the sandbox
		errors:      d.Drops.Stats.Counter(proto + "_icmp_errors"),
		strayErrors: d.Drops.Stats.Counter(proto + "_stray_icmp_errors"),
	}
}

func (d *dgramTable) Lookup(t nat.Tuple) *Flow {
	d.Mu.RLock()
	fl := d.flows[t]
	d.Mu.RUnlock()
	return fl
}

// install makes fl findable, on the endpoint's socket or, if it has none yet, on the one that open
// returns. openMu is held.
func (d *dgramTable) install(fl *Flow, open func() (*hostSocket, error)) error {
	d.Mu.Lock()
	s := d.Socks[fl.Guest]
	full := len(d.Socks) >= maxHostSockets
	d.Mu.Unlock()
	if s == nil {
		if full {
			return errTooManySockets
		}
		var err error
		if s, err = open(); err != nil {
			return err
		}
	}
	d.Mu.Lock()
	if fl.ended || d.closed || s.dead {
		// The flow, or the last one of its socket, ended between the two locks.
		unused := !s.dead && len(s.peers) == 0
		s.dead = s.dead || unused
		d.Mu.Unlock()
		if unused {
			s.close()
		}
		return admit.ErrFlowEnded
	}
	d.Socks[fl.Guest] = s
	s.mu.Lock()
	s.guest = fl.Guest
	s.mu.Unlock()
	d.attachLocked(fl, s)
	d.Mu.Unlock()
	return nil
}

// attachLocked enters fl into both maps. mu is held for writing.
func (d *dgramTable) attachLocked(fl *Flow, s *hostSocket) {
	fl.Sock = s
	d.flows[fl.Tuple] = fl
	s.mu.Lock()
	s.addPeer(fl)
	s.mu.Unlock()
}

// asked notes that the sandbox sends to a peer that began the flow: from then on that address may
// begin others.
func (d *dgramTable) asked(fl *Flow) {
	d.Mu.Lock()
	defer d.Mu.Unlock()
	fl.Sock.mu.Lock()
	defer fl.Sock.mu.Unlock()
	if !fl.ended && fl.unasked.Swap(false) {
		fl.Sock.addKnown(fl)
	}
}

// forget removes a flow, and closes its socket if it was the last one. It may be called more than
// once.
func (d *dgramTable) forget(fl *Flow) {
	d.Mu.Lock()
	if fl.ended {
		d.Mu.Unlock()
		return
	}
	fl.ended = true
	if d.flows[fl.Tuple] == fl {
		delete(d.flows, fl.Tuple)
	}
	s, proto := fl.Sock, fl.Tuple.Proto()
	var last bool
	if s != nil {
		s.mu.Lock()
		s.removePeer(fl)
		last = len(s.peers) == 0 && !s.shared
		s.mu.Unlock()
		if last {
			s.dead = true
			if d.Socks[fl.Guest] == s {
				delete(d.Socks, fl.Guest)
			}
		}
	}
	d.Mu.Unlock()
	if s != nil && d.Gate.Tombs != nil && proto != packet.ProtoUDP && !fl.ingress {
		d.Gate.Tombs.Bury(nat.NewTuple(proto, netip.AddrPortFrom(fl.Target.Addr(), s.identifier()), netip.AddrPortFrom(fl.Guest.Addr(), fl.Tuple.Dst().Port())))
	}
	if last {
		s.close()
	}
	fl.rest()
}

// rest releases the state of the flow's QUIC connections and echo requests. It may be called again.
func (fl *Flow) rest() {
	if fl.quic != nil {
		fl.quic.detach(fl)
	}
	if fl.echo != nil {
		fl.d.all.Echo.Book.forget(fl)
	}
}

// startSocket makes a polled socket of a descriptor from the dialer.
func (d *dgramTable) startSocket(fd int, proto uint8) (*hostSocket, error) {
	s := d.newHostSocket(fd, proto, d.Dialer.Close)
	if proto == packet.ProtoUDP && d.Gate.Tombs != nil {
		s.tombs = d.Gate.Tombs
		s.tombs.Opened(s.ownPort())
	}
	if err := s.start(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (d *dgramTable) list() []*Flow {
	d.Mu.RLock()
	defer d.Mu.RUnlock()
	all := make([]*Flow, 0, len(d.flows))
	for _, fl := range d.flows {
		all = append(all, fl)
	}
	return all
}

// close ends every flow and closes every socket. No flow can begin afterwards.
func (d *dgramTable) close() {
	d.Mu.Lock()
	d.closed = true
	d.Mu.Unlock()
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

// refuse answers a packet whose flow policy did not allow: with silence, or as a reject rule of
// nftables does by default.
func (d *dgramTable) refuse(j admit.Judged, kind packet.ErrorKind, pkt *stack.PacketBuffer) {
	d.n.refused.Drop(pkt)
	told := j.Verdict.Action() == policy.Reject
	d.Gate.Refuse(j, told)
	if told {
		d.Errs.Tell(kind, 0, pkt)
	}
}

// lastHop handles a packet that may go no further than the gateway, which is a hop like any router.
// It reports whether pkt was such a packet.
func (d *dgramTable) lastHop(a packet.Arrival, pkt *stack.PacketBuffer) bool {
	if a.Meta.TTL > 1 || d.Onlink.IsOwn(a.Dst) {
		return false
	}
	d.n.hop.Add(1)
	d.Errs.Tell(packet.ICMPTimeExceeded, 0, pkt)
	return true
}

// noSocketReason is why a flow ends when the host gave no socket.
func noSocketReason(err error) nat.Reason {
	return cmp.Or(hostsock.Shortage(tcpflow.ErrnoOf(err)), nat.ReasonNoSocket)
}

// noSocket answers a packet for which the host has no socket left.
func (d *dgramTable) noSocket(err error, pkt *stack.PacketBuffer) {
	d.n.sockets.Drop(pkt)
	if errors.Is(err, admit.ErrFlowEnded) {
		return
	}
	kind := packet.ICMPHostUnreachable
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		kind = packet.ICMPAdminProhibited
	}
	d.Errs.Tell(kind, 0, pkt)
}
