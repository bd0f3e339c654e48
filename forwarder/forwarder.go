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
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/forwarder/internal/datagram"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/inbound"
	"sluice.dev/sluice/forwarder/internal/ingress"
	"sluice.dev/sluice/forwarder/internal/link"
	"sluice.dev/sluice/forwarder/internal/onlink"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// DNSHandler answers the sandbox's DNS queries at its DNS address.
type DNSHandler interface {
	// ServePacket answers one datagram by calling reply, at most once and from any goroutine, with
	// the outcome of the question; it does not answer one that is refused in silence. It must not
	// block, and must not keep query or reply beyond its work on them.
	ServePacket(ctx context.Context, query []byte, from netip.AddrPort, reply func([]byte, policy.Outcome))
	// AnswerPacket answers one datagram from memory, or returns nil to leave it to ServePacket. It
	// does not keep query.
	AnswerPacket(query []byte, from netip.AddrPort) []byte
	// ServeStream serves one connection and returns when it ends. It reports the outcome of each
	// question, from any goroutine.
	ServeStream(ctx context.Context, c net.Conn, became func(policy.Outcome))
}

// DHCPHandler answers guests that configure themselves. A nil or empty reply means no answer.
type DHCPHandler interface {
	HandleV4(payload []byte) (reply []byte, broadcast bool, to netip.AddrPort)
	HandleV6(payload []byte, from netip.Addr) (reply []byte)
	RouterAdvertisement() []byte
}

// GuestSockets makes sockets inside the sandbox's network namespace, for
// clients on the host's loopback that use a published port.
type GuestSockets interface {
	// Stream returns a TCP socket, or false when none is available now.
	Stream(v6 bool) (fd int, ok bool)
}

// Config describes one sandbox's forwarder.
type Config struct {
	Link stack.LinkEndpoint
	MTU  uint32

	Guest   []netip.Addr // our addresses on the link, at most one per family
	Gateway []netip.Addr // where DNSHandler listens, at most one per family
	DNS     []netip.Addr // where DNSHandler listens, at most one of a family
	Prefix4 netip.Prefix // the link's IPv4 prefix: tells the directed broadcast
	// SelfConfigured is the prefix from which a guest may give itself addresses (RFC 4862); the
	// zero value means none.
	SelfConfigured netip.Prefix

	Table       *nat.Table
	DNSHandler  DNSHandler    // nil: no answer at the DNS address, nor elsewhere in its place
	Names       *policy.Names // the names that the sandbox was told; nil: no rule by domain matches
	DHCPHandler DHCPHandler   // nil: guests are configured from outside
	Guests      GuestSockets  // nil: loopback clients appear as the gateway

	// Inbound is a second link for traffic from outside to the Guest addresses, which
	// passes as packets (inbound/inbound.go); nil where there is none. It must offer the same
	// offloads as Link, and the Guest addresses must be this network namespace's own:
	// host sockets are bound to them (hostsock/dialer_pod.go). Owned by the forwarder.
	Inbound stack.LinkEndpoint
	// Memory outlives this forwarder: it passes the flows of Inbound on to the next one. It has
	// MemorySize bytes, zero at first. It may be nil.
	Memory []byte
	// Asks reports whether this process asks a server by its own sockets, past the forwarder: no
	// flow of Inbound begins from there. It may be nil.
	Asks func(netip.AddrPort) bool
	// OnlyHost means that all of the sandbox's neighbours are behind us, so every ARP request and
	// neighbour solicitation is answered, except for the Guest addresses.
	OnlyHost bool

	// Keepalive is how idle connections are probed; the zero value means the default.
	Keepalive Keepalive
	// MemoryMarks are the marks of the memory budget for the sandbox's bytes (admit/memory.go); the
	// zero value means the default. MemoryPressure is told when pressure begins and ends; it must
	// not block, and may be nil.
	MemoryMarks    MemoryMarks
	MemoryPressure func(bool)

	// RawICMP are raw ICMP and ICMPv6 sockets, non-blocking, for hosts that permit no ping sockets;
	// -1 or zero means none. Owned by the forwarder.
	RawICMP4, RawICMP6 int

	// Drop is called for each packet dropped here, with its counted reason. It must not block or
	// keep pkt. It may be nil.
	Drop func(reason string, pkt []byte)
	// Refused is called for each flow, and each request, that policy refused. It must not block. It
	// may be nil.
	Refused func(Refusal)
	// Now is the clock; time.Now when nil.
	Now func() time.Time
	// Log receives what an operator must know; nothing is logged per packet.
	Log *slog.Logger
	// Threads is how many goroutines move bytes under load; 0 means one per processor, at most
	// maxThreads.
	Threads int

	spread engine.SpreadTimes // shorter in tests
}

const (
	maxThreads = 4
	// tick is how often the timer looks while there is anything to look after.
	tick = time.Second
)

// Forwarder carries the traffic of one sandbox.
type Forwarder struct {
	cfg     Config
	stack   *stack.Stack
	gate    *admit.Gate
	engine  *engine.Engine
	dialer  *hostsock.Dialer
	onlink  onlink.Addrs
	drops   packet.Drops
	stats   count.Set
	tcp     *tcpflow.Forwarder
	dgram   *datagram.Forwarder // UDP and ICMP
	publish publisher
	outside *inbound.Path // nil without Config.Inbound
	timer   engine.Need

	ctx    context.Context // ends when Run does; handlers get it
	cancel context.CancelFunc
}

// New sets up the stack and the forwarders. From then on it takes packets from the link, and
// refuses every flow until SetRules. Run ends the link.
func New(cfg Config) (*Forwarder, error) {
	if cfg.Link == nil || cfg.Table == nil {
		return nil, errors.New("forwarder: Config needs a Link and a Table")
	}
	if cfg.Inbound != nil && packet.GSOOf(cfg.Inbound) != packet.GSOOf(cfg.Link) {
		return nil, errors.New("forwarder: the inbound link must offer the same offloads as the sandbox's")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	f := &Forwarder{cfg: cfg, timer: engine.Need{Wake: make(chan struct{}, 1)}}
	f.drops = packet.Drops{Stats: &f.stats, Tell: cfg.Drop}
	f.onlink = onlink.Addrs{
		Guest: cfg.Guest, Gateway: cfg.Gateway, DNS: cfg.DNS,
		SelfConfigured: cfg.SelfConfigured, AnswersDNS: cfg.DNSHandler != nil,
		Broadcast: onlink.DirectedBroadcast(cfg.Prefix4),
	}
	if len(cfg.Gateway) > 0 {
		f.onlink.LinkLocal = LinkLocal(cfg.Link.LinkAddress())
	}
	memory, err := admit.NewMemory(&f.stats, cfg.MemoryMarks, f.memoryTurned)
	if err != nil {
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	f.gate = admit.NewGate(admit.Config{
		Table: cfg.Table, Granted: cfg.Names, Memory: memory, Now: cfg.Now,
		Resolver: f.onlink.ForResolver, Refused: cfg.Refused,
	})
	f.dialer = hostsock.NewDialer(&f.stats, cfg.Log)
	if cfg.Keepalive != (Keepalive{}) {
		f.SetKeepalive(cfg.Keepalive)
	}
	f.dialer.Pod = cfg.Inbound != nil
	f.ctx, f.cancel = context.WithCancel(context.Background())
	n := cfg.Threads
	if n <= 0 {
		n = min(runtime.GOMAXPROCS(0), maxThreads)
	}
	if f.engine, err = engine.New(n); err != nil {
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	if err := f.attach(); err != nil {
		f.engine.Free()
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	return f, nil
}

// attach builds the stack with its handlers in place and only then lets the link
// deliver to it.
func (f *Forwarder) attach() error {
	queue := new(tcpflow.Queue)
	s, err := newStack(queue)
	if err != nil {
		return err
	}
	f.stack = s
	if err := f.attachTo(s, queue); err != nil {
		s.Destroy()
		return err
	}
	return nil
}

func (f *Forwarder) attachTo(s *stack.Stack, queue *tcpflow.Queue) error {
	_, batched := f.cfg.Link.(engine.PolledLink)
	emit := packet.NewEmitter(s, f.cfg.Link, f.cfg.MTU, &f.onlink, &f.stats)
	errs := packet.NewErrors(emit, &f.onlink, &f.drops, f.cfg.Now)
	var err error
	if f.tcp, err = tcpflow.New(tcpflow.Config{
		Gate: f.gate, Engine: f.engine, Dialer: f.dialer, Onlink: &f.onlink, Drops: &f.drops, Errs: errs, Timer: &f.timer,
		Stack: s, Link: f.cfg.Link, Resolver: f.cfg.DNSHandler, Ctx: f.ctx, Log: f.cfg.Log,
	}, queue, batched); err != nil {
		return err
	}
	f.dgram = datagram.New(datagram.Config{
		Gate: f.gate, Engine: f.engine, Dialer: f.dialer, Onlink: &f.onlink, Drops: &f.drops, Emit: emit, Errs: errs, Timer: &f.timer,
		Resolver: f.cfg.DNSHandler, Ctx: f.ctx, Log: f.cfg.Log,
	}, f.cfg.RawICMP4, f.cfg.RawICMP6, batched)
	f.publish.onUDP, f.publish.onTCP = f.dgram, ingress.New(ingress.Config{
		Gate: f.gate, Engine: f.engine, Dialer: f.dialer, Drops: &f.drops, Timer: &f.timer, TCP: f.tcp, Guests: f.cfg.Guests,
	})
	if f.cfg.Inbound != nil {
		flows, ports := inbound.SplitMemory(f.cfg.Memory)
		f.gate.Tombs = admit.NewTombs(f.cfg.Now, ports)
		f.outside = inbound.New(inbound.Config{
			Gate: f.gate, Onlink: &f.onlink, Drops: &f.drops, Link: f.cfg.Inbound, Asks: f.cfg.Asks,
		}, f.cfg.Link, flows)
	}
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, f.tcp.HandleTCP)
	s.SetTransportProtocolHandler(udp.ProtocolNumber, f.dgram.HandleUDP)
	s.SetTransportProtocolHandler(icmp.ProtocolNumber4, f.dgram.HandleICMPv4)
	s.SetTransportProtocolHandler(icmp.ProtocolNumber6, f.dgram.HandleICMPv6)
	l := &link.Guard{
		LinkEndpoint: f.cfg.Link, Onlink: &f.onlink, Emit: emit, Errs: errs, Drops: &f.drops, Memory: f.gate.Memory,
		TCP: f.tcp, Dgram: f.dgram, Outside: f.outside, DHCP: f.cfg.DHCPHandler, OnlyHost: f.cfg.OnlyHost,
	}
	if err := attachLink(s, l, &f.cfg, f.onlink.LinkLocal); err != nil {
		return err
	}
	if err := l.Open(s); err != nil {
		return err
	}
	links := []stack.LinkEndpoint{f.cfg.Link}
	if f.outside != nil {
		f.outside.Attach()
		links = append(links, f.cfg.Inbound)
	}
	for _, l := range links {
		if err := f.engine.PollLink(l, f.flush); err != nil {
			return fmt.Errorf("polling the device: %w", err)
		}
	}
	return nil
}

// flush does the work deferred to the end of a batch. Each of several readers may flush what
// another has read.
func (f *Forwarder) flush() {
	f.dgram.Flush()
	f.tcp.Inline.Flush()
}

// memoryTurned is called when memory pressure begins and ends.
func (f *Forwarder) memoryTurned(pressed bool) {
	if pressed {
		f.timer.Raise()
	}
	if f.cfg.MemoryPressure != nil {
		f.cfg.MemoryPressure(pressed)
	}
}

// Run serves until ctx ends, and returns after its last goroutine has.
func (f *Forwarder) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, f.cancel)
	defer stop()
	errs := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f.engine.Run(); err != nil {
			errs <- err
			f.cancel()
		}
	})
	wg.Go(f.tend)
	wg.Go(func() { f.engine.SpreadLink(f.ctx, f.cfg.Link, f.cfg.spread, f.stats.Counter("device_spread_failed")) })
	wg.Go(func() { f.gate.Reaper(f.ctx) })
	wg.Go(func() { f.cfg.Table.Run(f.ctx) })
	<-f.ctx.Done()

	f.gate.Stop()
	f.publish.close()
	f.publish.onTCP.Close()
	f.tcp.Close()
	f.dgram.Close()
	// In this order: Destroy waits for the link's readers with the stack's lock held, and a
	// delivering reader may want that lock.
	if f.outside != nil {
		f.outside.Detach()
	}
	f.cfg.Link.Close()
	f.cfg.Link.Wait()
	if f.outside != nil {
		f.outside.Close()
	}
	f.stack.Destroy()
	f.engine.Close()
	wg.Wait()
	f.engine.Free()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

// tend looks after everything without an event of its own: handshakes that the sandbox never
// completes, abandoned dials, listeners that ran out of descriptors, and flows under memory
// pressure. It sleeps while there are none. The flow table has a timer of its own.
func (f *Forwarder) tend() {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-f.timer.Wake:
			t.Reset(tick)
			continue
		case <-t.C:
		}
		f.timer.Store(false)
		now := f.cfg.Now()
		handshakes, dials := f.tcp.ExpireHandshakes(now), f.tcp.ExpireDials(now)
		checks, held := f.tcp.Checks.Expire(now), f.dgram.UDP.QUIC.List.Expire(now)
		// Starving flows are checked again even after the pressure has ended.
		pressed := f.gate.Memory.Starving.Swap(false) || f.gate.Memory.Pressed.Load()
		if pressed {
			f.tcp.TallyAll()
		}
		if f.publish.retry() || handshakes || dials || checks || held || pressed {
			f.timer.Store(true)
		} else if !f.timer.Load() {
			t.Stop()
		}
	}
}

// SetRules puts a new snapshot in force. When it returns, no data moves on a flow that the snapshot
// refuses, whatever the sandbox does; and such a flow has ended, unless the sandbox is blocking its
// device. Other flows are unaffected.
func (f *Forwarder) SetRules(r *policy.Rules) {
	f.gate.RuleMu.Lock()
	defer f.gate.RuleMu.Unlock()
	if r == nil {
		r = new(policy.Rules)
	}
	f.gate.Set(r)
	if f.outside != nil {
		f.outside.Retire()
		f.outside.Restore()
	}
	f.gate.Finish(f.ctx, f.gate.Revoke(r))
}

// SetKeepalive sets how connections established from now on are probed.
func (f *Forwarder) SetKeepalive(k Keepalive) { f.dialer.SetKeepalive(k) }

// Keepalive returns the setting of SetKeepalive.
func (f *Forwarder) Keepalive() Keepalive { return f.dialer.Keepalive() }

// SetMemory changes the marks. It takes nothing back: above the new marks, flows shrink as they
// move.
func (f *Forwarder) SetMemory(m MemoryMarks) error { return f.gate.Memory.SetMarks(m) }

// Memory returns the marks in force.
func (f *Forwarder) Memory() MemoryMarks { return f.gate.Memory.Marks() }

// Responds returns a channel that is closed when the engine has run a task queued now. It is never
// closed if the engine's goroutines hang.
func (f *Forwarder) Responds() <-chan struct{} { return f.engine.Responds() }

// Stats returns the counters by name.
func (f *Forwarder) Stats() map[string]uint64 {
	m := f.stats.Snapshot()
	ip, icmp := f.stack.Stats().IP, f.stack.Stats().ICMP
	m["stack_malformed_packets"] = ip.MalformedPacketsReceived.Value()
	m["stack_malformed_fragments"] = ip.MalformedFragmentsReceived.Value()
	// ICMP that the stack consumes ends there: errors that match no flow, and requests that only a
	// router answers.
	m["stack_icmp_consumed"] = sumOf(icmp.V4.PacketsReceived.DstUnreachable, icmp.V4.PacketsReceived.SrcQuench, icmp.V4.PacketsReceived.Redirect,
		icmp.V4.PacketsReceived.TimeExceeded, icmp.V4.PacketsReceived.ParamProblem, icmp.V4.PacketsReceived.Timestamp, icmp.V4.PacketsReceived.TimestampReply,
		icmp.V4.PacketsReceived.InfoRequest, icmp.V4.PacketsReceived.InfoReply, icmp.V6.PacketsReceived.DstUnreachable, icmp.V6.PacketsReceived.PacketTooBig,
		icmp.V6.PacketsReceived.TimeExceeded, icmp.V6.PacketsReceived.ParamProblem, icmp.V6.PacketsReceived.RedirectMsg)
	// Headers that the stack answers with a parameter problem, such as a route behind others.
	m["stack_parameter_problems"] = sumOf(icmp.V4.PacketsSent.ParamProblem, icmp.V6.PacketsSent.ParamProblem)
	m["memory_used"] = uint64(max(f.gate.Memory.Used.Load(), 0))
	m["memory_high"] = uint64(f.gate.Memory.High.Load())
	m["host_sockets"] = uint64(f.dialer.Sockets.Load())
	m["goroutines"] = uint64(runtime.NumGoroutine())
	return m
}

func sumOf(counters ...*tcpip.StatCounter) (sum uint64) {
	for _, c := range counters {
		sum += c.Value()
	}
	return sum
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
