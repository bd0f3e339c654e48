package forwarder

// Traffic from outside, as packets.
//
// A pod behind a CNI plugin keeps its address, and whoever speaks to that address
// speaks to the pod's own kernel: every port works, a closed one is refused by the
// pod itself, the client's address is seen. So these flows are not terminated here.
// Their packets come on a second link (Config.Inbound, the TUN device in0 of the
// uplink namespace), are judged and tracked, and go on to the sandbox as they are:
//
//	            Config.Inbound                          Config.Link
//	outside ──► in0 ──► parse ──► flow, or policy ────────► tap ──► pod
//	outside ◄── in0 ◄───────────── flow? ◄── parse ◄─────── tap ◄── pod
//	                                 │ no
//	                                 ▼
//	                     the filter and the stack, as ever
//
// What belongs to a flow is known by its tuple alone, in both directions; what the
// sandbox sends and is no answer goes the way of all that it sends. The tracking
// is nf_conntrack's: TCP by flags (inbound_tcp.go), UDP and others by time, ICMP
// errors by what they quote (inbound_icmp.go), fragments by their identifier
// (inbound_frag.go).
//
// An inbound flow lets the sandbox speak to its client past the egress rules, as every
// API of the field has it, so only a client may begin one, by what begins one: a SYN, a
// datagram or an echo request that ingress policy allows, and that is not the rest of
// something that our own sockets said (tombs.go). What the sandbox sends is no answer
// if it begins something itself (a SYN, an echo request), asks a resolver while
// names are gated, or carries a route of its own.
//
// Offloads survive: a segment of 64 KiB with an open checksum leaves as one, and
// nothing is copied. The kernel of the uplink namespace forwards between in0 and the
// pod's old interface and so takes one off each packet's hop limit; it is put back
// here, because the pod must look directly attached.
//
// Checksums of the transport are not verified: both ends do that themselves, and a
// corrupt packet can at worst move a flow's state, as it can the kernel's with
// nf_conntrack_checksum off.
//
// The two links' readers call in here at the same time. No lock is held while the
// flow table or a link is called.

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice/nat"
)

// outsideParts are what the packet path shares with the rest of the forwarder.
type outsideParts struct {
	gate   *admission
	onlink *addrs
	drops  *drops
	link   stack.LinkEndpoint // to the outside
	asks   func(netip.AddrPort) bool
}

// outside is the packet path of one forwarder.
type outside struct {
	outsideParts
	in0     outlet // to the outside
	sandbox outlet
	// in and out are the queues of flows' packets, while their bandwidth is limited.
	in, out shaper
	ruled   []*ruleQueues // before them, of rules with bandwidth of their own; guarded by mu
	frags   fragTable
	replies tokenBucket // bounds resets and errors that are made here
	n       outsideCounters

	// count is len(flows): while it is 0 the sandbox's packets are not looked at.
	count atomic.Int32
	mu    sync.RWMutex
	flows map[nat.Tuple]*inboundFlow // by original tuple: from outside to the sandbox
	// closed: no flow may begin any more.
	closed bool
	memory flowMemory
	// waiting: there are no rules yet to judge by what the worker before has left.
	waiting atomic.Bool

	beginMu sync.Mutex // serialises begin: one flow for one tuple
}

type outsideCounters struct {
	short, version, length, headers, family, foreign, martian, protocol reason
	tcpFlags, tcpStray, icmpType, icmpUnrelated, icmpQuote              reason
	fragment, fragmentShort, sourceRoute                                reason
	refused, flow, bandwidth, waiting, rests                            reason
	began, restored, related, rejected, limited, writeFailed            *atomic.Uint64
}

// newOutside readies the path between parts.link and the sandbox's link. memory is what the
// worker before has noted of its flows, nil if nothing outlives this one.
func newOutside(parts outsideParts, sandbox stack.LinkEndpoint, memory []byte) *outside {
	r, c := parts.drops.reason, parts.drops.stats.counter
	o := &outside{
		outsideParts: parts,

		in0:     newOutlet(parts.link),
		sandbox: newOutlet(sandbox),
		frags:   newFragTable(),
		replies: tokenBucket{rate: icmpErrorsPerSec, burst: icmpErrorsBurst},
		flows:   make(map[nat.Tuple]*inboundFlow),
		n: outsideCounters{
			short:         r("inbound_short_packet"),
			version:       r("inbound_ip_version"),
			length:        r("inbound_length"),
			headers:       r("inbound_headers"), // more extension headers than anybody needs
			family:        r("inbound_ethertype"),
			foreign:       r("inbound_foreign_destination"),
			martian:       r("inbound_martian_source"),
			protocol:      r("inbound_protocol"),
			tcpFlags:      r("inbound_tcp_flags"),
			tcpStray:      r("inbound_tcp_stray"), // of no flow, and nothing that begins one: answered by a reset
			sourceRoute:   r("inbound_source_route"),
			rests:         r("inbound_rests"), // by a tuple of our own sockets, or of a flow that was refused
			icmpType:      r("inbound_icmp_type"),
			icmpUnrelated: r("inbound_icmp_unrelated"),
			icmpQuote:     r("inbound_icmp_quote"), // an error whose quotation cannot be read
			fragment:      r("inbound_fragment"),   // of a packet whose beginning was not let through
			fragmentShort: r("inbound_fragment_short"),
			refused:       r("inbound_refused"),
			flow:          r("inbound_no_flow"), // the flow table has no room
			bandwidth:     r("inbound_bandwidth"),
			waiting:       r("inbound_not_ready"), // no rules yet
			began:         c("inbound_flows"),
			restored:      c("inbound_flows_restored"), // from the worker before
			related:       c("inbound_icmp_related"),
			rejected:      c("inbound_rejected"), // resets and errors sent outside
			limited:       c("inbound_rejected_limited"),
			writeFailed:   c("inbound_write_failed"),
		},
	}
	o.in = shaper{o: o, bucket: &parts.gate.bandwidth.down, to: &o.sandbox}
	o.out = shaper{o: o, bucket: &parts.gate.bandwidth.up, to: &o.in0}
	if memory != nil {
		o.memory.data = memory
		o.waiting.Store(true)
	}
	return o
}

// attach begins to take packets from the inbound link. Called once the stack works.
func (o *outside) attach() { o.link.Attach(o) }

// detach ends the link's readers.
func (o *outside) detach() {
	o.link.Close()
	o.link.Wait()
}

// DeliverLinkPacket implements stack.NetworkDispatcher; nobody listens below IP.
func (o *outside) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

// KeepsRXChecksumValidated tells the device to leave open checksums open.
func (o *outside) KeepsRXChecksumValidated() bool { return true }

// DeliverNetworkPacket is called by the inbound device's reader for each packet.
func (o *outside) DeliverNetworkPacket(_ tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if why := o.arrive(pkt); why.Uint64 != nil {
		why.dropArrived(pkt)
	}
}

// arrive carries one packet from outside to the sandbox, or says why not.
func (o *outside) arrive(pkt *stack.PacketBuffer) reason {
	var p datum
	if why := o.parse(pkt, &p); why.Uint64 != nil {
		return why
	}
	switch {
	case !slices.Contains(o.onlink.guest, p.dst):
		return o.n.foreign
	case p.src.IsLoopback() || p.src.IsMulticast() || p.src.IsUnspecified() || o.onlink.isGuest(p.src) || o.onlink.isOwn(p.src) || o.onlink.isSubnetBroadcast(p.src):
		return o.n.martian
	case p.routed:
		return o.n.sourceRoute
	case o.waiting.Load():
		return o.n.waiting // whose it is will be known when the flows of the worker before are
	}
	if p.frag == fragLater {
		fl := o.frags.find(nat.Original, &p, o.gate.now())
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
		return o.n.icmpType // the sandbox's questions are asked by sockets
	}
	tuple := p.tuple()
	fl := o.lookup(tuple)
	if fl != nil && p.proto == protoTCP {
		if reopened := fl.track(nat.Original, &p); reopened {
			fl.end(nat.ReasonReopened)
			fl = nil
		}
	}
	if fl == nil {
		var why reason
		if fl, why = o.begin(tuple, pkt, &p); fl == nil {
			if p.frag == fragFirst {
				o.frags.forget(nat.Original, &p) // an earlier packet had the same identifier
			}
			return why
		}
	}
	if p.frag == fragFirst {
		o.frags.note(nat.Original, &p, fl, o.gate.now())
	}
	return o.pass(fl, nat.Original, pkt, &p)
}

// answer carries a packet of the sandbox outside if it belongs to a flow from
// there; otherwise it is not for here, and answer returns false. The packet has been
// through no check but the device's.
func (o *outside) answer(pkt *stack.PacketBuffer) bool {
	if o.count.Load() == 0 && !o.waiting.Load() {
		return false
	}
	var p datum
	if why := o.parse(pkt, &p); why.Uint64 != nil || p.routed {
		return false
	}
	if o.waiting.Load() {
		o.n.waiting.Add(1)
		return true
	}
	var fl *inboundFlow
	if p.frag == fragLater {
		fl = o.frags.find(nat.Reply, &p, o.gate.now())
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
		fl = o.lookup(p.tuple().Reverse())
	}
	if fl == nil {
		return false
	}
	if p.proto == protoTCP && p.frag != fragLater {
		if p.tcp.Flags()&tcpFlagsMask == header.TCPFlagSyn {
			// The sandbox begins a flow of its own by the same two ports, be it that the
			// client's is over or that both begin at once.
			if fl.over() {
				fl.end(nat.ReasonReopened)
			}
			return false
		}
		fl.track(nat.Reply, &p)
	}
	if p.frag == fragFirst {
		o.frags.note(nat.Reply, &p, fl, o.gate.now())
	}
	if why := o.pass(fl, nat.Reply, pkt, &p); why.Uint64 != nil {
		why.dropArrived(pkt)
	}
	return true
}

// forGate reports whether the sandbox's packet asks a resolver while names are gated:
// then it is the gate's, whatever flow there may be.
func (o *outside) forGate(p *datum) bool {
	return p.dport == dnsPort && (p.proto == protoUDP || p.proto == protoTCP) && o.gate.rules.Load().GatesNames()
}

// pass accounts for a packet of a flow and sends it on.
func (o *outside) pass(fl *inboundFlow, d nat.Dir, pkt *stack.PacketBuffer, p *datum) reason {
	way, to := &o.in, &o.sandbox
	if d == nat.Reply {
		way, to = &o.out, &o.in0
	}
	if limits := fl.shape.Load(); limits != nil {
		q := o.queues(limits)
		if way = &q.in; d == nat.Reply {
			way = &q.out
		}
	}
	restoreHop(p)
	if !way.send(to.prepare(pkt, p), p.size) {
		return o.n.bandwidth
	}
	fl.lease.Account(d, 1, int64(p.size))
	return reason{}
}

// forward sends on a packet that belongs to no flow of its own.
func (o *outside) forward(to *outlet, pkt *stack.PacketBuffer, p *datum) {
	restoreHop(p)
	next := to.prepare(pkt, p)
	defer next.DecRef()
	if !to.write(next) {
		o.n.writeFailed.Add(1)
	}
}

func (o *outside) lookup(orig nat.Tuple) *inboundFlow {
	o.mu.RLock()
	fl := o.flows[orig]
	o.mu.RUnlock()
	return fl
}

// list is the flows of the moment.
func (o *outside) list() []*inboundFlow {
	o.mu.RLock()
	defer o.mu.RUnlock()
	all := make([]*inboundFlow, 0, len(o.flows))
	for _, fl := range o.flows {
		all = append(all, fl)
	}
	return all
}

// close forgets every flow. Nobody is told: the two ends of each are alive, and
// the worker that carries the pod's packets next takes the flows from memory.
func (o *outside) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	for _, fl := range o.list() {
		fl.end(nat.ReasonStopped)
	}
	o.mu.RLock()
	ruled := slices.Clone(o.ruled)
	o.mu.RUnlock()
	for _, q := range ruled {
		q.in.close()
		q.out.close()
	}
	o.in.close()
	o.out.close()
}

// isPod tells whether a is one of the sandbox's addresses.
func (o *outside) isPod(a netip.Addr) bool { return slices.Contains(o.onlink.guest, a) }
