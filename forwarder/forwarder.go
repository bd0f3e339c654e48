package forwarder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"sluice/nat"
	"sluice/policy"
)

// DNSHandler answers the sandbox's DNS queries at its DNS address.
type DNSHandler interface {
	// ServePacket answers one datagram by calling reply, at most once and from
	// any goroutine. It must not block, and may keep neither query nor reply
	// beyond its work on them.
	ServePacket(ctx context.Context, query []byte, from netip.AddrPort, reply func([]byte))
	// AnswerPacket answers one datagram from memory, or returns nil: it is for
	// ServePacket then. It keeps nothing of query.
	AnswerPacket(query []byte, from netip.AddrPort) []byte
	// ServeStream serves one connection and returns when it ends.
	ServeStream(ctx context.Context, c net.Conn)
}

// DHCPHandler answers guests that configure themselves. A nil or empty reply
// means that there is nothing to say.
type DHCPHandler interface {
	HandleV4(payload []byte) (reply []byte, broadcast bool, to netip.AddrPort)
	HandleV6(payload []byte, from netip.Addr) (reply []byte)
	RouterAdvertisement() []byte
}

// GuestSockets makes sockets inside the sandbox's network namespace, for
// clients on the host's loopback that use a published port.
type GuestSockets interface {
	// Stream returns a TCP socket, or false when none can be had right now.
	Stream(v6 bool) (fd int, ok bool)
}

// Config describes one sandbox's forwarder.
type Config struct {
	Link stack.LinkEndpoint
	MTU  uint32

	Guest   []netip.Addr // the sandbox's own addresses; anything else is a forged source
	Gateway []netip.Addr // ours on the link, at most one of a family
	DNS     []netip.Addr // where DNSHandler listens, at most one of a family
	Prefix4 netip.Prefix // the link's IPv4 prefix: tells the directed broadcast
	// SelfConfigured is the prefix out of which a guest that configures itself may
	// give itself addresses (RFC 4862); none when it is the zero value.
	SelfConfigured netip.Prefix

	Table       *nat.Table
	DNSHandler  DNSHandler    // nil: nobody answers at the DNS address, nor elsewhere in its place
	Names       *policy.Names // what the sandbox was told of names; nil: no rule by domain matches
	DHCPHandler DHCPHandler   // nil: guests are configured from outside
	Guests      GuestSockets  // nil: loopback clients appear as the gateway

	// Inbound is a second link for traffic from outside to the Guest addresses, which
	// passes as packets (inbound.go); nil where there is none. It must offer the same
	// offloads as Link, and the Guest addresses must be this network namespace's own:
	// host sockets are bound to them (dialer_pod.go). Owned by the forwarder.
	Inbound stack.LinkEndpoint
	// Memory outlives this forwarder: in it the flows of Inbound are noted for the
	// next one, MemorySize bytes of zeroes at first. It may be nil.
	Memory []byte
	// Asks reports whether this process asks a server by sockets of its own, past
	// the forwarder: nothing begins a flow of Inbound from there. It may be nil.
	Asks func(netip.AddrPort) bool
	// OnlyHost: the sandbox's neighbours are all behind us, so every ARP request and
	// neighbour solicitation is answered, but for the Guest addresses.
	OnlyHost bool

	// Keepalive is how idle connections are probed; the zero value stands for the default.
	Keepalive Keepalive
	// MemoryMarks are those of the budget for what the sandbox's bytes take (memory.go); the
	// zero value stands for the default. MemoryPressure is told when pressure begins and ends;
	// it must not block, and may be nil.
	MemoryMarks    MemoryMarks
	MemoryPressure func(bool)

	// RawICMP are raw ICMP and ICMPv6 sockets, non-blocking, for hosts that permit
	// no ping sockets; each is -1 or zero when there is none. Owned by the forwarder.
	RawICMP4, RawICMP6 int

	// Drop is told of each packet dropped here, with its counted reason. It must
	// not block, and may not keep pkt. It may be nil.
	Drop func(reason string, pkt []byte)
	// Refused is told of each flow, and each request, that policy refused. It must not block. It may be nil.
	Refused func(Refusal)
	// Now is the clock; time.Now when nil.
	Now func() time.Time
	// Log receives what an operator has to know; nothing is logged per packet.
	Log *slog.Logger
	// Threads is how many goroutines move bytes when there is much to move; 0 means
	// one for each processor, at most maxThreads.
	Threads int
}

const (
	maxThreads = 4
	dnsPort    = 53
	// ruleDNS is the rule name of flows to our own resolver.
	ruleDNS = "builtin:dns"
	// tick is how often the timer looks while there is anything to look at.
	tick = time.Second
)

// Forwarder carries the traffic of one sandbox.
type Forwarder struct {
	admission
	cfg       Config
	stack     *stack.Stack
	dialer    *Dialer
	engine    *engine
	pipes     pipeStock // of the relays
	stats     stats
	relayed   *atomic.Uint64 // flows that took the loopback short cut
	log       *slog.Logger
	broadcast netip.Addr
	linkLocal netip.Addr // the gateway's

	tcp     *tcpForwarder
	dgram   *datagrams // UDP and ICMP
	publish *publisher
	outside *outside                                 // nil without Config.Inbound
	drop    func(reason string, pkt []byte)          // never nil
	inbound stack.NetworkDispatcher                  // behind the filter; set by link.Attach
	network atomic.Pointer[[2]stack.NetworkEndpoint] // of the NIC, by family; nil until it is set up

	needTimer need

	ctx    context.Context // ends when Run does; handlers get it
	cancel context.CancelFunc
}

// New sets up the stack and the forwarders. Packets are taken from the link from
// then on, and every flow is refused until SetRules. Run ends the link.
func New(cfg Config) (*Forwarder, error) {
	if cfg.Link == nil || cfg.Table == nil {
		return nil, errors.New("forwarder: Config needs a Link and a Table")
	}
	if cfg.Inbound != nil && gsoOf(cfg.Inbound) != gsoOf(cfg.Link) {
		return nil, errors.New("forwarder: the inbound link must offer the same offloads as the sandbox's")
	}
	f := &Forwarder{cfg: cfg, needTimer: need{wake: make(chan struct{}, 1)}, log: cfg.Log}
	f.admission.init(&cfg, f.forResolver)
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if f.drop = cfg.Drop; f.drop == nil {
		f.drop = func(string, []byte) {}
	}
	f.relayed = f.stats.counter("tcp_relayed_loopback")
	var err error
	if f.memory, err = newMemory(&f.stats, cfg.MemoryMarks, f.memoryTurned); err != nil {
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	f.dialer = newDialer(&f.stats, f.log)
	if cfg.Keepalive != (Keepalive{}) {
		f.SetKeepalive(cfg.Keepalive)
	}
	f.dialer.pod = cfg.Inbound != nil
	f.broadcast = directedBroadcast(cfg.Prefix4)
	if len(cfg.Gateway) > 0 {
		f.linkLocal = LinkLocal(cfg.Link.LinkAddress())
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	n := cfg.Threads
	if n <= 0 {
		n = min(runtime.GOMAXPROCS(0), maxThreads)
	}
	if f.engine, err = newEngine(n); err != nil {
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	if err := f.attach(); err != nil {
		f.engine.free()
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	return f, nil
}

// attach builds the stack with its handlers in place and only then lets the link
// deliver to it.
func (f *Forwarder) attach() error {
	queue := new(tcpQueue)
	s, err := newStack(queue)
	if err != nil {
		return err
	}
	f.stack = s
	if f.tcp, err = newTCPForwarder(f, queue); err != nil {
		s.Destroy()
		return err
	}
	f.dgram = newDatagrams(f)
	f.publish = newPublisher(f)
	if f.cfg.Inbound != nil {
		_, ports := splitMemory(f.cfg.Memory)
		f.tombs = newTombs(f.now, ports)
		f.outside = newOutside(f)
	}
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, f.tcp.handleTCP)
	s.SetTransportProtocolHandler(udp.ProtocolNumber, f.handleUDP)
	s.SetTransportProtocolHandler(icmp.ProtocolNumber4, f.handleICMPv4)
	s.SetTransportProtocolHandler(icmp.ProtocolNumber6, f.handleICMPv6)
	if err := attachLink(s, &link{LinkEndpoint: f.cfg.Link, f: f}, &f.cfg, f.linkLocal); err != nil {
		s.Destroy()
		return err
	}
	var eps [2]stack.NetworkEndpoint
	for i, proto := range []tcpip.NetworkProtocolNumber{header.IPv4ProtocolNumber, header.IPv6ProtocolNumber} {
		ep, err := s.GetNetworkEndpoint(nicID, proto)
		if err != nil {
			s.Destroy()
			return fmt.Errorf("finding the stack's network endpoint: %s", err)
		}
		eps[i] = ep
	}
	f.network.Store(&eps)
	links := []stack.LinkEndpoint{f.cfg.Link}
	if f.outside != nil {
		f.outside.attach()
		links = append(links, f.cfg.Inbound)
	}
	for _, l := range links {
		if err := f.pollLink(l); err != nil {
			s.Destroy()
			return fmt.Errorf("polling the device: %w", err)
		}
	}
	return nil
}

// Run serves until ctx ends, and returns after its last goroutine has.
func (f *Forwarder) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, f.cancel)
	defer stop()
	errs := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f.engine.run(); err != nil {
			errs <- err
			f.cancel()
		}
	})
	wg.Go(f.timer)
	wg.Go(f.spread)
	wg.Go(func() { f.reaper(f.ctx) })
	wg.Go(func() { f.table.Run(f.ctx) })
	<-f.ctx.Done()

	f.bandwidth.stop()
	f.limited.set(f.table, nil)
	f.publish.close()
	f.tcp.close()
	f.dgram.close()
	// In this order: Destroy waits for the link's readers with the stack's lock
	// held, and a reader that is delivering may want that lock.
	if f.outside != nil {
		f.outside.detach()
	}
	f.cfg.Link.Close()
	f.cfg.Link.Wait()
	if f.outside != nil {
		f.outside.close()
	}
	f.stack.Destroy()
	f.engine.close()
	wg.Wait()
	f.engine.free()
	f.pipes.close()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

// timer looks after what has no event of its own: handshakes that nobody completes,
// dials that nobody waits for, listeners that ran out of descriptors, and flows under memory pressure. It sleeps
// while there are none. The flow table has a timer of its own.
func (f *Forwarder) timer() {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-f.needTimer.wake:
			t.Reset(tick)
			continue
		case <-t.C:
		}
		f.needTimer.Store(false)
		now := f.now()
		handshakes, dials := f.tcp.expireHandshakes(now), f.tcp.expireDials(now)
		checks, held := f.tcp.checks.expire(now), f.dgram.udp.quic.list.expire(now)
		// What starves is asked again whether or not there is pressure any more.
		pressed := f.memory.starving.Swap(false) || f.memory.pressed.Load()
		if pressed {
			f.tcp.tallyAll()
		}
		if f.publish.retry() || handshakes || dials || checks || held || pressed {
			f.needTimer.Store(true)
		} else if !f.needTimer.Load() {
			t.Stop()
		}
	}
}

// need is a flag whose first raising wakes its owner.
type need struct {
	atomic.Bool
	wake chan struct{} // capacity 1
}

func (n *need) raise() {
	if n.Load() || n.Swap(true) {
		return
	}
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// SetRules puts a new snapshot in force. When it returns, nothing moves on a flow that the
// snapshot refuses, whatever the sandbox does; and such a flow has ended, unless the sandbox
// holds up its device. The others notice nothing.
func (f *Forwarder) SetRules(r *policy.Rules) {
	f.ruleMu.Lock()
	defer f.ruleMu.Unlock()
	if r == nil {
		r = new(policy.Rules)
	}
	f.set(r)
	if f.outside != nil {
		f.outside.retire()
		f.outside.restore()
	}
	f.finish(f.ctx, f.revoke(r))
}

// Stats returns the counters by name.
func (f *Forwarder) Stats() map[string]uint64 {
	m := f.stats.snapshot()
	ip, icmp := f.stack.Stats().IP, f.stack.Stats().ICMP
	m["stack_malformed_packets"] = ip.MalformedPacketsReceived.Value()
	m["stack_malformed_fragments"] = ip.MalformedFragmentsReceived.Value()
	// What the stack takes of ICMP ends there: errors about nothing, and what only a router answers.
	m["stack_icmp_consumed"] = sumOf(icmp.V4.PacketsReceived.DstUnreachable, icmp.V4.PacketsReceived.SrcQuench, icmp.V4.PacketsReceived.Redirect,
		icmp.V4.PacketsReceived.TimeExceeded, icmp.V4.PacketsReceived.ParamProblem, icmp.V4.PacketsReceived.Timestamp, icmp.V4.PacketsReceived.TimestampReply,
		icmp.V4.PacketsReceived.InfoRequest, icmp.V4.PacketsReceived.InfoReply, icmp.V6.PacketsReceived.DstUnreachable, icmp.V6.PacketsReceived.PacketTooBig,
		icmp.V6.PacketsReceived.TimeExceeded, icmp.V6.PacketsReceived.ParamProblem, icmp.V6.PacketsReceived.RedirectMsg)
	// Headers that the stack answers with a parameter problem, such as a route behind others.
	m["stack_parameter_problems"] = sumOf(icmp.V4.PacketsSent.ParamProblem, icmp.V6.PacketsSent.ParamProblem)
	m["memory_used"] = uint64(max(f.memory.used.Load(), 0))
	m["memory_high"] = uint64(f.memory.high.Load())
	m["host_sockets"] = uint64(f.dialer.sockets.Load())
	m["goroutines"] = uint64(runtime.NumGoroutine())
	return m
}

func sumOf(counters ...*tcpip.StatCounter) (sum uint64) {
	for _, c := range counters {
		sum += c.Value()
	}
	return sum
}

// forResolver tells whether a query to dst is answered by DNSHandler: at the DNS
// address always, and at every address while the policy gates names, so that the
// sandbox cannot ask anybody else.
func (f *Forwarder) forResolver(r *policy.Rules, dst netip.AddrPort) bool {
	if f.cfg.DNSHandler == nil || dst.Port() != dnsPort {
		return false
	}
	return f.isDNS(dst.Addr()) || r.GatesNames()
}

// isDNS tells whether a is the resolver's address.
func (f *Forwarder) isDNS(a netip.Addr) bool {
	for _, d := range f.cfg.DNS {
		if d == a {
			return true
		}
	}
	return false
}

func directedBroadcast(p netip.Prefix) netip.Addr {
	if !p.IsValid() || !p.Addr().Is4() || p.Bits() >= 31 {
		return netip.Addr{}
	}
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}

// LinkLocal derives the EUI-64 link-local address (RFC 4291, appendix A) of a MAC
// address, which is the gateway's; a link without one (TUN) has fe80::1.
func LinkLocal[T ~string | ~[]byte](mac T) netip.Addr {
	b := [16]byte{0: 0xfe, 1: 0x80, 15: 1}
	if len(mac) == 6 {
		copy(b[8:], []byte{mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]})
	}
	return netip.AddrFrom16(b)
}
