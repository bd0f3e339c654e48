package inbound

// Traffic from outside, as packets.
//
// A pod behind a CNI plugin keeps its address, and its clients speak to the pod's own kernel: every
// port works, the pod itself refuses closed ones, and it sees the client's address. So these flows
// are not terminated here. Their packets come on a second link (Config.Inbound, the TUN device in0
// of the uplink namespace), are judged and tracked, and go on to the sandbox as they are:
//
//	            Config.Inbound                          Config.Link
//	outside ──► in0 ──► parse ──► flow, or policy ────────► tap ──► pod
//	outside ◄── in0 ◄───────────── flow? ◄── parse ◄─────── tap ◄── pod
//	                                 │ no
//	                                 ▼
//	                     the filter and the stack, as ever
//
// A packet belongs to a flow by its tuple alone, in both directions; packets from the sandbox that
// are not answers take the usual way. The tracking is nf_conntrack's: TCP by flags (tcp.go), UDP
// and others by time, ICMP errors by what they quote (icmp.go), fragments by their identifier
// (frag.go).
//
// An inbound flow lets the sandbox speak to its client past the egress rules, as every API of the
// field has it, so only a client may begin one, with a SYN, a datagram or an echo request that
// ingress policy allows and that is not left over from our own sockets (tombs.go). A packet from
// the sandbox is not an answer if it begins a flow itself (a SYN, an echo request), asks a resolver
// while names are gated, or carries a route of its own.
//
// Offloads survive: a segment of 64 KiB with an open checksum leaves as one, and nothing is copied.
// The kernel of the uplink namespace forwards between in0 and the pod's old interface and so
// decrements each packet's hop limit; it is restored here, because the pod must appear directly
// attached.
//
// Transport checksums are not verified: both ends do that themselves. At worst a corrupt packet
// changes a flow's state, as in the kernel with nf_conntrack_checksum off.
//
// The readers of both links call this package concurrently. No lock is held while the flow table or
// a link is called.

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// Config is what the packet path shares with the rest of the forwarder.
type Config struct {
	Gate   *admit.Gate
	Onlink *onlink.Addrs
	Drops  *packet.Drops
	Link   stack.LinkEndpoint // to the outside
	Asks   func(netip.AddrPort) bool
}

// Path is the packet path of one forwarder.
type Path struct {
	Config
	In0     outlet // to the outside
	Sandbox outlet
	// in and out are the queues of packets while bandwidth is limited.
	in, Out shaper
	Ruled   []*ruleQueues // before them, of rules with bandwidth of their own; guarded by mu
	Frags   fragTable
	replies packet.TokenBucket // bounds resets and errors that are made here
	n       outsideCounters

	// Count is len(flows): while it is 0 the sandbox's packets are not examined.
	Count atomic.Int32
	mu    sync.RWMutex
	flows map[nat.Tuple]*inboundFlow // by original tuple: from outside to the sandbox
	// closed means that no flow may begin any more.
	closed bool
	Memory FlowMemory
	// Waiting means that there are no rules yet by which to judge the previous worker's flows.
	Waiting atomic.Bool

	beginMu sync.Mutex // serialises begin: one flow for one tuple
}

type outsideCounters struct {
	short, version, length, headers, family, foreign, martian, protocol packet.Reason
	tcpFlags, tcpStray, icmpType, icmpUnrelated, icmpQuote              packet.Reason
	fragment, fragmentShort, sourceRoute                                packet.Reason
	refused, flow, bandwidth, waiting, rests                            packet.Reason
	began, restored, related, rejected, limited, writeFailed            *atomic.Uint64
}

// New prepares the path between parts.link and the sandbox's link. memory holds the previous
// worker's record of its flows; it is nil if nothing outlives this worker.
func New(parts Config, sandbox stack.LinkEndpoint, memory []byte) *Path {
	r, c := parts.Drops.Reason, parts.Drops.Stats.Counter
	o := &Path{
		Config: parts,

		In0:     NewOutlet(parts.Link),
		Sandbox: NewOutlet(sandbox),
		Frags:   newFragTable(),
		replies: packet.TokenBucket{Rate: packet.ICMPErrorsPerSec, Burst: packet.ICMPErrorsBurst},
		flows:   make(map[nat.Tuple]*inboundFlow),
		n: outsideCounters{
			short:         r("inbound_short_packet"),
			version:       r("inbound_ip_version"),
			length:        r("inbound_length"),
			headers:       r("inbound_headers"), // more extension headers than any honest packet
			family:        r("inbound_ethertype"),
			foreign:       r("inbound_foreign_destination"),
			martian:       r("inbound_martian_source"),
			protocol:      r("inbound_protocol"),
			tcpFlags:      r("inbound_tcp_flags"),
			tcpStray:      r("inbound_tcp_stray"), // of no flow, and unable to begin one: answered by a reset
			sourceRoute:   r("inbound_source_route"),
			rests:         r("inbound_rests"), // on a tuple of our own sockets, or of a refused flow
			icmpType:      r("inbound_icmp_type"),
			icmpUnrelated: r("inbound_icmp_unrelated"),
			icmpQuote:     r("inbound_icmp_quote"), // an error whose quotation cannot be read
			fragment:      r("inbound_fragment"),   // of a packet whose first fragment was not let through
			fragmentShort: r("inbound_fragment_short"),
			refused:       r("inbound_refused"),
			flow:          r("inbound_no_flow"), // the flow table has no room
			bandwidth:     r("inbound_bandwidth"),
			waiting:       r("inbound_not_ready"), // no rules yet
			began:         c("inbound_flows"),
			restored:      c("inbound_flows_restored"), // from the previous worker
			related:       c("inbound_icmp_related"),
			rejected:      c("inbound_rejected"), // resets and errors sent outside
			limited:       c("inbound_rejected_limited"),
			writeFailed:   c("inbound_write_failed"),
		},
	}
	o.in = shaper{o: o, bucket: &parts.Gate.Bandwidth.Down, to: &o.Sandbox}
	o.Out = shaper{o: o, bucket: &parts.Gate.Bandwidth.Up, to: &o.In0}
	if memory != nil {
		o.Memory.Data = memory
		o.Waiting.Store(true)
	}
	return o
}

// Attach starts taking packets from the inbound link. It is called once the stack works.
func (o *Path) Attach() { o.Link.Attach(o) }

// Detach stops the link's readers.
func (o *Path) Detach() {
	o.Link.Close()
	o.Link.Wait()
}

// DeliverLinkPacket implements stack.NetworkDispatcher; nothing listens below IP.
func (o *Path) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

// KeepsRXChecksumValidated tells the device to leave open checksums open.
func (o *Path) KeepsRXChecksumValidated() bool { return true }

// DeliverNetworkPacket is called by the inbound device's reader for each packet.
func (o *Path) DeliverNetworkPacket(_ tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if why := o.arrive(pkt); why.Uint64 != nil {
		why.DropArrived(pkt)
	}
}

// arrive carries one packet from outside to the sandbox, or returns why not.
func (o *Path) arrive(pkt *stack.PacketBuffer) packet.Reason {
	var p datum
	if why := o.parse(pkt, &p); why.Uint64 != nil {
		return why
	}
	switch {
	case !slices.Contains(o.Onlink.Guest, p.dst):
		return o.n.foreign
	case p.src.IsLoopback() || p.src.IsMulticast() || p.src.IsUnspecified() || o.Onlink.IsGuest(p.src) || o.Onlink.IsOwn(p.src) || o.Onlink.IsSubnetBroadcast(p.src):
		return o.n.martian
	case p.routed:
		return o.n.sourceRoute
	case o.Waiting.Load():
		return o.n.waiting // its flow will be known once the previous worker's are restored
	}
	if p.frag == fragLater {
		fl := o.Frags.find(nat.Original, &p, o.Gate.Now())
		if fl == nil {
			return o.n.fragment
		}
		return o.pass(fl, nat.Original, pkt, &p)
	}
	if why := o.parseTransport(pkt, &p); why.Uint64 != nil {
		return why
	}
	if p.icmp == icmpIsError {
		return o.errorFromOutside(pkt, &p)
	}
	if p.icmp == icmpIsReply {
		return o.n.icmpType // the sandbox asks by sockets
	}
	tuple := p.tuple()
	fl := o.Lookup(tuple)
	if fl != nil && p.proto == packet.ProtoTCP {
		if reopened := fl.track(nat.Original, &p); reopened {
			fl.end(nat.ReasonReopened)
			fl = nil
		}
	}
	if fl == nil {
		var why packet.Reason
		if fl, why = o.begin(tuple, pkt, &p); fl == nil {
			if p.frag == fragFirst {
				o.Frags.forget(nat.Original, &p) // an earlier packet had the same identifier
			}
			return why
		}
	}
	if p.frag == fragFirst {
		o.Frags.note(nat.Original, &p, fl, o.Gate.Now())
	}
	return o.pass(fl, nat.Original, pkt, &p)
}

// Answer carries a packet from the sandbox outside and returns true if it belongs to a flow from
// outside; otherwise it returns false. Only the device has checked the packet so far.
func (o *Path) Answer(pkt *stack.PacketBuffer) bool {
	if o.Count.Load() == 0 && !o.Waiting.Load() {
		return false
	}
	var p datum
	if why := o.parse(pkt, &p); why.Uint64 != nil || p.routed {
		return false
	}
	if o.Waiting.Load() {
		o.n.waiting.Add(1)
		return true
	}
	var fl *inboundFlow
	if p.frag == fragLater {
		fl = o.Frags.find(nat.Reply, &p, o.Gate.Now())
	} else {
		if why := o.parseTransport(pkt, &p); why.Uint64 != nil {
			return false
		}
		switch p.icmp {
		case icmpIsError:
			return o.errorFromSandbox(pkt, &p)
		case icmpIsRequest:
			return false
		}
		if o.forGate(&p) {
			return false
		}
		fl = o.Lookup(p.tuple().Reverse())
	}
	if fl == nil {
		return false
	}
	if p.proto == packet.ProtoTCP && p.frag != fragLater {
		if p.tcp.Flags()&tcpFlagsMask == header.TCPFlagSyn {
			// The sandbox begins its own flow on the same two ports: the client's is over, or both
			// begin at once.
			if fl.over() {
				fl.end(nat.ReasonReopened)
			}
			return false
		}
		fl.track(nat.Reply, &p)
	}
	if p.frag == fragFirst {
		o.Frags.note(nat.Reply, &p, fl, o.Gate.Now())
	}
	if why := o.pass(fl, nat.Reply, pkt, &p); why.Uint64 != nil {
		why.DropArrived(pkt)
	}
	return true
}

// forGate reports whether the sandbox's packet asks a resolver while names are gated. It is then
// the gate's, whatever flow exists.
func (o *Path) forGate(p *datum) bool {
	return p.dport == onlink.DNSPort && (p.proto == packet.ProtoUDP || p.proto == packet.ProtoTCP) && o.Gate.Rules.Load().GatesNames()
}

// pass accounts for a packet of a flow and sends it on.
func (o *Path) pass(fl *inboundFlow, d nat.Dir, pkt *stack.PacketBuffer, p *datum) packet.Reason {
	way, to := &o.in, &o.Sandbox
	if d == nat.Reply {
		way, to = &o.Out, &o.In0
	}
	if limits := fl.Shape.Load(); limits != nil {
		q := o.queues(limits)
		if way = &q.in; d == nat.Reply {
			way = &q.out
		}
	}
	restoreHop(p)
	if !way.send(to.prepare(pkt, p), p.size) {
		return o.n.bandwidth
	}
	fl.Lease.Account(d, 1, int64(p.size))
	return packet.Reason{}
}

// forward sends on a packet that belongs to no flow.
func (o *Path) forward(to *outlet, pkt *stack.PacketBuffer, p *datum) {
	restoreHop(p)
	next := to.prepare(pkt, p)
	defer next.DecRef()
	if !to.write(next) {
		o.n.writeFailed.Add(1)
	}
}

func (o *Path) Lookup(orig nat.Tuple) *inboundFlow {
	o.mu.RLock()
	fl := o.flows[orig]
	o.mu.RUnlock()
	return fl
}

// list returns the current flows.
func (o *Path) list() []*inboundFlow {
	o.mu.RLock()
	defer o.mu.RUnlock()
	all := make([]*inboundFlow, 0, len(o.flows))
	for _, fl := range o.flows {
		all = append(all, fl)
	}
	return all
}

// Close forgets every flow without telling its ends, which are alive: the pod's next worker takes
// the flows from memory.
func (o *Path) Close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	for _, fl := range o.list() {
		fl.end(nat.ReasonStopped)
	}
	o.mu.RLock()
	ruled := slices.Clone(o.Ruled)
	o.mu.RUnlock()
	for _, q := range ruled {
		q.in.close()
		q.out.close()
	}
	o.in.close()
	o.Out.close()
}

// isPod reports whether a is one of the sandbox's addresses.
func (o *Path) isPod(a netip.Addr) bool { return slices.Contains(o.Onlink.Guest, a) }
